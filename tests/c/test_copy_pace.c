/* SPDX-License-Identifier: Apache-2.0
 *
 * The copy's pace in a simulated world: two disks, each so far away and with one
 * queue of so many bytes a second, and a guest that asks the source for a little
 * every now and then.
 */
#include "copy_pace.h"

#include "harness.h"
#include "bounds.h"

#define US 1000ull
#define MS 1000000ull
#define S 1000000000ull
#define MB_PER_S 1000000.0
#define KIB 1024ull
#define REGION (64 * KIB)
#define DEPTH 8u
#define GUEST_EVERY_NS (3 * MS)

struct simulated_disk {
    uint64_t away_ns; /* on the way, for any number at once */
    double bytes_per_s;
    uint64_t busy_until_ns;
};

enum at { AT_NONE, AT_SOURCE, AT_DESTINATION };

struct part {
    enum at at;
    uint64_t bytes, round, submitted_ns, done_ns;
};

static struct world {
    struct copy_pace pace;
    struct simulated_disk disk[COPY_DISKS];
    struct part parts[COPY_DEPTH_MAX];
    uint64_t now_ns, seed;
    bool jitter;
    /* Observed. */
    uint64_t copied, guest_waits_ns, guest_longest_ns, guest_asked, most_at_source;
} w;

static void begin_copy(struct simulated_disk source, struct simulated_disk destination)
{
    memset(&w, 0, sizeof w);
    w.seed = 7;
    w.disk[COPY_SOURCE] = source;
    w.disk[COPY_DESTINATION] = destination;
    copy_pace_init(&w.pace, DEPTH, REGION, 0);
}

/* When a request is done that is submitted now. */
static uint64_t ask(struct simulated_disk *d, uint64_t bytes)
{
    uint64_t start = d->busy_until_ns > w.now_ns ? d->busy_until_ns : w.now_ns;
    d->busy_until_ns = start + (uint64_t)((double)bytes / d->bytes_per_s * 1e9);
    return d->busy_until_ns + d->away_ns + (w.jitter ? test_random(&w.seed) % (d->away_ns / 4) : 0);
}

static void submit(struct part *p, enum at at)
{
    p->at = at;
    p->round = w.pace.round;
    p->submitted_ns = w.now_ns;
    p->done_ns = ask(&w.disk[at == AT_SOURCE ? COPY_SOURCE : COPY_DESTINATION], p->bytes);
}

static void begin_parts(void)
{
    unsigned in_use = 0, reads = 0;
    for (unsigned i = 0; i < COPY_DEPTH_MAX; i++) {
        in_use += w.parts[i].at != AT_NONE;
        reads += w.parts[i].at == AT_SOURCE;
    }
    CHECK(in_use <= DEPTH);
    for (unsigned i = 0; i < COPY_DEPTH_MAX; i++) {
        if (w.parts[i].at != AT_NONE)
            continue;
        if (in_use >= copy_pace_parts(&w.pace) || reads >= copy_pace_reads(&w.pace))
            break;
        w.parts[i].bytes = copy_pace_part_bytes(&w.pace);
        CHECK(w.parts[i].bytes >= REGION && w.parts[i].bytes <= COPY_BYTES);
        submit(&w.parts[i], AT_SOURCE);
        in_use++;
        reads++;
    }
    if (reads > w.most_at_source)
        w.most_at_source = reads;
}

static struct part *next_done(void)
{
    struct part *next = NULL;
    for (unsigned i = 0; i < COPY_DEPTH_MAX; i++)
        if (w.parts[i].at != AT_NONE && (!next || w.parts[i].done_ns < next->done_ns))
            next = &w.parts[i];
    return next;
}

static void done(struct part *p)
{
    uint64_t latency_ns = p->done_ns - p->submitted_ns;
    bool read = p->at == AT_SOURCE;
    copy_pace_completed(&w.pace, read ? COPY_SOURCE : COPY_DESTINATION, p->round, latency_ns, w.now_ns);
    if (read) {
        submit(p, AT_DESTINATION);
        return;
    }
    w.copied += p->bytes;
    p->at = AT_NONE;
}

/* What it waits behind the copy; it takes no time of the disk itself. */
static void guest_asks(void)
{
    uint64_t busy = w.disk[COPY_SOURCE].busy_until_ns, waits = busy > w.now_ns ? busy - w.now_ns : 0;
    w.guest_waits_ns += waits;
    w.guest_asked++;
    if (waits > w.guest_longest_ns)
        w.guest_longest_ns = waits;
}

/* Megabytes a second. */
static double run_for(uint64_t ns)
{
    uint64_t end = w.now_ns + ns, before = w.copied, guest_ns = w.now_ns;
    while (w.now_ns < end) {
        struct part *p;
        begin_parts();
        p = next_done();
        CHECK(p); /* it never stops */
        if (guest_ns < p->done_ns) {
            w.now_ns = guest_ns > w.now_ns ? guest_ns : w.now_ns;
            guest_asks();
            guest_ns += GUEST_EVERY_NS + test_random(&w.seed) % MS;
            continue;
        }
        w.now_ns = p->done_ns;
        done(p);
    }
    return (double)(w.copied - before) / MB_PER_S / ((double)ns / 1e9);
}

static double one_part_at_a_time(void)
{
    double seconds = 0;
    for (unsigned i = 0; i < COPY_DISKS; i++)
        seconds += (double)w.disk[i].away_ns / 1e9 + COPY_BESIDE_BYTES / w.disk[i].bytes_per_s;
    return COPY_BESIDE_BYTES / MB_PER_S / seconds;
}

static void near_disks(void)
{
    begin_copy((struct simulated_disk){90 * US, 1500 * MB_PER_S, 0},
               (struct simulated_disk){90 * US, 1500 * MB_PER_S, 0});
    w.jitter = true;
    for (unsigned i = 0; i < 100; i++) {
        run_for(100 * MS);
        CHECK_EQUAL(copy_pace_part_bytes(&w.pace), COPY_BESIDE_BYTES);
        CHECK_EQUAL(copy_pace_parts(&w.pace), 1);
    }
    CHECK(w.guest_longest_ns <= 90 * US);
}

/* The more the disks take, the more the copy gives them; and nobody waits longer for it. */
static void far_disks(void)
{
    static const double speeds[] = {2000, 1000, 250, 60};
    static const double at_least[] = {25, 12, 3, 1};
    for (unsigned i = 0; i < sizeof speeds / sizeof speeds[0]; i++) {
        struct simulated_disk disk = {5 * MS, speeds[i] * MB_PER_S, 0};
        double before, now;
        begin_copy(disk, disk);
        before = one_part_at_a_time();
        run_for(1 * S);
        now = run_for(20 * S);
        printf("# %4.0f MB/s, 5 ms away: %.1f MB/s, one part at a time %.1f; the guest waits %.2f ms (%.2f at most)\n",
               speeds[i], now, before, (double)w.guest_waits_ns / (double)w.guest_asked / 1e6,
               (double)w.guest_longest_ns / 1e6);
        CHECK(now >= at_least[i] * before);
        CHECK(w.guest_waits_ns / w.guest_asked <= COPY_SLACK_NS);
        /* While it is found out how much is too much, a few small parts are. */
        CHECK(w.guest_longest_ns <= 4 * COPY_SLACK_NS + 5 * (uint64_t)(COPY_BESIDE_BYTES / disk.bytes_per_s * 1e9));
    }
}

static void one_of_them_is_far(void)
{
    struct simulated_disk near = {90 * US, 1500 * MB_PER_S, 0}, far = {5 * MS, 1000 * MB_PER_S, 0};
    double before;
    begin_copy(near, far);
    before = one_part_at_a_time();
    CHECK(run_for(20 * S) >= 5 * before);
    CHECK_EQUAL(w.most_at_source, 1); /* the guest never waits behind more */
    begin_copy(far, near);
    CHECK(run_for(20 * S) >= 5 * before);
    CHECK(w.guest_waits_ns / w.guest_asked <= COPY_SLACK_NS);
}

/* Slow for a moment is not far; and what is far may come near. */
static void disks_change(void)
{
    struct simulated_disk near = {90 * US, 1500 * MB_PER_S, 0}, far = {5 * MS, 1000 * MB_PER_S, 0};
    begin_copy(near, near);
    w.disk[COPY_SOURCE].away_ns = w.disk[COPY_DESTINATION].away_ns = 20 * MS; /* for a while */
    run_for(S);
    CHECK(copy_pace_parts(&w.pace) > 1);
    w.disk[COPY_SOURCE].away_ns = w.disk[COPY_DESTINATION].away_ns = 90 * US;
    run_for(50 * MS);
    CHECK_EQUAL(copy_pace_parts(&w.pace), 1);
    begin_copy(far, far);
    run_for(S);
    /* No queue of ours, but who knows: down to one part, which is measured anew. */
    w.disk[COPY_SOURCE].away_ns = 50 * MS;
    for (unsigned i = 0; copy_pace_parts(&w.pace) > 1; i++) {
        run_for(50 * MS);
        CHECK(i < 100);
    }
    run_for(20 * S);
    CHECK_EQUAL(copy_pace_parts(&w.pace), DEPTH);
}

/* A disk whose time is anything between once and one and a quarter. */
static void jitter_does_not_stop_it(void)
{
    struct simulated_disk far = {5 * MS, 1000 * MB_PER_S, 0};
    begin_copy(far, far);
    w.jitter = true;
    run_for(S);
    CHECK(run_for(20 * S) >= 10 * one_part_at_a_time());
}

static void what_was_submitted_before_does_not_count(void)
{
    struct copy_pace p = {.round = 0};
    copy_pace_init(&p, DEPTH, REGION, 0);
    uint64_t round = p.round;
    CHECK(round > 0); /* 0 is what goes at full speed */
    for (unsigned i = 0; i < 8; i++) {
        copy_pace_completed(&p, COPY_DESTINATION, round, 5 * MS, i * MS);
        copy_pace_completed(&p, COPY_SOURCE, round, 5 * MS, i * MS);
    }
    CHECK_EQUAL(copy_pace_parts(&p), 2);
    for (unsigned i = 0; i < 100; i++)
        copy_pace_completed(&p, COPY_SOURCE, i % 2 ? round : 0, 50 * MS, 100 * MS);
    CHECK_EQUAL(copy_pace_parts(&p), 2);
    copy_pace_init(&p, DEPTH, COPY_BYTES, 0); /* another copy; its regions are as large as a part can be */
    CHECK(p.round > round + 1);
    CHECK_EQUAL(copy_pace_parts(&p), 1);
    CHECK_EQUAL(copy_pace_part_bytes(&p), COPY_BYTES);
}

int main(void)
{
    test("near disks", near_disks);
    test("far disks", far_disks);
    test("one of them is far", one_of_them_is_far);
    test("disks change", disks_change);
    test("jitter does not stop it", jitter_does_not_stop_it);
    test("what was submitted before does not count", what_was_submitted_before_does_not_count);
    return tests_end();
}
