/* SPDX-License-Identifier: Apache-2.0
 *
 * The testing library as the tests see it: kinds of disks of their own, which
 * come to the engine by the door that any kind from outside takes. It is built
 * beside the extension and never installed. Plain declarations, as in shim_api.h,
 * which cffi parses before this file.
 */

/* First of all: the core's side of the door. */
void vs_testing_begin(const struct vs_disk_services *services);

/* A disk in memory with a volatile cache: writes and zeroes are kept apart
 * until a flush that began after they completed has succeeded; a power cut
 * keeps any subset of them. Faults and held requests by kind of operation.
 * All of these but vs_test_disk act at once and may be called from any thread.
 */
vs_disk *vs_test_disk(uint64_t bytes, uint32_t logical_block_bytes);

/* Makes requests of this kind wait (before they take effect) until released. */
void vs_test_disk_hold(vs_disk *disk, uint32_t op, int hold);
/* Lets at most count held requests of this kind go; returns how many. */
int vs_test_disk_release(vs_disk *disk, uint32_t op, int count);
int vs_test_disk_held(vs_disk *disk, uint32_t op);

/* Reads that touch one of these blocks fail with EIO, each until it is written again. */
void vs_test_disk_spoil(vs_disk *disk, uint64_t offset, uint64_t length);

/* The requests after the next "skip" of this kind fail with errno "error" (or,
 * error 0, transfer only half of what was asked, at least a block, so that
 * the continuation is exercised); count of them; count -1: for ever. */
void vs_test_disk_fault(vs_disk *disk, uint32_t op, int error, int skip, int count);

/* What is on the disk: as the guest reads it (cut 0), or after a power cut
 * that keeps an unflushed block only if the hash of (seed, its number) has its
 * low bit set (cut 1), or keeps none of them (cut 2). */
int vs_test_disk_read(vs_disk *disk, uint64_t offset, uint64_t length, int cut, uint64_t seed, void *out);
/* Writes durably, past the engine: the initial content. */
int vs_test_disk_load(vs_disk *disk, uint64_t offset, uint64_t length, const void *bytes);
/* Before the engine has it: behave as a file behind the page cache does, whose failed flush stays failed. */
void vs_test_disk_buffered(vs_disk *disk);
/* Before the engine has it: it can be cut off (which forgets nothing), and is far. */
void vs_test_disk_remote(vs_disk *disk);
/* Its connection is lost: what is held fails and is kept, to land later; what is submitted from here on fails,
 * until it is connected again, for the next engine that gets it. forget_seed not 0: of what was not flushed, what
 * cut 1 of vs_test_disk_read would keep with this seed is all that is left. */
void vs_test_disk_cut(vs_disk *disk, uint64_t forget_seed);
void vs_test_disk_connect(vs_disk *disk);
/* At most so many of the changes that were under way then are over: they are carried out now, or never. How many. */
int vs_test_disk_land(vs_disk *disk, int count, int carried_out);
/* Operations completed so far, by kind. */
uint64_t vs_test_disk_count(vs_disk *disk, uint32_t op);
/* A reference of the test's own keeps the disk's memory after the engine closed it; drop it last. */
void vs_test_disk_keep(vs_disk *disk);
void vs_test_disk_drop(vs_disk *disk);

/* One ordered record of what takes effect on several test disks and what becomes of a bitmap's file, with the
 * test's own notes in between: every prefix of it is a power cut (tests/powercut). Free it last. */
typedef struct vs_test_record vs_test_record;

enum vs_test_moment_kind {
    VS_MOMENT_WRITE = 1,  /* disk, offset, length, data; stamp: the disk's, which grows */
    VS_MOMENT_ZERO,       /* disk, offset, length, stamp */
    VS_MOMENT_FLUSHED,    /* disk; stamp: what took effect up to it is durable */
    VS_MOMENT_LOADED,     /* vs_test_disk_load: disk, offset, length, data */
    VS_MOMENT_FORGOT,     /* vs_test_disk_cut: disk, offset, length, data: what is left of it, durably */
    VS_MOMENT_SPOILT,     /* vs_test_disk_spoil: disk, offset, length */
    VS_MOMENT_PAGE,       /* of the bitmap's file: offset, data (4096 bytes) */
    VS_MOMENT_SYNC_BEGUN, /* of the bitmap's file */
    VS_MOMENT_SYNCED,     /* stamp: the place of its beginning; what was there then is durable */
    VS_MOMENT_NOTE        /* stamp: the test's number */
};

struct vs_test_moment {
    uint32_t kind;
    uint32_t disk;
    uint64_t offset;
    uint64_t length;
    uint64_t stamp;
    uint8_t *data;
};

vs_test_record *vs_test_record_new(void);
void vs_test_record_free(vs_test_record *record);
/* Before an engine has the disk, or while it is idle. NULL: no more. */
void vs_test_disk_record(vs_disk *disk, vs_test_record *record, uint32_t number);
/* The pages of this file from here on (once; it must not shrink). 0, or -1: it is no number of pages. */
int vs_test_record_file(vs_test_record *record, int fd);
/* Notes that a sync of the file begins, or ended well. */
uint64_t vs_test_record_sync_begun(vs_test_record *record);
void vs_test_record_synced(vs_test_record *record, uint64_t begun);
/* Before an engine has the bitmap: its syncs are recorded too. */
void vs_test_record_bitmap(vs_test_record *record, vs_bitmap *bitmap);
/* Before an engine has the bitmap: so few extents are active at once, so that a small disk's have to give way. */
void vs_test_bitmap_slots(vs_bitmap *bitmap, uint32_t slots);
void vs_test_record_note(vs_test_record *record, uint64_t number);
/* The entry at this place, 1; or 0: there is none yet. Its data stays until the record is freed. */
int vs_test_record_moment(vs_test_record *record, uint64_t place, struct vs_test_moment *out);

/* A disk that another process has, at the other end of this connected socket. Owns fd. */
vs_disk *vs_served_disk(int fd, uint64_t bytes, uint32_t block_bytes);
