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
# noinit_itable: no thread that goes on writing to the disk by itself.
$b mount -t ext4 -o discard,noinit_itable /dev/vda /root || exec $b sh
$b mount --move /dev /root/dev
exec $b switch_root /root /guest/init
