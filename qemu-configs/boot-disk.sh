#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
#
# The vhostsync disk is the disk that the machine boots from, through SeaBIOS (QEMU's default firmware, which has a
# virtio-blk driver). Nothing else is needed: no -kernel, no other disk.
#
#   vhostsync serve --socket-path /run/vm.sock --blk-file /disks/debian.img
#   qemu-configs/boot-disk.sh /run/vm.sock -serial mon:stdio
#
# All words after the socket go to QEMU as they are. ACCEL=kvm, QEMU=… as in one-queue.sh.
#
# With ACCEL=tcg a boot loader may hang whose later part is read to where an earlier one has run (syslinux: its master
# boot record, which is overwritten at 0x7c00). QEMU goes on with its translation of the old code, because it does not
# see what another process writes into the guest's memory; so it is with every vhost-user backend. KVM has no such
# translations. GRUB copies its parts itself and boots under both, and so do a UEFI firmware and -kernel.
set -eu
socket=${1:?usage: boot-disk.sh SOCKET [QEMU ARGUMENT…]}
shift

# bootindex=0: SeaBIOS tries this disk first. It reads with one queue, one request at a time, and without flushes: for
#   the backend the firmware is a write-through guest, until the guest's own driver takes over.
exec "${QEMU:-qemu-system-x86_64}" \
    -machine "q35,accel=${ACCEL:-kvm},memory-backend=memory" -smp 2 \
    -m 1G -object memory-backend-memfd,id=memory,size=1G,share=on \
    -nodefaults -nographic \
    -chardev "socket,id=backend,path=$socket,reconnect=1" \
    -device vhost-user-blk-pci,chardev=backend,num-queues=2,bootindex=0 \
    "$@"
