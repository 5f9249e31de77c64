#!/bin/busybox sh
# From the kernel to the root disk: load the drivers, mount, hand over.
b=/bin/busybox
$b mount -t devtmpfs dev /dev
for module in $($b cat /lib/order); do
    $b insmod /lib/$module.ko || echo "init: cannot load $module"
done
tries=0
while [ ! -b /dev/vda ] && [ $tries -lt 500 ]; do
    $b usleep 10000
    tries=$((tries + 1))
done
$b mount -t ext4 -o @ROOT_OPTIONS@ /dev/vda /root || exec $b sh
$b mount --move /dev /root/dev
exec $b switch_root /root /guest/init
