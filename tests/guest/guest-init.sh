#!/bin/busybox sh
# SPDX-License-Identifier: Apache-2.0
# The guest's first process: load the modules, then serve commands on two serial ports.
/bin/busybox --install -s /bin
export PATH=/bin HOME=/
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mount -t tmpfs tmp /tmp
for module in /modules/*.ko; do
    insmod "$module" || echo "init: $module was not loaded"
done
mdev -s
/agent ttyS2 &
/agent ttyS1 &
# The agents never end; should one do so, its port is silent and the test says so.
while :; do wait; sleep 1000; done
