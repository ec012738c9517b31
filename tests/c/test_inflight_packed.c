/* SPDX-License-Identifier: Apache-2.0
 *
 * The record of a packed ring's requests in flight. A process is run one
 * instruction at a time, and after each that has changed what it shares, a
 * recovery from a copy of that must find each chain exactly once: shown as used,
 * to be taken up again, or still in the ring.
 */
#include "inflight_packed.h"

#include <signal.h>
#include <sys/ptrace.h>
#include <sys/wait.h>

#include "packed_driver.h"
#include "virtqueue.h"

#define NUM 8u
/* Of a record: its head, and more entries than so few descriptors take. */
#define WRITTEN_BYTES offsetof(struct inflight_packed, desc[2 * NUM])
#define DATA (GUEST_ADDR + 0x8000)

static struct inflight_packed record;
static struct inflight_packed_state state;
static struct inflight_packed_chain found[VS_MAX_QUEUE_SIZE];
static struct vring_packed_desc no_ring[NUM];

static void unused_record(void)
{
    uint16_t used = WRAP | 5;
    memset(&record, 0, sizeof record);
    record.desc[3].inflight = 1; /* not begun: what else is there does not count */
    CHECK_EQUAL(inflight_packed_recover(&record, &state, NUM, no_ring, &used, found), 0);
    CHECK_EQUAL(used, WRAP | 5);
    CHECK_EQUAL(record.version, INFLIGHT_VERSION);
    CHECK_EQUAL(record.desc_num, VS_MAX_QUEUE_SIZE);
    CHECK_EQUAL(record.used.used_idx, 5);
    CHECK_EQUAL(record.used.old_used_idx, 5);
    CHECK_EQUAL(record.used.used_wrap_counter, 1);
    CHECK_EQUAL(record.used.old_used_wrap_counter, 1);
    for (unsigned i = 0; i < VS_MAX_QUEUE_SIZE; i++)
        CHECK(record.desc[i].next == i + 1 && record.desc[i].inflight == 0);
}

static uint16_t take(unsigned count, unsigned id, uint16_t *last)
{
    struct vring_packed_desc d[NUM];
    for (unsigned i = 0; i < count; i++)
        d[i] = (struct vring_packed_desc){.addr = DATA + i, .len = i, .id = (uint16_t)id, .flags = (uint16_t)i};
    return inflight_packed_taken(&record, &state, count, d, last);
}

/* The fields as the specification has them, for whoever else reads them. */
static void fields(void)
{
    uint16_t last, other_last, used = 0;
    unused_record();
    CHECK_EQUAL(take(3, 6, &last), 0);
    CHECK_EQUAL(last, 2);
    CHECK(record.desc[0].inflight == 1 && record.desc[0].num == 3 && record.desc[0].last == 2 &&
          record.desc[0].counter == 0);
    CHECK(record.desc[2].addr == DATA + 2 && record.desc[2].len == 2 && record.desc[2].id == 6 &&
          record.desc[2].flags == 2);
    CHECK_EQUAL(take(1, 4, &other_last), 3);
    CHECK_EQUAL(record.desc[3].counter, 1);
    CHECK(record.heads.free_head == 4 && record.heads.old_free_head == 4);
    inflight_packed_answered(&record, &state, 0, last);
    CHECK_EQUAL(record.desc[2].next, 4);
    inflight_packed_showing(&record, &state, WRAP | 7);
    CHECK(record.heads.free_head == 0 && record.heads.old_free_head == 4);
    CHECK(record.used.used_idx == 7 && record.used.old_used_idx == 5);
    inflight_packed_cleared(&record, 0);
    inflight_packed_shown(&record, &state, WRAP | 7);
    CHECK(record.heads.old_free_head == 0 && record.used.old_used_idx == 7 && record.desc[0].inflight == 0);
    CHECK_EQUAL(inflight_packed_recover(&record, &state, NUM, no_ring, &used, found), 1);
    CHECK_EQUAL(used, WRAP | 7);
    CHECK(found[0].id == 4 && found[0].num == 1 && found[0].entry == 3);
    CHECK_EQUAL(state.counter, 2);
    CHECK_EQUAL(inflight_packed_desc_at(&record, 3).addr, DATA);
}

/* ---- killed at any instruction ---------------------------------------------- */

struct shared {
    struct inflight_packed record;
    struct guest guest;
    struct guest_memory memory;
    struct virtqueue vq;
    struct packed_driver driver; /* as it was when the process began */
    unsigned all;                /* IDs that are available or at work, as bits */
};

static void on_gone(struct guest_memory *m, uint64_t token)
{
    (void)m, (void)token;
}

static void put(struct packed_driver *d, unsigned count, unsigned id)
{
    struct vring_packed_desc chain[NUM];
    for (unsigned i = 0; i < count; i++)
        chain[i] = (struct vring_packed_desc){.addr = DATA + 0x100 * id + i, .len = count, .flags = VRING_DESC_F_WRITE};
    packed_put(d, chain, count, id);
}

static struct shared *begin_ring(uint16_t at)
{
    struct shared *s = mmap(NULL, sizeof *s, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    CHECK(s != MAP_FAILED);
    s->guest = guest_make(1 << 16);
    s->driver = packed_make(&s->guest, NUM, at);
    CHECK_EQUAL(guest_memory_init(&s->memory, on_gone), 0);
    struct vs_region r = guest_region(&s->guest, 0, s->guest.bytes);
    CHECK_EQUAL(guest_memory_set(&s->memory, &r, 1), 0);
    virtqueue_reset(&s->vq);
    CHECK_EQUAL(virtqueue_choose_layout(&s->vq, true), 0);
    s->vq.num = NUM;
    s->vq.desc_user = USER_ADDR + s->driver.desc_at;
    s->vq.avail_user = USER_ADDR + s->driver.driver_at;
    s->vq.used_user = USER_ADDR + s->driver.device_at;
    s->vq.record = &s->record;
    CHECK(virtqueue_map(&s->vq, s->memory.current));
    CHECK_EQUAL(virtqueue_start(&s->vq, at), 0);
    return s;
}

static void end(struct shared *s)
{
    virtqueue_reset(&s->vq);
    guest_memory_free(&s->memory);
    guest_end(&s->guest);
    munmap(s, sizeof *s);
}

static void note(unsigned *seen, unsigned id)
{
    CHECK(id < NUM);
    CHECK(!(*seen & 1u << id));
    *seen |= 1u << id;
}

/* The guest, which is not killed, takes what is used and fills the ring again with single descriptors. */
static void refill(struct packed_driver *d, unsigned *all, unsigned *seen, unsigned room)
{
    for (unsigned id = 0; id < NUM && room > 0; id++) {
        if ((*all & 1u << id) && !(*seen & 1u << id))
            continue; /* at work */
        put(d, 1, id);
        *all |= 1u << id;
        *seen &= ~(1u << id);
        room--;
    }
    packed_publish(d);
}

static unsigned still_available(const struct vring_packed_desc *ring, uint16_t at, unsigned *seen)
{
    unsigned steps = 0;
    while (steps < NUM && (ring[at & (WRAP - 1)].flags & (PACKED_AVAIL | PACKED_USED)) == packed_available(at)) {
        while (ring[at & (WRAP - 1)].flags & VRING_DESC_F_NEXT) {
            at = packed_step(NUM, at, 1);
            steps++;
        }
        note(seen, ring[at & (WRAP - 1)].id);
        at = packed_step(NUM, at, 1);
        steps++;
    }
    return steps;
}

/* What a next process finds, from copies of what this one has left. */
static void check_recovery(const struct shared *s, bool refilled)
{
    static struct inflight_packed copy;
    struct vring_packed_desc ring[NUM];
    struct packed_driver d = s->driver;
    unsigned seen = 0, room = 0, all = s->all, in_flight = 0, id;
    uint32_t written;
    uint16_t used = 0x7fff, again = 0x7fff;
    int n;
    memcpy(&copy, &s->record, sizeof copy);
    memcpy(ring, s->driver.desc, sizeof ring);
    d.desc = ring;
    while (packed_reap(&d, &id, &written)) {
        note(&seen, id);
        room += d.count[id];
    }
    if (refilled)
        refill(&d, &all, &seen, room);
    n = inflight_packed_recover(&copy, &state, NUM, ring, &used, found);
    CHECK(n >= 0);
    CHECK_EQUAL(used, d.used);
    for (int i = 0; i < n; i++) {
        note(&seen, found[i].id);
        CHECK(i == 0 || found[i].counter > found[i - 1].counter);
        in_flight += found[i].num;
        CHECK_EQUAL(inflight_packed_desc_at(&copy, found[i].entry).addr, DATA + 0x100 * found[i].id);
        CHECK_EQUAL(inflight_packed_desc_at(&copy, found[i].entry).len, found[i].num);
    }
    CHECK(in_flight <= NUM);
    still_available(ring, packed_step(NUM, used, in_flight), &seen);
    CHECK_EQUAL(seen, all);
    CHECK_EQUAL(inflight_packed_recover(&copy, &state, NUM, ring, &again, found), n); /* and killed again */
    CHECK_EQUAL(again, used);
}

/* Every state of the shared memory that "run" goes through. Returns how many there were. */
static unsigned watch(struct shared *s, void (*run)(struct virtqueue *vq))
{
    static struct inflight_packed before;
    struct vring_packed_desc ring_before[NUM];
    unsigned states = 0;
    int status;
    pid_t child = fork();
    CHECK(child >= 0);
    if (child == 0) {
        if (ptrace(PTRACE_TRACEME, 0, NULL, NULL) < 0)
            _exit(2);
        raise(SIGSTOP);
        run(&s->vq);
        _exit(0);
    }
    for (;;) {
        CHECK(waitpid(child, &status, 0) == child);
        if (WIFEXITED(status))
            break;
        CHECK(WIFSTOPPED(status) && (WSTOPSIG(status) == SIGTRAP || WSTOPSIG(status) == SIGSTOP));
        if (states == 0 || memcmp(&before, &s->record, WRITTEN_BYTES) != 0 ||
            memcmp(ring_before, s->driver.desc, sizeof ring_before) != 0) {
            memcpy(&before, &s->record, WRITTEN_BYTES);
            memcpy(ring_before, s->driver.desc, sizeof ring_before);
            check_recovery(s, false);
            check_recovery(s, true);
            states++;
        }
        CHECK(ptrace(PTRACE_SINGLESTEP, child, NULL, NULL) == 0);
    }
    CHECK_EQUAL(WEXITSTATUS(status), 0);
    return states;
}

static void take_next(struct virtqueue *vq)
{
    uint16_t chain;
    if (virtqueue_peek(vq, &chain) != 1)
        _exit(3);
    virtqueue_take(vq, chain);
}

static void batches(struct virtqueue *vq)
{
    take_next(vq); /* 2: three descriptors */
    take_next(vq); /* 5: one */
    virtqueue_push(vq, 5, 1);
    take_next(vq); /* 3: two, while 5 is not shown yet */
    virtqueue_show_used(vq);
    take_next(vq); /* 7: one */
    virtqueue_push(vq, 3, 1);
    virtqueue_push(vq, 2, 1);
    virtqueue_show_used(vq);
}

static void whole_ring(struct virtqueue *vq)
{
    take_next(vq);
    take_next(vq);
    virtqueue_push(vq, 1, 1);
    virtqueue_push(vq, 0, 1);
    virtqueue_show_used(vq);
}

static void killed_at_any_instruction(void)
{
    static const uint16_t places[] = {0, 6};
    for (size_t i = 0; i < sizeof places / sizeof places[0]; i++) {
        const uint16_t at = places[i];
        for (unsigned wrap = 0; wrap < 2; wrap++) {
            struct shared *s = begin_ring((uint16_t)(at | (wrap ? WRAP : 0)));
            put(&s->driver, 3, 2);
            put(&s->driver, 1, 5);
            put(&s->driver, 2, 3);
            put(&s->driver, 1, 7);
            packed_publish(&s->driver);
            s->all = 1u << 2 | 1u << 5 | 1u << 3 | 1u << 7;
            CHECK(watch(s, batches) > 40);
            end(s);
            s = begin_ring((uint16_t)(at | (wrap ? WRAP : 0)));
            put(&s->driver, 5, 0);
            put(&s->driver, 3, 1);
            packed_publish(&s->driver);
            s->all = 3;
            CHECK(watch(s, whole_ring) > 40);
            end(s);
        }
    }
}

/* A next process takes the chains up again from the record alone, answers them, and goes on in the ring. */
static void taken_up_again(void)
{
    struct shared *s = begin_ring(WRAP | 6);
    struct chain c;
    struct chain_segment segment;
    uint16_t id;
    unsigned reaped;
    uint32_t written;
    put(&s->driver, 3, 2);
    put(&s->driver, 1, 5);
    put(&s->driver, 2, 3);
    packed_publish(&s->driver);
    take_next(&s->vq);
    take_next(&s->vq);
    virtqueue_push(&s->vq, 5, 1);
    virtqueue_show_used(&s->vq);  /* over the first descriptor of 2 */
    virtqueue_push(&s->vq, 2, 1); /* and this is never shown */
    CHECK_EQUAL(virtqueue_start(&s->vq, 0x4321), -VS_BREACH_AVAILABLE_INDEX);
    CHECK_EQUAL(virtqueue_start(&s->vq, WRAP | 6), 0); /* as long ago */
    CHECK_EQUAL(virtqueue_peek(&s->vq, &id), 1);
    CHECK_EQUAL(id, 2);
    chain_begin(&c, &s->vq, s->memory.current, id);
    for (unsigned i = 0; i < 3; i++) {
        CHECK_EQUAL(chain_next(&c, &segment), 1);
        CHECK(segment.addr == DATA + 0x200 + i && segment.len == 3 && segment.device_writes);
    }
    CHECK_EQUAL(chain_next(&c, &segment), 0);
    virtqueue_take(&s->vq, id);
    take_next(&s->vq);
    CHECK_EQUAL(virtqueue_peek(&s->vq, &id), 0);
    virtqueue_push(&s->vq, 3, 4);
    virtqueue_push(&s->vq, 2, 5);
    virtqueue_show_used(&s->vq);
    static const unsigned order[] = {5, 3, 2};
    for (unsigned i = 0; i < 3; i++) {
        CHECK(packed_reap(&s->driver, &reaped, &written));
        CHECK_EQUAL(reaped, order[i]);
    }
    CHECK_EQUAL(s->driver.used, s->driver.avail);
    CHECK_EQUAL(virtqueue_base(&s->vq), s->driver.used * 0x10001u);
    end(s);
}

/* Records that no run of ours leaves: each breaks the ring and goes no further. */
static void reap(struct shared *s, unsigned expected)
{
    unsigned id;
    uint32_t written;
    CHECK(packed_reap(&s->driver, &id, &written));
    CHECK_EQUAL(id, expected);
}

/* Killed amid a batch: its later elements have their flags by then, and the first has not. A next process answers in
 * another order, and the guest sees none but its answers. */
static void what_was_not_shown_is_not_seen_later(void)
{
    static const uint16_t places[] = {0, 6, WRAP | 0, WRAP | 6};
    for (size_t i = 0; i < sizeof places / sizeof places[0]; i++) {
        struct shared *s = begin_ring(places[i]);
        unsigned id;
        uint32_t written;
        put(&s->driver, 1, 2);
        put(&s->driver, 3, 5);
        put(&s->driver, 1, 3);
        packed_publish(&s->driver);
        for (unsigned n = 0; n < 3; n++)
            take_next(&s->vq);
        virtqueue_push(&s->vq, 2, 1);
        virtqueue_push(&s->vq, 5, 1);
        virtqueue_push(&s->vq, 3, 1);
        CHECK_EQUAL(virtqueue_start(&s->vq, places[i]), 0);
        for (unsigned n = 0; n < 3; n++)
            take_next(&s->vq);
        CHECK(!packed_reap(&s->driver, &id, &written));
        virtqueue_push(&s->vq, 3, 1);
        virtqueue_show_used(&s->vq);
        reap(s, 3);
        CHECK(!packed_reap(&s->driver, &id, &written)); /* where 5 was told of before */
        virtqueue_push(&s->vq, 5, 1);
        virtqueue_push(&s->vq, 2, 1);
        virtqueue_show_used(&s->vq);
        reap(s, 5);
        reap(s, 2);
        CHECK(!packed_reap(&s->driver, &id, &written));
        CHECK_EQUAL(s->driver.used, s->driver.avail);
        end(s);
    }
}

static void rubbish(void)
{
    struct shared *s = begin_ring(WRAP);
    put(&s->driver, 3, 2);
    put(&s->driver, 1, 5);
    packed_publish(&s->driver);
    take_next(&s->vq);
    take_next(&s->vq);
    memcpy(&record, &s->record, sizeof record);
    CHECK_EQUAL(virtqueue_start(&s->vq, WRAP), 0);
#define SPOILT(change, breach)                              \
    do {                                                    \
        memcpy(&s->record, &record, sizeof record);         \
        change;                                             \
        CHECK_EQUAL(virtqueue_start(&s->vq, WRAP), breach); \
    } while (0)
    SPOILT(s->record.used.used_idx = NUM, -VS_BREACH_CHAIN);
    SPOILT(s->record.used.old_used_idx = 0xffff, -VS_BREACH_CHAIN);
    SPOILT(s->record.desc[0].num = NUM, -VS_BREACH_CHAIN);
    SPOILT(s->record.desc[0].num = 0, -VS_BREACH_CHAIN);
    SPOILT(s->record.desc[0].num = 0xffff, -VS_BREACH_CHAIN);
    SPOILT(s->record.desc[1].next = 0, -VS_BREACH_CHAIN);
    SPOILT(s->record.desc[1].next = VS_MAX_QUEUE_SIZE, -VS_BREACH_CHAIN);
    SPOILT(s->record.desc[1].next = 3, -VS_BREACH_CHAIN); /* another chain's */
    SPOILT(s->record.desc[2].id = NUM, -VS_BREACH_CHAIN);
    SPOILT(s->record.desc[2].id = 5, -VS_BREACH_HEAD); /* twice */
    SPOILT(s->record.desc[5].next = 0, 0);             /* of a free one: linked anew */
    end(s);
    for (unsigned seed = 0; seed < 2000; seed++) {
        uint16_t used = 0;
        srand(seed);
        for (size_t i = 0; i < sizeof record; i++)
            ((uint8_t *)&record)[i] = (uint8_t)(rand() % (seed % 3 ? 2 : 256));
        record.version = seed % 4 ? INFLIGHT_VERSION : record.version;
        int n = inflight_packed_recover(&record, &state, NUM, no_ring, &used, found);
        CHECK(n <= (int)NUM);
        for (int i = 0; i < n; i++)
            CHECK(found[i].id < NUM && found[i].num >= 1 && found[i].num <= NUM);
    }
}

static void regions(void)
{
    struct inflight_area a = {.map = NULL};
    uint64_t two = 2ull * VS_INFLIGHT_PACKED_RING_BYTES;
    bool mode = true;
    int fd = memfd_create("inflight", MFD_CLOEXEC);
    CHECK(fd >= 0 && ftruncate(fd, (off_t)two) == 0);
    CHECK(inflight_map(&a, dup(fd), 2ull * VS_INFLIGHT_RING_BYTES, 0, 2, true) < 0); /* a split ring's are smaller */
    CHECK_EQUAL(inflight_map(&a, dup(fd), two, 0, 2, true), 0);
    CHECK((uint8_t *)inflight_record(&a, 1) == a.base + VS_INFLIGHT_PACKED_RING_BYTES);
    inflight_keep_write_cache(&a, false);
    inflight_write_cache(&a, &mode);
    CHECK(!mode);
    ((struct inflight_packed *)inflight_record(&a, 1))->version = INFLIGHT_VERSION;
    CHECK(inflight_map(&a, fd, two, 0, 2, true) < 0); /* descriptors of another backend */
    CHECK(a.map == NULL);
}

int main(void)
{
    test("a record that was not used yet", unused_record);
    test("the specification's fields", fields);
    test("taken up again", taken_up_again);
    test("what was not shown is not seen later", what_was_not_shown_is_not_seen_later);
    test("killed at any instruction", killed_at_any_instruction);
    test("records of rubbish", rubbish);
    test("regions", regions);
    return tests_end();
}
