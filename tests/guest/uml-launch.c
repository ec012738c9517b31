// SPDX-License-Identifier: Apache-2.0
//
// uml-launch PROGRAM ARG…: run a user-mode kernel on a processor whose register state is larger than it expects.
//
// The user-mode kernel saves its processes' registers by ptrace in a buffer of fixed size. With AMX the state is
// 11008 bytes, the buffer is smaller, and the first process dies ("Attempted to kill init! exitcode=0x0000000b").
// Where PTRACE_GETREGSET fails at its start, it uses the older requests, which keep x87 and SSE alone. So this makes
// that one request fail, by a seccomp filter, and runs the program. Each page fault in the guest then loses the upper
// halves of the AVX registers, so whoever uses this tells the guest's C library (GLIBC_TUNABLES) to leave AVX alone.
#include <errno.h>
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#define GETREGSET 0x4204 // PTRACE_GETREGSET
#define XSTATE 0x202     // NT_X86_XSTATE

#define LOAD(field) BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, field))
#define ELSE_SKIP(value, skip) BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, value, 0, skip)

int main(int argc, char **argv)
{
    /* clang-format off */
    struct sock_filter filter[] = {
        LOAD(arch),    ELSE_SKIP(AUDIT_ARCH_X86_64, 7),
        LOAD(nr),      ELSE_SKIP(SYS_ptrace, 5),
        LOAD(args[0]), ELSE_SKIP(GETREGSET, 3),
        LOAD(args[2]), ELSE_SKIP(XSTATE, 1),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | EIO),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
    };
    /* clang-format on */
    struct sock_fprog program = {.len = sizeof filter / sizeof filter[0], .filter = filter};
    if (argc < 2) {
        fputs("usage: uml-launch PROGRAM ARG...\n", stderr);
        return 2;
    }
    if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0 || prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program) != 0) {
        fprintf(stderr, "uml-launch: cannot set the filter: %s\n", strerror(errno));
        return 1;
    }
    execvp(argv[1], argv + 1);
    fprintf(stderr, "uml-launch: %s: %s\n", argv[1], strerror(errno));
    return 1;
}
