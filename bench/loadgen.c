/* SPDX-License-Identifier: Apache-2.0
 *
 * A load generator for vhost-user-blk: what a guest's driver does, without a guest.
 * A thread per queue keeps "depth" requests in flight: it takes up all completions
 * that are there, puts a new request in the place of each, and notifies once. It
 * honours EVENT_IDX in both directions and sleeps on the call descriptor (or, with
 * --poll, never sleeps). No request costs an allocation or a system call of its own.
 *
 * The result is JSON on stdout. Exit code: 0, 1 (could not run), 2 (a verifying run
 * found wrong data, or a request failed), 3 (the backend hung up).
 */
#include "loadgen.h"

#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <time.h>
#include <unistd.h>

enum { REQUEST_IN = 0, REQUEST_OUT = 1, REQUEST_FLUSH = 4 }; /* virtio 1.x 5.2.6 */

struct request_header {
    uint32_t type;
    uint32_t reserved;
    uint64_t sector;
};

static struct run the_run;
/* Read by the workers, set by the main thread and the signal handler. */
static volatile bool stop_wanted;
static volatile bool backend_lost;

static uint64_t now_ns(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (uint64_t)time.tv_sec * 1000000000u + (uint64_t)time.tv_nsec;
}

/* xorshift64* (public domain) */
static uint64_t random_below(struct worker *worker, uint64_t limit)
{
    uint64_t value = worker->random_state;
    value ^= value >> 12;
    value ^= value << 25;
    value ^= value >> 27;
    worker->random_state = value;
    value *= 0x2545f4914f6cdd1dull;
    return (uint64_t)(((unsigned __int128)value * limit) >> 64);
}

/* ---- one slot's memory: header, status, then the indirect table ----------- */

enum { STATUS_AT = 16, TABLE_AT = 32 };

static size_t request_bytes(uint32_t segments)
{
    return (TABLE_AT + (segments + 2) * sizeof(struct descriptor) + 63) / 64 * 64;
}

static uint8_t *request_of(const struct worker *worker, uint32_t slot)
{
    return worker->requests + slot * request_bytes(worker->segments);
}

static uint8_t *data_of(const struct worker *worker, uint32_t slot)
{
    return worker->data + slot * worker->options->block_bytes;
}

/* Writes the slot's request and its descriptors (not yet published). */
static void put(struct worker *worker, uint32_t slot_number)
{
    static const uint32_t type[OPERATIONS] = {REQUEST_IN, REQUEST_OUT, REQUEST_FLUSH};
    const struct slot *slot = &worker->slots[slot_number];
    const struct options *options = worker->options;
    uint8_t *request = request_of(worker, slot_number);
    uint64_t at = guest_address(worker->frontend, request);
    struct segment *segments = worker->list;
    uint32_t count = 0;

    uint64_t sector = slot->operation == OP_FLUSH ? 0 : slot->unit * (options->block_bytes / SECTOR_BYTES);
    *(struct request_header *)request = (struct request_header){type[slot->operation], 0, sector};
    request[STATUS_AT] = 0xff;
    segments[count++] = (struct segment){at, 16, false};
    if (slot->operation != OP_FLUSH) {
        uint64_t address = guest_address(worker->frontend, data_of(worker, slot_number));
        uint64_t left = options->block_bytes;
        uint64_t segment = (options->block_bytes + worker->segments - 1) / worker->segments;
        while (left) {
            uint32_t bytes = (uint32_t)(left < segment ? left : segment);
            segments[count++] = (struct segment){address, bytes, slot->operation == OP_READ};
            address += bytes;
            left -= bytes;
        }
    }
    segments[count++] = (struct segment){at + STATUS_AT, 1, true};
    ring_put(worker->ring, slot_number, segments, count, options->indirect ? request + TABLE_AT : NULL, at + TABLE_AT);
}

/* ---- what to do next --------------------------------------------------------- */

/* A verifying run has at most one request in flight for a unit: looks for another, a few times. */
static bool choose_unit(struct worker *worker, struct slot *slot)
{
    for (int attempt = 0; attempt < 16; attempt++) {
        uint64_t unit;
        if (worker->options->random) {
            unit = random_below(worker, worker->units);
        } else {
            unit = worker->next_unit;
            worker->next_unit = unit + 1 == worker->units ? 0 : unit + 1;
        }
        slot->unit = worker->first_unit + unit;
        if (!worker->options->verify || !worker->journal->unit[slot->unit].busy)
            return true;
    }
    return false;
}

static void begin_verified(struct worker *worker, uint32_t slot_number)
{
    struct slot *slot = &worker->slots[slot_number];
    if (slot->operation == OP_FLUSH) {
        slot->flushes = worker->pending;
        slot->flush_count = worker->pending_count;
        worker->pending = NULL;
        worker->pending_count = worker->pending_room = 0;
        return;
    }
    struct journal_unit *unit = &worker->journal->unit[slot->unit];
    unit->busy = 1;
    slot->least = unit->completed;
    if (slot->operation == OP_READ)
        return;
    slot->generation = unit->issued + 1;
    /* Known as issued before the backend may see it: the journal may outlive this process. */
    __atomic_store_n(&unit->issued, slot->generation, __ATOMIC_RELEASE);
    uint64_t sector = slot->unit * (worker->options->block_bytes / SECTOR_BYTES);
    pattern_fill(data_of(worker, slot_number), worker->options->block_bytes, sector, slot->generation,
                 worker->journal->header->seed);
}

static void end_verified(struct worker *worker, uint32_t slot_number, bool failed)
{
    struct slot *slot = &worker->slots[slot_number];
    if (slot->operation == OP_FLUSH) {
        for (uint32_t i = 0; i < slot->flush_count && !failed; i++) {
            struct journal_unit *unit = &worker->journal->unit[slot->flushes[i].unit];
            if (slot->flushes[i].generation > unit->flushed)
                unit->flushed = slot->flushes[i].generation;
        }
        free(slot->flushes);
        slot->flushes = NULL;
        return;
    }
    struct journal_unit *unit = &worker->journal->unit[slot->unit];
    if (slot->operation == OP_READ && !failed)
        pattern_check(&worker->verification, data_of(worker, slot_number), worker->options->block_bytes,
                      slot->unit * (worker->options->block_bytes / SECTOR_BYTES), slot->least, unit->issued,
                      worker->journal->header->seed);
    if (slot->operation == OP_WRITE && !failed) {
        unit->completed = slot->generation;
        if (worker->pending_count == worker->pending_room) {
            worker->pending_room = worker->pending_room ? worker->pending_room * 2 : 256;
            worker->pending = realloc(worker->pending, worker->pending_room * sizeof *worker->pending);
            if (!worker->pending)
                die("no memory");
        }
        worker->pending[worker->pending_count++] = (struct flushed_unit){slot->unit, slot->generation};
    }
    unit->busy = 0;
}

/* False when there is nothing to be done now. */
static bool submit_one(struct worker *worker, uint64_t now)
{
    const struct options *options = worker->options;
    if (worker->flush_running && options->flush_drain)
        return false;
    uint32_t slot_number = worker->free_slots[worker->free_count - 1];
    struct slot *slot = &worker->slots[slot_number];
    if (worker->flush_wanted) {
        if (options->flush_drain && worker->free_count != options->depth)
            return false;
        slot->operation = OP_FLUSH;
        worker->flush_wanted = false;
        worker->flush_running = true;
    } else {
        bool read = options->read_percent && random_below(worker, 100) < options->read_percent;
        slot->operation = read ? OP_READ : OP_WRITE;
        if (!choose_unit(worker, slot))
            return false;
        if (!read && options->flush_every && ++worker->writes_since_flush == options->flush_every) {
            worker->writes_since_flush = 0;
            worker->flush_wanted = true;
        }
    }
    worker->free_count--;
    slot->start_ns = now;
    if (options->verify)
        begin_verified(worker, slot_number);
    put(worker, slot_number);
    worker->submitted++;
    return true;
}

/* ---- the ring ------------------------------------------------------------------ */

static void publish(struct worker *worker)
{
    uint64_t one = 1;
    if (!ring_publish(worker->ring))
        return;
    worker->kicks++;
    if (write(worker->ring->kick_fd, &one, sizeof one) < 0 && errno != EAGAIN)
        die("kick: %s", strerror(errno));
}

static void complete(struct worker *worker, uint32_t slot_number, uint64_t now)
{
    struct slot *slot = &worker->slots[slot_number];
    bool failed = request_of(worker, slot_number)[STATUS_AT] != 0;
    if (slot->operation == OP_FLUSH)
        worker->flush_running = false;
    if (worker->options->verify)
        end_verified(worker, slot_number, failed);
    if (failed)
        worker->errors[slot->operation]++;
    if (now >= the_run.start_ns && now < the_run.end_ns) {
        histogram_add(worker->latency[slot->operation], now - slot->start_ns);
        if (worker->interval) {
            uint64_t interval = (now - the_run.start_ns) / (worker->options->interval_ms * 1000000ull);
            if (interval < INTERVALS_MAX)
                worker->interval[interval]++;
        }
    }
    worker->free_slots[worker->free_count++] = slot_number;
}

static uint32_t reap(struct worker *worker)
{
    uint32_t count = 0, slot_number;
    uint64_t now;
    if (!ring_something_used(worker->ring))
        return 0;
    now = now_ns();
    if (worker->last_reap_ns >= the_run.start_ns && now - worker->last_reap_ns > worker->gap_ns) {
        worker->gap_ns = now - worker->last_reap_ns;
        worker->gap_at_ns = worker->last_reap_ns - the_run.start_ns;
    }
    worker->last_reap_ns = now;
    for (; ring_next_used(worker->ring, &slot_number); count++) {
        if (slot_number >= worker->options->depth || worker->free_count == worker->options->depth)
            die("queue %u: completion of a request that is none: %u", worker->queue, slot_number);
        complete(worker, slot_number, now);
    }
    return count;
}

/* Until there is a completion, or the backend is lost. */
static void wait_for_completion(struct worker *worker)
{
    if (worker->options->poll) {
        while (!ring_something_used(worker->ring) && !backend_lost)
            __builtin_ia32_pause();
        return;
    }
    ring_ask_for_call(worker->ring);
    while (!ring_something_used(worker->ring) && !backend_lost) {
        /* Edge-triggered: nothing has to be read from the descriptor. One system call a wake-up. */
        struct epoll_event event;
        worker->sleeps++;
        if (epoll_wait(worker->epoll_fd, &event, 1, 1000) < 0 && errno != EINTR)
            die("epoll_wait: %s", strerror(errno));
    }
    ring_no_calls(worker->ring);
}

static void *work(void *argument)
{
    struct worker *worker = argument;
    const struct options *options = worker->options;
    while (!backend_lost) {
        uint64_t now = now_ns();
        bool enough = stop_wanted || now >= the_run.end_ns ||
                      (options->operations_max && worker->submitted >= options->operations_max);
        while (!enough && worker->free_count && submit_one(worker, now))
            enough = options->operations_max && worker->submitted >= options->operations_max;
        publish(worker);
        if (worker->free_count == options->depth)
            break;
        while (!reap(worker) && !backend_lost)
            wait_for_completion(worker);
    }
    worker->finished_ns = now_ns();
    return NULL;
}

/* ---- setting up ------------------------------------------------------------------ */

static uint32_t power_of_two_from(uint32_t number)
{
    uint32_t power = 1;
    while (power < number)
        power *= 2;
    return power;
}

static void *allocate(size_t count, size_t bytes)
{
    void *memory = calloc(count, bytes);
    if (!memory)
        die("no memory");
    return memory;
}

static void prepare_worker(struct run *run, uint32_t queue, uint64_t units, uint32_t segments)
{
    struct options *options = &run->options;
    struct worker *worker = &run->workers[queue];
    size_t rings = frontend_ring_bytes(options->queues, run->frontend.ring_size);
    size_t requests = (options->depth * request_bytes(segments) + 4095) / 4096 * 4096;
    size_t data = (options->depth * options->block_bytes + 4095) / 4096 * 4096;
    *worker = (struct worker){
        .options = options,
        .frontend = &run->frontend,
        .ring = &run->frontend.ring[queue],
        .journal = &run->journal,
        .queue = queue,
        .requests = run->frontend.memory + rings + queue * (requests + data),
        .data = run->frontend.memory + rings + queue * (requests + data) + requests,
        .slots = allocate(options->depth, sizeof(struct slot)),
        .free_slots = allocate(options->depth, sizeof(uint32_t)),
        .free_count = options->depth,
        .segments = segments,
        .list = allocate(segments + 2, sizeof(struct segment)),
        .random_state = (options->seed + queue + 1) * 0x9e3779b97f4a7c15ull,
        .first_unit = 0,
        .units = units,
        .next_unit = units / options->queues * queue,
        .epoll_fd = epoll_create1(EPOLL_CLOEXEC),
    };
    if (options->verify) { /* each queue its own part: a unit has one writer */
        worker->units = units / options->queues;
        worker->first_unit = worker->units * queue;
        worker->next_unit = 0;
    }
    for (uint32_t i = 0; i < options->depth; i++)
        worker->free_slots[i] = options->depth - 1 - i;
    for (int i = 0; i < OPERATIONS; i++)
        worker->latency[i] = allocate(1, sizeof(struct histogram));
    if (options->interval_ms)
        worker->interval = allocate(INTERVALS_MAX, sizeof(uint32_t));
    struct epoll_event event = {.events = EPOLLIN | EPOLLET};
    if (worker->epoll_fd < 0 || epoll_ctl(worker->epoll_fd, EPOLL_CTL_ADD, worker->ring->call_fd, &event) < 0)
        die("epoll: %s", strerror(errno));
    worker->ring->stride = options->indirect ? 1 : segments + 2;
    worker->ring->list_length = allocate(run->frontend.ring_size, sizeof(uint16_t));
    /* Bytes that do not compress and are not zero, for runs that do not verify. */
    for (size_t i = 0; i < data / 8; i++)
        ((uint64_t *)worker->data)[i] = worker->random_state * (i + 1);
}

static void prepare(struct run *run)
{
    struct options *options = &run->options;
    struct frontend *frontend = &run->frontend;
    uint64_t wanted = 1ull << BLK_F_SIZE_MAX | 1ull << BLK_F_SEG_MAX | 1ull << BLK_F_BLK_SIZE | 1ull << BLK_F_FLUSH |
                      1ull << BLK_F_CONFIG_WCE | 1ull << BLK_F_MQ;
    if (options->indirect)
        wanted |= 1ull << RING_F_INDIRECT;
    if (options->event_idx)
        wanted |= 1ull << RING_F_EVENT_IDX;
    if (options->packed)
        wanted |= 1ull << VIRTIO_F_RING_PACKED;
    frontend_connect(frontend, options->socket_path, wanted);
    options->indirect = has(frontend, RING_F_INDIRECT);
    options->event_idx = has(frontend, RING_F_EVENT_IDX);
    if (options->packed && !has(frontend, VIRTIO_F_RING_PACKED))
        die("the backend offers no packed rings");
    if (options->flush_every && !has(frontend, BLK_F_FLUSH))
        die("the backend offers no flush");
    if (options->queues > frontend->queues_max)
        die("the backend has %u queues", frontend->queues_max);
    if (options->block_bytes % frontend->block_bytes)
        die("the disk has blocks of %u bytes", frontend->block_bytes);

    uint64_t limit = frontend->segment_bytes_max / SECTOR_BYTES * SECTOR_BYTES;
    uint32_t segments = (uint32_t)((options->block_bytes + limit - 1) / limit);
    if (segments > frontend->segments_max)
        die("a request of %llu bytes takes %u segments, the backend has %u", (unsigned long long)options->block_bytes,
            segments, frontend->segments_max);
    uint32_t descriptors = options->indirect ? options->depth : options->depth * (segments + 2);
    uint32_t ring_size = power_of_two_from(descriptors < 128 ? 128 : descriptors);
    if (ring_size > RING_SIZE_MAX)
        die("%u requests of %u segments do not fit into a ring of %d", options->depth, segments, RING_SIZE_MAX);
    uint64_t span = options->span_bytes ? options->span_bytes : frontend->capacity_bytes;
    uint64_t units = span / options->block_bytes;
    if (span > frontend->capacity_bytes || units / options->queues < 2)
        die("the disk has %llu bytes: too few", (unsigned long long)frontend->capacity_bytes);

    size_t per_queue = options->depth * (request_bytes(segments) + options->block_bytes) + 2 * 4096;
    frontend_start(frontend, options->queues, ring_size,
                   frontend_ring_bytes(options->queues, ring_size) + options->queues * per_queue);
    if (options->verify)
        journal_open(&run->journal, options->journal_path, options->block_bytes, units);
    run->workers = allocate(options->queues, sizeof *run->workers);
    for (uint32_t queue = 0; queue < options->queues; queue++)
        prepare_worker(run, queue, units, segments);
}

static void on_signal(int number)
{
    (void)number;
    stop_wanted = true;
}

static bool all_done(const struct run *run)
{
    for (uint32_t queue = 0; queue < run->options.queues; queue++)
        if (!__atomic_load_n(&run->workers[queue].finished_ns, __ATOMIC_ACQUIRE))
            return false;
    return true;
}

/* Watches the connection while the workers work. */
static void watch(struct run *run)
{
    struct pollfd socket = {.fd = run->frontend.socket, .events = POLLRDHUP};
    while (!all_done(run)) {
        if (poll(&socket, 1, 20) > 0 && socket.revents) {
            run->lost = backend_lost = true;
            for (uint32_t queue = 0; queue < run->options.queues; queue++) {
                uint64_t one = 1;
                if (write(run->workers[queue].ring->call_fd, &one, sizeof one) < 0)
                    perror("loadgen: call");
            }
            return;
        }
    }
}

static void stay(struct run *run)
{
    struct pollfd socket = {.fd = run->frontend.socket, .events = POLLRDHUP};
    while (!stop_wanted && !run->lost && now_ns() < run->end_ns)
        if (poll(&socket, 1, (int)((run->end_ns - now_ns()) / 1000000u) + 1) > 0)
            run->lost = true;
}

int main(int argc, char **argv)
{
    struct run *run = &the_run;
    struct options *options = &run->options;
    parse_options(options, argc, argv);
    if (options->check_path)
        return journal_check_image(options->journal_path, options->check_path, options->flushed_only) ? 0 : 2;
    prepare(run);
    struct sigaction action = {.sa_handler = on_signal};
    sigaction(SIGINT, &action, NULL);
    sigaction(SIGTERM, &action, NULL);
    run->start_ns = now_ns() + (uint64_t)(options->ramp_seconds * 1e9);
    run->end_ns = run->start_ns + (uint64_t)(options->seconds * 1e9);
    for (uint32_t queue = 0; queue < options->queues; queue++)
        if (pthread_create(&run->workers[queue].thread, NULL, work, &run->workers[queue]))
            die("no thread");
    watch(run);
    if (options->stay)
        stay(run);
    uint64_t errors = 0, bad = 0;
    for (uint32_t queue = 0; queue < options->queues; queue++) {
        struct worker *worker = &run->workers[queue];
        pthread_join(worker->thread, NULL);
        bad += worker->verification.bad;
        for (int i = 0; i < OPERATIONS; i++)
            errors += worker->errors[i];
    }
    if (!run->lost)
        frontend_stop(&run->frontend);
    report(run);
    return run->lost ? 3 : errors || bad ? 2 : 0;
}
