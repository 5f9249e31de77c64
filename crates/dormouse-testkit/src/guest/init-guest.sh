#!/bin/sh
# The guest's init: runs the command lines that come in on the serial line, and counts.
# Its own messages start with a record separator (\036) and are one write each.
export PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LC_ALL=C PYTHONHASHSEED=0
mount -t proc proc /proc
mount -t sysfs sys /sys
stty -F /dev/ttyS0 -echo -onlcr
exec </dev/ttyS0 >/dev/ttyS0 2>&1
cd /root
(
    n=0
    while :; do
        n=$((n + 1))
        printf '\036COUNTER %d\n' $n
        sleep 1
    done
) </dev/null &
printf '\036READY\n'
while read -r line; do
    sh -c "$line" </dev/null
    printf '\036DONE rc=%d\n' $?
done
