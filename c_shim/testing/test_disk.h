/* SPDX-License-Identifier: Apache-2.0
 *
 * What the two files of the test disk share: test_disk.c is the disk, as the
 * engine uses it; test_disk_control.c what a test does to it. All but the struct
 * vs_disk, and all of these functions, are guarded by "lock".
 */
#ifndef VS_TEST_DISK_H
#define VS_TEST_DISK_H

#include <pthread.h>

#include "disk.h"
#include "test_record.h"

struct version {
    struct version *older;
    uint64_t stamp;
    bool zero; /* then there is no data[] */
    bool lost; /* a buffered disk's flush failed with it: no later flush writes it */
    uint8_t data[];
};

struct block {
    struct list dirty_link; /* in "dirty" while there are versions */
    struct version *latest; /* NULL: the durable content is the latest */
    bool spoilt;            /* cannot be read until it is written */
};

struct fault {
    int error; /* 0: a short transfer */
    int skip;
    int count; /* still to fail; -1: for ever; 0: none */
};

struct held {
    struct disk_io **io;
    int count, capacity;
    bool on;
};

/* A change that was under way when the connection was lost, and is not carried out yet. */
struct late {
    struct list link;
    uint64_t offset, length;
    bool zero; /* then there is no data[] */
    uint8_t data[];
};

struct test_disk {
    struct vs_disk disk; /* first: the two share an address */
    pthread_mutex_t lock;
    int references;
    uint64_t stamp; /* of the last operation that took effect */
    uint8_t *durable;
    struct block *blocks;
    struct list dirty;
    struct held held[VS_DISK_KINDS];
    struct fault fault[VS_DISK_KINDS];
    bool lost; /* so is the connection: what is submitted is never sent */
    struct list late;
    uint64_t completed[VS_DISK_KINDS];
    vs_test_record *record; /* NULL: none */
    uint32_t record_number; /* what it is called there */
};

static inline struct test_disk *test_disk_of(struct vs_disk *disk)
{
    return (struct test_disk *)disk;
}

extern const struct disk_ops test_disk_ops;

/* A newer version of the block; NULL: zeroes. */
void test_disk_add_version(struct test_disk *t, uint64_t number, const uint8_t *data);
/* What this version of a block (NULL: the durable content) holds. */
void test_disk_fill(struct test_disk *t, uint8_t *to, uint64_t number, const struct version *v);
/* The versions from this one on. */
void test_disk_free_chain(struct version *v);
/* What a power cut leaves of a block: any of its versions or, NULL, the durable content. */
const struct version *test_disk_survivor(const struct block *b, uint64_t number, uint64_t seed);
/* The connection is lost; the request may take effect later. */
void test_disk_keep_for_later(struct test_disk *t, const struct disk_io *io);
/* The request takes effect; its result. */
int test_disk_take_effect(struct test_disk *t, struct disk_io *io);

#endif
