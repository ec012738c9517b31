#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
#
# One vhostsync disk with one queue: the plainest virtual machine.
#
#   vhostsync serve --socket-path /run/vm.sock --blk-file /disks/a.img --num-queues 1
#   qemu-configs/one-queue.sh /run/vm.sock -kernel … -initrd … -append 'console=ttyS0 root=/dev/vda'
#
# A disk that has a name (vhostsync create vm1 --disk /disks/a.img; vhostsync serve --name vm1) has its socket at
# /run/vhostsync/vm1/vm.sock, whichever disk it is on by now.
#
# All words after the socket go to QEMU as they are. ACCEL=tcg where KVM is missing, QEMU=… for another QEMU.
set -eu
socket=${1:?usage: one-queue.sh SOCKET [QEMU ARGUMENT…]}
shift

# memory-backend-memfd with share=on: the backend maps the guest's memory and reads and writes it in place. Without
#   share=on QEMU starts, and the disk does not work.
# reconnect=1: when the backend is restarted, QEMU connects again (every second) and the guest's requests wait.
# num-queues: never more than `vhostsync serve --num-queues` offers, or QEMU refuses to start.
exec "${QEMU:-qemu-system-x86_64}" \
    -machine "q35,accel=${ACCEL:-kvm},memory-backend=memory" \
    -m 512M -object memory-backend-memfd,id=memory,size=512M,share=on \
    -nodefaults -nographic \
    -chardev "socket,id=backend,path=$socket,reconnect=1" \
    -device vhost-user-blk-pci,chardev=backend,num-queues=1 \
    "$@"
