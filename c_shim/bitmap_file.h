/* SPDX-License-Identifier: Apache-2.0
 *
 * The persistent dirty bitmap: a file that holds where two disks may differ,
 * over a crash of the process and of the host. See bitmap_file.c for its format
 * and for why no bit is lost.
 */
#ifndef VS_BITMAP_FILE_H
#define VS_BITMAP_FILE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "shim.h"

#define BITMAP_BLOCK_BYTES 4096u
#define BITMAP_BLOCK_WORDS 510u /* of bits; the first two words of a block are its checksum and its number */

struct vs_bitmap {
    int fd;
    struct vs_bitmap_shape shape;
    struct vs_bitmap_names names;
    uint64_t regions, words, bit_blocks;
    uint64_t log_bytes; /* of one of the two copies */
    uint64_t bytes;     /* of the file */
    uint8_t *map;       /* all of it, shared */
    int sigbus_slot;
    uint64_t log_sequence; /* of the copy that holds */
    uint64_t *log_words;   /* the extents of the next copy, behind their count */
    uint8_t *log_buffer;   /* the next copy as it is written */
};

/* By the one thread that has it. */
/* A word of bits, for the checksum to fit at once. Never waits for more than a page fault. */
void bitmap_file_store(struct vs_bitmap *b, uint64_t word, uint64_t value);
/* What a word holds; ~0 where the file does not know. */
uint64_t bitmap_file_word(const struct vs_bitmap *b, uint64_t word);
/* The mapping is gone (SIGBUS: the file was truncated, its disk is full or failing): nothing is stored any more. */
bool bitmap_file_lost(const struct vs_bitmap *b);
/* The header in the mapping; to be synced by the caller. */
void bitmap_file_put_header(struct vs_bitmap *b, bool clean);

/* The next copy of the activity log: extents go to bitmap_file_log_extents(), then sealed; what is to be
 * written where is told. After it is durable: bitmap_file_log_written(). */
uint64_t *bitmap_file_log_extents(struct vs_bitmap *b);
uint64_t bitmap_file_log_seal(struct vs_bitmap *b, uint64_t count);
void bitmap_file_log_written(struct vs_bitmap *b);

#endif
