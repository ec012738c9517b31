/* SPDX-License-Identifier: Apache-2.0
 *
 * Fields in memory that somebody else writes meanwhile: one load, one store.
 */
#ifndef VS_SHARED_MEMORY_H
#define VS_SHARED_MEMORY_H

#include <stdatomic.h>

#define READ_ONCE(x) (*(const volatile __typeof__(x) *)&(x))
#define WRITE_ONCE(x, v) (*(volatile __typeof__(x) *)&(x) = (v))

/* A killed process leaves its stores in the order in which the compiler has put them. */
static inline void in_program_order(void)
{
    atomic_signal_fence(memory_order_seq_cst);
}

#endif
