/* SPDX-License-Identifier: Apache-2.0
 *
 * The file, in blocks of 4096 bytes:
 *
 *     block 0        header: which pair of disks, whose names, which boot
 *     1 .. n         bits: {checksum, number, 510 words}, a bit a region
 *     the rest       two copies of the activity log, written in turn
 *
 * A bit is set before a write that it stands for is submitted (rule 4). Why none
 * is lost:
 *
 * The process dies (SIGKILL). Bits are stores into a shared mapping: they are in
 * the page cache as soon as they are made, and the next process of the same boot
 * reads them there. The log is not looked at.
 *
 * The host dies. What the file holds is what was synced, and perhaps more. A bit
 * that was set since may be missing. But a write is only submitted while its
 * extent is named by a copy of the log that is durable; an extent leaves the log
 * only after its bits were synced, in a later copy, while the former copy is
 * still there; and a copy that is torn does not count, while the other one, which
 * is never written at the same time, does. So every bit that may be missing lies
 * in an extent of the newest whole copy, and a start after another boot sets all
 * bits of these. A torn copy consists of whole sectors of two sequence numbers. A
 * sector that is not whole is no torn write but damage, perhaps of the newest
 * copy: then, and without a whole copy, all bits are set. A bit that was *cleared*
 * and is still set is copied once more than needed.
 *
 * The log may be dropped by a start only after everything that it stands for was
 * synced. So open() puts the bits right first, syncs them, and then writes the
 * header (the boot they are good for) and an empty log.
 *
 * Torn and damaged blocks. The checksum is the XOR of a mix of (position, word)
 * over the block's words, so that one word is changed together with it in O(1),
 * in the same page. Between the two stores, or if the page went to the disk
 * between them, or if anything else damaged it, they do not match, and all bits
 * of that block are taken to be set. Since a change replaces what the *page* held
 * before, a damaged block does not become whole by later stores. A block that was
 * never written (zeroes: a hole) has no number and counts as all set as well,
 * which is how a new file begins: nothing of it has to be written, and zeroes
 * that come from elsewhere are as harmless as any other damage.
 *
 * A file that is not the one that the state record means is never believed: each
 * start gives it a new name (uuid), which the record has to know; it says
 * which two disks it is of. The former name is kept, for a crash between the file
 * and the record. So an old copy of the file that somebody put back is seen.
 *
 * SIGBUS (truncated by somebody, no room in a file system that does not keep what
 * was allocated): guest_memory.c's handler puts anonymous memory in the place of
 * the mapping; nobody dies, and whoever stores looks at bitmap_file_lost()
 * before the write that the bit is for is submitted.
 *
 * Leaves out: another region size or capacity (a full copy), and what a page
 * fault may wait for: a store to a page that the kernel has just written back
 * waits for the file system as any write to a file may. Keep the file on a disk
 * that answers.
 */
#include "bitmap_file.h"

#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "guest_memory.h"

#define VERSION 1u
#define LOG_SECTOR_WORDS 62u
static const char magic[8] = {'V', 'S', 'B', 'I', 'T', 'M', 'A', 'P'};

struct header {
    char magic[8];
    uint32_t version;
    uint32_t clean; /* nothing was written since all bits were synced: the log says nothing more */
    struct vs_bitmap_shape shape;
    struct vs_bitmap_names names;
    uint8_t zero[BITMAP_BLOCK_BYTES - 16 - sizeof(struct vs_bitmap_shape) - sizeof(struct vs_bitmap_names) - 8];
    uint64_t checksum; /* of all words before it */
};

struct bit_block {
    uint64_t checksum;
    uint64_t number; /* its own, from 1; 0: never written */
    uint64_t word[BITMAP_BLOCK_WORDS];
};

/* A copy of the log is an array of these; their words are, one after the other, the count and the extents. */
struct log_sector {
    uint64_t checksum; /* of all words after it, and of its place */
    uint64_t sequence;
    uint64_t word[LOG_SECTOR_WORDS];
};

static_assert(sizeof(struct header) == BITMAP_BLOCK_BYTES, "the header is a block");
static_assert(sizeof(struct bit_block) == BITMAP_BLOCK_BYTES, "a block of bits is a block");
static_assert(sizeof(struct log_sector) == 512, "what every disk writes as a whole or not at all");
static_assert(sizeof(struct vs_bitmap_shape) == 24 && sizeof(struct vs_bitmap_names) == 96, "on disk: no padding");

/* ---- checksums --------------------------------------------------------- */

/* David Stafford's mix 13 (as in splitmix64). */
static uint64_t mix(uint64_t x)
{
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
    x = (x ^ x >> 27) * 0x94d049bb133111ebu;
    return x ^ x >> 31;
}

static uint64_t part(uint64_t number, uint64_t index, uint64_t word)
{
    return mix(word ^ mix((number << 10 | index) + 0x9e3779b97f4a7c15u));
}

/* Of the words at "from", in order. */
static uint64_t chain(const void *from, uint64_t bytes)
{
    const uint64_t *word = from;
    uint64_t sum = bytes;
    for (uint64_t i = 0; i < bytes / 8; i++)
        sum = mix(sum + word[i] + 0x9e3779b97f4a7c15u);
    return sum;
}

/* ---- places ------------------------------------------------------------ */

static struct header *header_of(const struct vs_bitmap *b)
{
    return (struct header *)(void *)b->map;
}

static struct bit_block *block_of(const struct vs_bitmap *b, uint64_t block)
{
    return (struct bit_block *)(void *)(b->map + (1 + block) * BITMAP_BLOCK_BYTES);
}

static uint64_t log_offset(const struct vs_bitmap *b, uint64_t sequence)
{
    return (1 + b->bit_blocks) * BITMAP_BLOCK_BYTES + sequence % 2 * b->log_bytes;
}

static uint64_t divide_up(uint64_t a, uint64_t by)
{
    return a / by + (a % by != 0);
}

static uint64_t log_copy_bytes(uint32_t extents)
{
    uint64_t sectors = divide_up(1 + (uint64_t)extents, LOG_SECTOR_WORDS);
    return divide_up(sectors * sizeof(struct log_sector), BITMAP_BLOCK_BYTES) * BITMAP_BLOCK_BYTES;
}

static void measure(struct vs_bitmap *b)
{
    b->regions = divide_up(b->shape.capacity_bytes, b->shape.region_bytes);
    b->words = divide_up(b->regions, 64);
    b->bit_blocks = divide_up(b->words, BITMAP_BLOCK_WORDS);
    b->log_bytes = log_copy_bytes(b->shape.al_extents);
    b->bytes = (1 + b->bit_blocks) * BITMAP_BLOCK_BYTES + 2 * b->log_bytes;
}

/* ---- bits -------------------------------------------------------------- */

static uint64_t checksum_of(const struct bit_block *p, uint64_t number)
{
    uint64_t sum = mix(number);
    for (unsigned i = 0; i < BITMAP_BLOCK_WORDS; i++)
        sum ^= part(number, i, p->word[i]);
    return sum;
}

/* The number last: before it is there, the block counts as all set. */
static void fill_block(struct bit_block *p, uint64_t number)
{
    p->number = 0;
    __atomic_signal_fence(__ATOMIC_SEQ_CST);
    memset(p->word, 0xff, sizeof p->word);
    p->checksum = checksum_of(p, number);
    __atomic_signal_fence(__ATOMIC_SEQ_CST);
    p->number = number;
}

void bitmap_file_store(struct vs_bitmap *b, uint64_t word, uint64_t value)
{
    uint64_t number = word / BITMAP_BLOCK_WORDS + 1, index = word % BITMAP_BLOCK_WORDS;
    struct bit_block *p = block_of(b, number - 1);
    assert(word < b->words);
    if (p->number == 0)
        fill_block(p, number);
    uint64_t sum = p->checksum ^ part(number, index, p->word[index]) ^ part(number, index, value);
    __atomic_store_n(&p->word[index], value, __ATOMIC_RELAXED);
    __atomic_store_n(&p->checksum, sum, __ATOMIC_RELAXED);
}

uint64_t bitmap_file_word(const struct vs_bitmap *b, uint64_t word)
{
    const struct bit_block *p = block_of(b, word / BITMAP_BLOCK_WORDS);
    uint64_t last = b->regions % 64, value = p->number ? p->word[word % BITMAP_BLOCK_WORDS] : ~0ull;
    return word == b->words - 1 && last ? value & ~(~0ull << last) : value;
}

bool bitmap_file_lost(const struct vs_bitmap *b)
{
    return guest_memory_watched_lost(b->sigbus_slot);
}

/* Every block as what it has to be taken for. */
static void verify_blocks(struct vs_bitmap *b)
{
    for (uint64_t i = 0; i < b->bit_blocks; i++) {
        struct bit_block *p = block_of(b, i);
        if (p->number != 0 && (p->number != i + 1 || p->checksum != checksum_of(p, i + 1)))
            fill_block(p, i + 1);
    }
}

static void forget_blocks(struct vs_bitmap *b)
{
    for (uint64_t i = 0; i < b->bit_blocks; i++)
        if (block_of(b, i)->number)
            fill_block(block_of(b, i), i + 1);
}

static void set_range(struct vs_bitmap *b, uint64_t offset, uint64_t length)
{
    uint64_t last = (offset + length - 1) / b->shape.region_bytes;
    for (uint64_t r = offset / b->shape.region_bytes; r <= last;) {
        uint64_t word = r / 64, upto = last / 64 == word ? last % 64 : 63;
        bitmap_file_store(b, word, bitmap_file_word(b, word) | (~0ull << r % 64 & ~0ull >> (63 - upto)));
        r = (word + 1) * 64;
    }
}

/* ---- the activity log -------------------------------------------------- */

static uint64_t sector_count(const struct vs_bitmap *b)
{
    return b->log_bytes / sizeof(struct log_sector);
}

static uint64_t sector_sum(const struct log_sector *s, uint64_t place)
{
    return mix(chain(&s->sequence, sizeof *s - 8) + place);
}

uint64_t *bitmap_file_log_extents(struct vs_bitmap *b)
{
    return b->log_words + 1;
}

uint64_t bitmap_file_log_seal(struct vs_bitmap *b, uint64_t count)
{
    uint64_t words = 1 + count;
    assert(count <= b->shape.al_extents);
    b->log_words[0] = count;
    memset(b->log_buffer, 0, b->log_bytes);
    for (uint64_t i = 0; i < sector_count(b); i++) {
        struct log_sector *s = (struct log_sector *)b->log_buffer + i;
        uint64_t from = i * LOG_SECTOR_WORDS, left = from < words ? words - from : 0;
        memcpy(s->word, b->log_words + from, 8 * (left < LOG_SECTOR_WORDS ? left : LOG_SECTOR_WORDS));
        s->sequence = b->log_sequence + 1;
        s->checksum = sector_sum(s, i);
    }
    return log_offset(b, b->log_sequence + 1);
}

void bitmap_file_log_written(struct vs_bitmap *b)
{
    b->log_sequence++;
}

enum copy_state { COPY_WHOLE, COPY_TORN, COPY_DAMAGED };

static enum copy_state look_at_copy(const struct vs_bitmap *b, uint64_t parity, const struct log_sector **copy)
{
    const struct log_sector *s = (const struct log_sector *)(const void *)(b->map + log_offset(b, parity));
    enum copy_state state = COPY_WHOLE;
    *copy = s;
    for (uint64_t i = 0; i < sector_count(b); i++) {
        if (s[i].checksum != sector_sum(&s[i], i) || s[i].sequence % 2 != parity)
            return COPY_DAMAGED;
        if (s[i].sequence != s->sequence)
            state = COPY_TORN;
    }
    return s->word[0] > b->shape.al_extents ? COPY_DAMAGED : state;
}

/* The copy that tells where bits may be missing; NULL: that cannot be told. */
static const struct log_sector *newest_copy(const struct vs_bitmap *b)
{
    const struct log_sector *even, *odd;
    enum copy_state even_state = look_at_copy(b, 0, &even), odd_state = look_at_copy(b, 1, &odd);
    if (even_state == COPY_DAMAGED || odd_state == COPY_DAMAGED || (even_state != COPY_WHOLE && odd_state != COPY_WHOLE))
        return NULL;
    if (even_state != COPY_WHOLE || (odd_state == COPY_WHOLE && odd->sequence > even->sequence))
        return odd;
    return even;
}

/* After another boot: what the log names may have lost bits. */
static void apply_log(struct vs_bitmap *b, const struct log_sector *copy)
{
    uint64_t size = b->shape.al_extent_bytes, capacity = b->shape.capacity_bytes, count = copy->word[0];
    for (uint64_t i = 1; i <= count; i++) {
        uint64_t extent = copy[i / LOG_SECTOR_WORDS].word[i % LOG_SECTOR_WORDS];
        if (extent >= divide_up(capacity, size)) {
            forget_blocks(b); /* it cannot be ours, whatever its checksum says */
            return;
        }
        set_range(b, extent * size, capacity - extent * size < size ? capacity - extent * size : size);
    }
}

/* ---- opening and closing ----------------------------------------------- */

void bitmap_file_put_header(struct vs_bitmap *b, bool clean)
{
    struct header *h = header_of(b);
    struct header next = {.version = VERSION, .clean = clean, .shape = b->shape, .names = b->names};
    memcpy(next.magic, magic, sizeof magic);
    next.checksum = chain(&next, sizeof next - 8);
    memcpy(h, &next, sizeof next);
}

/* What the header alone tells. */
static int judge_header(const struct header *h, const struct vs_bitmap_shape *shape, const struct vs_bitmap_names *names)
{
    static const struct header blank;
    if (memcmp(h, &blank, sizeof blank) == 0)
        return VS_BITMAP_BLANK;
    if (memcmp(h->magic, magic, sizeof magic) != 0)
        return VS_BITMAP_FOREIGN;
    if (h->version != VERSION)
        return VS_BITMAP_VERSION;
    if (h->checksum != chain(h, sizeof *h - 8))
        return VS_BITMAP_DAMAGED;
    if (!names->known || (memcmp(h->names.uuid, names->former_uuid, 16) != 0 &&
                          memcmp(h->names.former_uuid, names->former_uuid, 16) != 0))
        return VS_BITMAP_STALE;
    if (memcmp(h->names.pair, names->pair, sizeof names->pair) != 0)
        return VS_BITMAP_OTHER_DISKS;
    if (h->shape.capacity_bytes != shape->capacity_bytes || h->shape.region_bytes != shape->region_bytes)
        return VS_BITMAP_OTHER_SHAPE;
    return VS_BITMAP_VALID;
}

static bool shape_ok(const struct vs_bitmap_shape *s)
{
    return s->capacity_bytes > 0 && s->capacity_bytes <= 1ull << 62 && s->region_bytes >= 512 &&
           (s->region_bytes & (s->region_bytes - 1)) == 0 && s->al_extents >= 1 &&
           s->al_extents <= VS_AL_EXTENTS_MAX && s->al_extent_bytes >= VS_AL_EXTENT_BYTES_MIN &&
           (s->al_extent_bytes & (s->al_extent_bytes - 1)) == 0;
}

static int sync_file(const struct vs_bitmap *b)
{
    if (fdatasync(b->fd) < 0)
        return -errno;
    return bitmap_file_lost(b) ? -EIO : 0;
}

static void unmap(struct vs_bitmap *b)
{
    if (b->map) {
        guest_memory_unwatch(b->sigbus_slot);
        munmap(b->map, b->bytes);
    }
    free(b->log_words);
    free(b->log_buffer);
    b->map = NULL;
}

/* All of it has room on the disk: no store finds it full (file systems that write elsewhere each time: see SIGBUS). */
static int map_file(struct vs_bitmap *b)
{
    int rc = posix_fallocate(b->fd, 0, (off_t)b->bytes);
    if (rc)
        return -rc;
    b->log_buffer = aligned_alloc(BITMAP_BLOCK_BYTES, b->log_bytes);
    b->log_words = calloc(1 + (size_t)b->shape.al_extents, 8);
    if (!b->log_buffer || !b->log_words)
        return -ENOMEM;
    b->map = mmap(NULL, b->bytes, PROT_READ | PROT_WRITE, MAP_SHARED, b->fd, 0);
    if (b->map == MAP_FAILED) {
        b->map = NULL;
        return -errno;
    }
    (void)mlock(b->map, b->bytes); /* a page that is there is stored to at once; where it is not allowed, it is read again */
    guest_memory_catch_sigbus();
    b->sigbus_slot = guest_memory_watch(b->map, b->bytes);
    return b->sigbus_slot < 0 ? -ENOSPC : 0;
}

/* Both copies, so that none of a former geometry, or of another pair, is ever taken for a later one. */
static int write_empty_log(struct vs_bitmap *b)
{
    b->log_sequence = 0;
    for (int copy = 0; copy < 2; copy++) {
        off_t at = (off_t)bitmap_file_log_seal(b, 0);
        errno = EIO; /* of a short write */
        if (pwrite(b->fd, b->log_buffer, b->log_bytes, at) != (ssize_t)b->log_bytes)
            return -errno;
        bitmap_file_log_written(b);
    }
    return 0;
}

/* The header says that the bits are of this pair: what they are after the log was applied, and synced. */
static int take_over(struct vs_bitmap *b, const struct vs_bitmap_names *names)
{
    const struct header found = *header_of(b);
    const struct log_sector *copy;
    bool trusted = found.clean || memcmp(found.names.boot, names->boot, sizeof names->boot) == 0;
    verify_blocks(b);
    b->shape.al_extents = found.shape.al_extents;
    b->shape.al_extent_bytes = found.shape.al_extent_bytes;
    measure(b);
    copy = b->shape.al_extents && shape_ok(&b->shape) ? newest_copy(b) : NULL;
    if (!trusted && copy)
        apply_log(b, copy);
    else if (!trusted)
        forget_blocks(b);
    return sync_file(b);
}

static int begin_anew(struct vs_bitmap *b)
{
    memset(header_of(b), 0, sizeof(struct header)); /* it means nothing until bitmap_file_put_header() */
    forget_blocks(b);
    return sync_file(b);
}

/* The log of another run may have been longer or shorter than that of this one: *bytes is what either needs. */
static int check_size(const struct vs_bitmap *b, const struct header *h, uint64_t found_bytes, uint64_t *bytes)
{
    struct vs_bitmap then = *b;
    if (!shape_ok(&h->shape))
        return VS_BITMAP_DAMAGED;
    then.shape = h->shape;
    measure(&then);
    if (found_bytes < then.bytes)
        return VS_BITMAP_SHORT;
    *bytes = then.bytes > b->bytes ? then.bytes : b->bytes;
    return VS_BITMAP_VALID;
}

/* A verdict or a negative errno. */
static int look(struct vs_bitmap *b, const struct vs_bitmap_names *names, uint64_t *bytes)
{
    static const struct header blank;
    struct header h = blank;
    struct stat st;
    int verdict;
    if (fstat(b->fd, &st) < 0)
        return -errno;
    if (!S_ISREG(st.st_mode))
        return VS_BITMAP_FOREIGN;
    if (pread(b->fd, &h, sizeof h, 0) < 0)
        return -errno;
    verdict = judge_header(&h, &b->shape, names);
    return verdict == VS_BITMAP_VALID ? check_size(b, &h, (uint64_t)st.st_size, bytes) : verdict;
}

static int open_file(struct vs_bitmap *b, const struct vs_bitmap_names *names, int verdict, uint64_t bytes)
{
    const struct vs_bitmap_shape wanted = b->shape;
    int rc;
    b->bytes = bytes;
    if ((rc = map_file(b)) < 0)
        return rc;
    rc = verdict == VS_BITMAP_VALID ? take_over(b, names) : begin_anew(b);
    b->shape = wanted;
    measure(b);
    b->bytes = bytes;
    if (rc < 0)
        return rc;
    if (verdict == VS_BITMAP_VALID) {
        b->names = *names;
        bitmap_file_put_header(b, false);
        if ((rc = sync_file(b)) < 0)
            return rc;
    }
    if ((rc = write_empty_log(b)) < 0)
        return rc;
    return sync_file(b);
}

int vs_bitmap_open(int fd, const struct vs_bitmap_shape *shape, const struct vs_bitmap_names *names, vs_bitmap **out)
{
    struct vs_bitmap *b;
    uint64_t bytes;
    int verdict, rc;
    if (!shape_ok(shape))
        return -EINVAL;
    b = calloc(1, sizeof *b);
    if (!b)
        return -ENOMEM;
    b->fd = fd;
    b->shape = *shape;
    b->sigbus_slot = -1;
    measure(b);
    bytes = b->bytes;
    verdict = look(b, names, &bytes);
    rc = verdict == VS_BITMAP_FOREIGN || verdict < 0 ? verdict : open_file(b, names, verdict, bytes);
    if (rc != 0) {
        unmap(b);
        free(b);
        return rc;
    }
    *out = b;
    return verdict;
}

int vs_bitmap_close(vs_bitmap *b, int clean)
{
    int rc = 0;
    if (clean && (rc = sync_file(b)) == 0) {
        bitmap_file_put_header(b, true);
        rc = sync_file(b);
    }
    unmap(b);
    close(b->fd);
    free(b);
    return rc;
}
