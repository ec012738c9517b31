#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
#
# Many queues: one for each processor of the guest, so that no two of them wait for the same queue. Beside it a scratch
# disk that QEMU serves itself, on an I/O thread.
#
#   vhostsync serve --socket-path /run/vm.sock --blk-file /disks/a.img --num-queues 4
#   qemu-configs/many-queues.sh /run/vm.sock /disks/scratch.img -kernel …
#
# All words after the scratch image go to QEMU as they are. CPUS=4 (also the queues), ACCEL=kvm, QEMU=… as in
# one-queue.sh, which explains what is the same here.
set -eu
socket=${1:?usage: many-queues.sh SOCKET SCRATCH-IMAGE [QEMU ARGUMENT…]}
scratch=${2:?usage: many-queues.sh SOCKET SCRATCH-IMAGE [QEMU ARGUMENT…]}
shift 2
cpus=${CPUS:-4}

# num-queues, queue-size: requests in flight are at most their product. 256 is plenty for a disk; 1024 is the most.
# iothread: the vhost-user disk has none and needs none. Its requests go from the guest to vhostsync past QEMU, which
#   takes part only when the disk starts, stops or reconnects, on its main loop. A disk that QEMU serves itself should
#   have one: on the main loop its work would delay just those moments.
exec "${QEMU:-qemu-system-x86_64}" \
    -machine "q35,accel=${ACCEL:-kvm},memory-backend=memory" -smp "$cpus" \
    -m 512M -object memory-backend-memfd,id=memory,size=512M,share=on \
    -nodefaults -nographic \
    -chardev "socket,id=backend,path=$socket,reconnect=1" \
    -device "vhost-user-blk-pci,chardev=backend,num-queues=$cpus,queue-size=256" \
    -object iothread,id=io0 \
    -blockdev "driver=file,node-name=scratch,filename=$scratch,cache.direct=on,aio=threads" \
    -device "virtio-blk-pci,drive=scratch,iothread=io0,num-queues=$cpus" \
    "$@"
