/* SPDX-License-Identifier: Apache-2.0
 *
 * Where an image may have data: bits, set by writes and by what librbd tells of the image (rbd_diff_iterate2).
 */
#include "rbd_holes.h"

#include <stdlib.h>

/* So much is one bit: as much as a dirty region is by default. */
#define GRAIN_BYTES 65536u
/* What is asked for at once: 1024 objects of the usual size, some milliseconds. */
#define WINDOW_BYTES (4ull << 30)

static uint64_t ceiling(uint64_t value, uint64_t unit)
{
    return value / unit + (value % unit != 0);
}

static uint64_t least(uint64_t one, uint64_t other)
{
    return one < other ? one : other;
}

bool rbd_holes_init(struct rbd_holes *h, uint64_t bytes)
{
    h->bytes = bytes;
    h->all_data = false;
    h->written = calloc(ceiling(bytes, GRAIN_BYTES * 64ull), sizeof *h->written);
    h->known = calloc(ceiling(bytes, WINDOW_BYTES), sizeof *h->known);
    if (h->written && h->known)
        return true;
    rbd_holes_free(h);
    return false;
}

void rbd_holes_free(struct rbd_holes *h)
{
    free((void *)h->written);
    free(h->known);
}

void rbd_holes_write(struct rbd_holes *h, uint64_t offset, uint64_t length)
{
    uint64_t end = offset < h->bytes ? least(offset + length, h->bytes) : 0;
    for (uint64_t grain = offset / GRAIN_BYTES; grain * GRAIN_BYTES < end; grain++)
        atomic_fetch_or_explicit(&h->written[grain / 64], 1ull << grain % 64, memory_order_relaxed);
}

static bool may_have_data(const struct rbd_holes *h, uint64_t grain)
{
    return atomic_load_explicit(&h->written[grain / 64], memory_order_relaxed) >> grain % 64 & 1;
}

static int note(uint64_t offset, size_t length, int exists, void *arg)
{
    if (exists)
        rbd_holes_write(arg, offset, length);
    return 0;
}

/* Exactly, and not by whole objects from the object map: that says what objects there are, and these may be holes for
 * the most part. librbd first waits for the writes that it has, so the bits of what came before are complete. */
static void ask(struct rbd_holes *h, rbd_image_t image, uint64_t window)
{
    uint64_t at = window * WINDOW_BYTES, length = least(WINDOW_BYTES, h->bytes - at);
    if (rbd_diff_iterate2(image, NULL, at, length, 1, 0, note, h) < 0)
        h->all_data = true;
    h->known[window] = true;
}

void rbd_holes_look(struct rbd_holes *h, rbd_image_t image, uint64_t offset, uint64_t length, uint64_t *data_at,
                    uint64_t *data_end)
{
    uint64_t end = offset + length, at = offset;
    *data_at = offset;
    *data_end = end;
    for (uint64_t window = offset / WINDOW_BYTES; window * WINDOW_BYTES < least(end, h->bytes); window++)
        if (!h->all_data && !h->known[window])
            ask(h, image, window);
    if (h->all_data || end > h->bytes)
        return;
    while (at < end && !may_have_data(h, at / GRAIN_BYTES))
        at = (at / GRAIN_BYTES + 1) * GRAIN_BYTES;
    *data_at = least(at, end);
    while (at < end && may_have_data(h, at / GRAIN_BYTES))
        at = (at / GRAIN_BYTES + 1) * GRAIN_BYTES;
    if (*data_at < end)
        *data_end = least(at, end);
}
