/* SPDX-License-Identifier: Apache-2.0
 *
 * An RBD disk with its two threads, on an image in memory that stands where librbd's would: its own threads answer, in
 * any order, and some answers are errors. What is answered is given back at once, as librbd gives back its completions.
 */
#include <pthread.h>
#include <rados/librados.h>
#include <rbd/librbd.h>

#include "rbd_disk.h"
#include "remote_rig.h"

#define ANSWERING 3
#define UNDER_WAY 64
#define WRONG 7 /* so many operations lie between two errors, if there are to be any */

struct aio {
    rbd_callback_t over;
    void *arg;
    uint32_t kind;
    uint64_t offset, length;
    const struct iovec *iov;
    int iov_count;
    ssize_t result;
    uint8_t *taken; /* of a write: librbd copies what it is given */
};

static struct image {
    uint8_t *bytes;
    pthread_t thread[ANSWERING];
    pthread_mutex_t lock; /* guards the rest */
    pthread_cond_t came;
    struct aio *under_way[UNDER_WAY];
    unsigned count, answered, closed, wrong_every;
    unsigned unlocked; /* so many are refused, reads too: the lock is taken anew */
    bool gives_up;     /* an operation that takes too long ends, and may be carried out all the same */
    uint64_t chance;
    bool ending;
} image = {.lock = PTHREAD_MUTEX_INITIALIZER, .came = PTHREAD_COND_INITIALIZER, .chance = 3};

/* ---- the image's threads ------------------------------------------------------------- */

static void carry_out(struct aio *a)
{
    uint8_t *at = image.bytes + a->offset;
    a->result = 0;
    switch (a->kind) {
    case VS_DISK_READ:
        for (int i = 0; i < a->iov_count; at += a->iov[i++].iov_len)
            memcpy(a->iov[i].iov_base, at, a->iov[i].iov_len);
        a->result = (ssize_t)a->length;
        break;
    case VS_DISK_WRITE:
        memcpy(at, a->taken, a->length);
        break;
    case VS_DISK_ZERO:
        memset(at, 0, a->length);
        break;
    }
}

static void *answer(void *arg)
{
    (void)arg;
    pthread_mutex_lock(&image.lock);
    while (!image.ending) {
        if (!image.count) {
            pthread_cond_wait(&image.came, &image.lock);
            continue;
        }
        unsigned which = (unsigned)(test_random(&image.chance) % image.count);
        struct aio *a = image.under_way[which];
        image.under_way[which] = image.under_way[--image.count];
        bool unlocked = image.unlocked > 0; /* it is not carried out */
        bool wrong = image.wrong_every && ++image.answered % image.wrong_every == 0;
        image.unlocked -= unlocked;
        pthread_cond_broadcast(&image.came);
        pthread_mutex_unlock(&image.lock);
        if (!unlocked)
            carry_out(a); /* ranges that are under way do not overlap */
        if (wrong)
            a->result = -ESHUTDOWN;
        if (unlocked)
            a->result = -EROFS;
        a->over(a, a->arg);
        pthread_mutex_lock(&image.lock);
    }
    pthread_mutex_unlock(&image.lock);
    return NULL;
}

static int give(rbd_completion_t completion, uint32_t kind, uint64_t offset, uint64_t length, const struct iovec *iov,
                int iov_count)
{
    struct aio *a = completion;
    CHECK(!image.gives_up);
    a->kind = kind;
    a->offset = offset;
    a->length = length;
    a->iov = iov;
    a->iov_count = iov_count;
    if (kind == VS_DISK_WRITE) {
        uint8_t *to = a->taken = malloc(length);
        for (int i = 0; i < iov_count; to += iov[i++].iov_len)
            memcpy(to, iov[i].iov_base, iov[i].iov_len);
    }
    pthread_mutex_lock(&image.lock);
    while (image.count == UNDER_WAY)
        pthread_cond_wait(&image.came, &image.lock);
    image.under_way[image.count++] = a;
    pthread_cond_broadcast(&image.came);
    pthread_mutex_unlock(&image.lock);
    return 0;
}

/* ---- in place of librbd and librados ----------------------------------------------------- */

int rbd_aio_create_completion(void *arg, rbd_callback_t over, rbd_completion_t *out)
{
    struct aio *a = calloc(1, sizeof *a);
    a->over = over;
    a->arg = arg;
    *out = a;
    return 0;
}

ssize_t rbd_aio_get_return_value(rbd_completion_t completion)
{
    return ((struct aio *)completion)->result;
}

void rbd_aio_release(rbd_completion_t completion)
{
    free(((struct aio *)completion)->taken);
    free(completion);
}

static uint64_t length_of(const struct iovec *iov, int count)
{
    uint64_t length = 0;
    for (int i = 0; i < count; i++)
        length += iov[i].iov_len;
    return length;
}

int rbd_aio_readv(rbd_image_t handle, const struct iovec *iov, int count, uint64_t offset, rbd_completion_t completion)
{
    CHECK(handle == &image);
    return give(completion, VS_DISK_READ, offset, length_of(iov, count), iov, count);
}

int rbd_aio_writev(rbd_image_t handle, const struct iovec *iov, int count, uint64_t offset, rbd_completion_t completion)
{
    CHECK(handle == &image);
    return give(completion, VS_DISK_WRITE, offset, length_of(iov, count), iov, count);
}

int rbd_aio_write_zeroes(rbd_image_t handle, uint64_t offset, size_t length, rbd_completion_t completion,
                         int zero_flags, int op_flags)
{
    CHECK(handle == &image && op_flags == 0 && (zero_flags & ~RBD_WRITE_ZEROES_FLAG_THICK_PROVISION) == 0);
    return give(completion, VS_DISK_ZERO, offset, length, NULL, 0);
}

int rbd_aio_flush(rbd_image_t handle, rbd_completion_t completion)
{
    CHECK(handle == &image);
    return give(completion, VS_DISK_FLUSH, 0, 0, NULL, 0);
}

int rbd_diff_iterate2(rbd_image_t handle, const char *from, uint64_t at, uint64_t length, uint8_t parent,
                      uint8_t whole_objects, int (*tell)(uint64_t, size_t, int, void *), void *arg)
{
    CHECK(handle == &image && from == NULL && parent == 1 && whole_objects == 0);
    return tell(at, length, 1, arg);
}

int rbd_get_size(rbd_image_t handle, uint64_t *bytes)
{
    CHECK(handle == &image);
    *bytes = RIG_BYTES;
    return 0;
}

int rbd_close(rbd_image_t handle)
{
    CHECK(handle == &image && image.gives_up); /* or a cluster that does not answer would keep it for ever */
    image.closed++;
    return 0;
}

int rados_conf_set(rados_t cluster, const char *option, const char *value)
{
    CHECK(cluster == &image);
    if (strcmp(option, "rados_osd_op_timeout") == 0)
        image.gives_up = strcmp(value, "0") != 0;
    return 0;
}

void rados_ioctx_destroy(rados_ioctx_t pool)
{
    CHECK(pool == &image);
}

void rados_shutdown(rados_t cluster)
{
    CHECK(cluster == &image);
}

uint64_t rados_get_instance_id(rados_t cluster)
{
    CHECK(cluster == &image);
    return 4711;
}

/* ---- tests ------------------------------------------------------------------------------- */

static struct vs_disk *opened(void)
{
    image.gives_up = true; /* as it is while an image is opened */
    return vs_rbd_disk(&image, &image, &image, RIG_BYTES, 9);
}

static void at_work(void)
{
    rig_open(opened());
    CHECK(vs_rbd_has_client(4711));
    rig_work(8000);
    CHECK_EQUAL(rig.failed, 0);
    rig_close();
    CHECK(!vs_rbd_has_client(4711));
    CHECK_EQUAL(image.closed, 1);
}

static struct disk_io asked;

static void size_told(struct disk_io *io)
{
    CHECK(io->result == 0 && io->size_bytes == RIG_BYTES);
    asked.done = NULL;
}

static void its_size_is_asked_while_it_works(void)
{
    rig_open(opened());
    for (int i = 0; i < 50; i++) {
        rig_fill_slots();
        asked = (struct disk_io){.kind = VS_DISK_SIZE, .done = size_told};
        disk_submit(rig.disk, &asked);
        while (asked.done)
            rig_turn();
    }
    rig_drain();
    rig_close();
}

static void known_again(void)
{
    for (unsigned i = 0; i < SLOTS; i++) {
        memcpy(rig.slots[i].holds, image.bytes + (uint64_t)i * SLOT_BYTES, SLOT_BYTES);
        rig.slots[i].unsure = false;
    }
}

static void some_answers_are_errors(void)
{
    image.wrong_every = WRONG;
    rig_open(opened());
    rig_work(5000);
    CHECK(rig.failed > 0 && rig.failure == -ESHUTDOWN);
    rig_close();
    image.wrong_every = 0;
    known_again();
}

static void the_lock_is_taken_anew(void)
{
    rig_open(opened());
    for (unsigned i = 0; i < 3; i++) {
        image.unlocked = 100;
        rig_work(500);
        CHECK_EQUAL(rig.failed, 0);
        CHECK_EQUAL(image.unlocked, 0);
    }
    rig_close();
}

/* Without anybody having been shut out: an error in the end, and soon from then on. */
static void the_lock_is_gone_for_good(void)
{
    image.unlocked = UINT32_MAX;
    rig_open(opened());
    rig_work(500);
    CHECK(rig.failed > 0 && rig.failure == -EROFS);
    rig_close();
    image.unlocked = 0;
    known_again();
}

static void opened_and_closed_many_times(void)
{
    for (unsigned i = 0; i < 100; i++) {
        rig_open(opened());
        rig_work(i % 4 * 10);
        rig_close();
    }
}

static void closed_before_an_engine_has_it(void)
{
    disk_close(opened());
    CHECK(!vs_rbd_has_client(4711));
}

int main(void)
{
    image.bytes = calloc(1, RIG_BYTES);
    rig.chance = 1;
    CHECK_EQUAL(vs_rbd_begin(vs_disk_services()), 0);
    for (int i = 0; i < ANSWERING; i++)
        CHECK(pthread_create(&image.thread[i], NULL, answer, NULL) == 0);
    test("at work", at_work);
    test("its size is asked while it works", its_size_is_asked_while_it_works);
    test("some answers are errors", some_answers_are_errors);
    test("the lock is taken anew", the_lock_is_taken_anew);
    test("the lock is gone for good", the_lock_is_gone_for_good);
    test("opened and closed many times", opened_and_closed_many_times);
    test("closed before an engine has it", closed_before_an_engine_has_it);
    pthread_mutex_lock(&image.lock);
    image.ending = true;
    pthread_cond_broadcast(&image.came);
    pthread_mutex_unlock(&image.lock);
    for (int i = 0; i < ANSWERING; i++)
        pthread_join(image.thread[i], NULL);
    free(image.bytes);
    rig_free();
    return tests_end();
}
