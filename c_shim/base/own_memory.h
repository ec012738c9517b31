/* SPDX-License-Identifier: Apache-2.0
 *
 * The large buffers of our own: the log, the bounce buffer, those of the copy and the comparison.
 */
#ifndef VS_OWN_MEMORY_H
#define VS_OWN_MEMORY_H

#include <stdint.h>

/* Zeroed memory, touched only when used; bytes: a multiple of 4096. NULL: there is none. */
uint8_t *own_memory_map(uint64_t bytes);
void own_memory_unmap(uint8_t *memory, uint64_t bytes);
/* Its content is not needed any more: the pages go back to the system. */
void own_memory_drop(uint8_t *memory, uint64_t bytes);

#endif
