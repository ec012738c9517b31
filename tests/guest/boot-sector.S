// SPDX-License-Identifier: Apache-2.0
//
// A boot sector that proves that the firmware can use the disk. It reads 63 sectors in one call to an odd address,
// checks that each begins with its own number, writes the first of them to sector 100, and says so on the first serial
// port: "read 63, wrote 1". Then it resets the machine, which ends QEMU under -no-reboot.
    .code16
    .globl _start
_start:
    cli
    xorw %ax, %ax
    movw %ax, %ds
    movw %ax, %ss
    movw $0x7c00, %sp
    sti
    movb %dl, drive  // the firmware's number of the disk that this sector came from

    movb $0x42, %ah  // INT 13h: extended read
    call disk
    movw $0x1000, %ax
    movw %ax, %es
    movw $1, %di
    movl $1, %ecx
check:
    cmpl %ecx, %es:(%di)
    jne failed
    addw $512, %di
    incl %ecx
    cmpl $64, %ecx
    jne check

    movw $1, count
    movl $100, sector
    movw $0x4300, %ax  // INT 13h: extended write, without verify
    call disk
    movw $done, %si
    jmp finish

disk:
    movw $packet, %si
    movb drive, %dl
    int $0x13
    jc failed
    ret
failed:
    movw $trouble, %si
finish:
    movw $0x3fd, %dx  // the serial port's line status
ready:
    inb %dx, %al
    testb $0x20, %al
    jz ready
    lodsb
    movw $0x3f8, %dx
    testb %al, %al
    jz reset
    outb %al, %dx
    jmp finish
reset:
    movb $0xfe, %al  // the keyboard controller's reset line
    outb %al, $0x64
    hlt
    jmp reset

done:
    .asciz "read 63, wrote 1\r\n"
trouble:
    .asciz "the disk failed\r\n"
drive:
    .byte 0
    .balign 4
packet:
    .byte 16, 0
count:
    .word 63
    .word 1, 0x1000  // offset and segment of the buffer
sector:
    .quad 1

    .org 510
    .word 0xaa55
