#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
#
# A cloud-hypervisor guest whose disk is served by vhostsync.
#
#   vhostsync serve --socket-path /run/vm.sock --blk-file /disks/debian.img --num-queues 4
#   qemu-configs/cloud-hypervisor.sh /run/vm.sock ./hypervisor-fw
#
# All words after the kernel (or firmware) go to cloud-hypervisor as they are. CPUS=4 (also the queues).
set -eu
socket=${1:?usage: cloud-hypervisor.sh SOCKET KERNEL [ARGUMENT…]}
kernel=${2:?usage: cloud-hypervisor.sh SOCKET KERNEL [ARGUMENT…]}
shift 2
cpus=${CPUS:-4}

# shared=on: the backend maps the guest's memory, as with QEMU.
# vhost_user=true with a socket in place of a path. What is said of a disk's file elsewhere (readonly, direct) are
#   options of `vhostsync serve`.
# When the backend is restarted, cloud-hypervisor connects again for a minute.
exec "${CLOUD_HYPERVISOR:-cloud-hypervisor}" \
    --kernel "$kernel" \
    --cpus "boot=$cpus" \
    --memory size=1G,shared=on \
    --disk "vhost_user=true,socket=$socket,num_queues=$cpus,queue_size=256" \
    --serial tty --console off \
    "$@"
