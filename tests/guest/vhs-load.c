// SPDX-License-Identifier: Apache-2.0
//
// vhs-load: a writer whose every block says when it was written, and the check of what it left behind.
//
//   vhs-load write FILE --blocks N [--threads T] [--sync-every K] [--count G | --seconds S] [--seed X]
//   vhs-load verify FILE --blocks N [--threads T] [--seed X] [--synced P] [--issued I]
//
// The same program runs inside a guest (static, from the initramfs) and on the host against an image.
//
// Theory of operation. Writes are numbered 1, 2, 3, …: the number is the write's *generation*. Which block a
// generation writes follows from the seed and the number alone, so a verifier needs no log of what was written:
// it recomputes, for each block, the last generation that was synced. Each block carries its own block number,
// its generation and a checksum over itself, and is filled from a stream made of the three.
//
// T threads write at once; generation g belongs to thread (g - 1) % T and goes to a block b with b % T equal to
// that thread, so one block never has two writes in flight and the newest generation of a block is well defined.
// Meanwhile the main thread syncs: it takes the prefix P (all of 1…P are written), calls fdatasync, and only then
// prints `synced P`. What was printed must survive; what was not printed may.
//
//   synced=P issued=I slowest_us=L     I: no generation above it was submitted before this line was printed,
//                                      L: the longest single write since the line before
//   done synced=P                      the end, after a last sync of everything
//
// What it leaves out: torn blocks. A block is written in one piece and found in one piece, or that is a failure.
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <inttypes.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

enum { BLOCK_BYTES = 4096, BLOCK_WORDS = BLOCK_BYTES / 8, MAX_THREADS = 64 };

#define MAGIC UINT64_C(0x31646f4c53485631)

struct block {
    uint64_t magic;
    uint64_t seed;
    uint64_t number;     // which block of the file this is
    uint64_t generation; // which write put it here
    uint64_t fill[BLOCK_WORDS - 5];
    uint64_t checksum; // of all words before it
};
_Static_assert(sizeof(struct block) == BLOCK_BYTES, "a block on disk is one 4 KiB page");

struct options {
    const char *path;
    uint64_t blocks;
    uint64_t threads;
    uint64_t sync_every; // generations between two syncs
    uint64_t count;      // stop after this generation; 0: no such end
    uint64_t seconds;    // stop after this time; 0: no such end
    uint64_t seed;
    uint64_t synced;
    uint64_t issued;
};

static struct options opt = {.threads = 4, .sync_every = 64, .seed = 1};
static int target_fd = -1;
static atomic_bool stopping;
static _Atomic uint64_t next_generation[MAX_THREADS]; // each thread's first generation not yet completed
static _Atomic uint64_t slowest_us;

static _Noreturn void die(const char *what)
{
    fprintf(stderr, "vhs-load: %s: %s: %s\n", opt.path, what, strerror(errno));
    exit(1);
}

// splitmix64: one step of a well mixed 64-bit stream.
static uint64_t mix(uint64_t x)
{
    x += UINT64_C(0x9e3779b97f4a7c15);
    x = (x ^ (x >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
    x = (x ^ (x >> 27)) * UINT64_C(0x94d049bb133111eb);
    return x ^ (x >> 31);
}

static uint64_t block_of(uint64_t generation)
{
    uint64_t thread = (generation - 1) % opt.threads;
    uint64_t per_thread = opt.blocks / opt.threads;
    return thread + opt.threads * (mix(opt.seed ^ mix(generation)) % per_thread);
}

static uint64_t checksum_of(const struct block *block)
{
    const uint64_t *words = (const uint64_t *)block;
    uint64_t sum = 0;
    for (int i = 0; i < BLOCK_WORDS - 1; i++)
        sum = (sum ^ words[i]) * UINT64_C(0x100000001b3) + (sum >> 47);
    return sum;
}

static void fill_block(struct block *block, uint64_t number, uint64_t generation)
{
    block->magic = MAGIC;
    block->seed = opt.seed;
    block->number = number;
    block->generation = generation;
    uint64_t start = mix(opt.seed ^ mix(number ^ mix(generation)));
    for (int i = 0; i < BLOCK_WORDS - 5; i++)
        block->fill[i] = start + (uint64_t)i * UINT64_C(0x9e3779b97f4a7c15);
    block->checksum = checksum_of(block);
}

static uint64_t now_us(void)
{
    struct timespec ts;
    clock_gettime(CLOCK_MONOTONIC, &ts);
    return (uint64_t)ts.tv_sec * 1000000 + (uint64_t)ts.tv_nsec / 1000;
}

static struct block *new_block(void)
{
    void *memory = NULL;
    if (posix_memalign(&memory, BLOCK_BYTES, BLOCK_BYTES) != 0)
        die("memory");
    return memory;
}

// Direct I/O, so that a write is a request to the disk; where a file system has none (tmpfs), plain I/O.
static int open_target(int flags)
{
    int fd = open(opt.path, flags | O_DIRECT | O_CLOEXEC);
    if (fd < 0 && errno == EINVAL)
        fd = open(opt.path, flags | O_CLOEXEC);
    if (fd < 0)
        die("open");
    return fd;
}

// All generations up to the result are written.
static uint64_t written_prefix(void)
{
    uint64_t least = UINT64_MAX;
    for (uint64_t thread = 0; thread < opt.threads; thread++)
        if (next_generation[thread] < least)
            least = next_generation[thread];
    return least - 1;
}

static void *writer(void *argument)
{
    uint64_t thread = (uint64_t)(uintptr_t)argument;
    struct block *block = new_block();
    for (uint64_t generation = thread + 1; !opt.count || generation <= opt.count; generation += opt.threads) {
        if (stopping)
            break;
        // No thread runs far ahead of the slowest, or little of what is written would be in the synced prefix.
        while (generation > written_prefix() + 4 * opt.sync_every + opt.threads && !stopping)
            usleep(200);
        uint64_t number = block_of(generation);
        fill_block(block, number, generation);
        uint64_t start = now_us();
        if (pwrite(target_fd, block, BLOCK_BYTES, (off_t)(number * BLOCK_BYTES)) != BLOCK_BYTES)
            die("write");
        uint64_t took = now_us() - start;
        uint64_t seen = slowest_us;
        while (took > seen && !atomic_compare_exchange_weak(&slowest_us, &seen, took)) {
        }
        next_generation[thread] = generation + opt.threads;
    }
    free(block);
    return NULL;
}

// No generation above the result has been submitted: each thread has at most its next one in flight.
static uint64_t issued_bound(void)
{
    uint64_t most = 0;
    for (uint64_t thread = 0; thread < opt.threads; thread++)
        if (next_generation[thread] > most)
            most = next_generation[thread];
    return most;
}

static void report(uint64_t prefix)
{
    printf("synced=%" PRIu64 " issued=%" PRIu64 " slowest_us=%" PRIu64 "\n", prefix, issued_bound(),
           atomic_exchange(&slowest_us, 0));
    fflush(stdout);
}

static void on_stop(int signal_number)
{
    (void)signal_number;
    stopping = true;
}

static int write_blocks(void)
{
    struct sigaction action = {.sa_handler = on_stop};
    sigaction(SIGTERM, &action, NULL);
    sigaction(SIGINT, &action, NULL);
    target_fd = open_target(O_RDWR);
    pthread_t threads[MAX_THREADS];
    for (uint64_t thread = 0; thread < opt.threads; thread++) {
        next_generation[thread] = thread + 1;
        if (pthread_create(&threads[thread], NULL, writer, (void *)(uintptr_t)thread) != 0)
            die("thread");
    }
    uint64_t synced = 0;
    uint64_t start = now_us();
    while (!stopping) {
        uint64_t prefix = written_prefix();
        if (opt.count && prefix >= opt.count)
            break;
        if (opt.seconds && now_us() - start > opt.seconds * 1000000)
            stopping = true;
        if (prefix < synced + opt.sync_every) {
            usleep(500);
            continue;
        }
        if (fdatasync(target_fd) != 0)
            die("fdatasync");
        synced = prefix;
        report(synced);
    }
    for (uint64_t thread = 0; thread < opt.threads; thread++)
        pthread_join(threads[thread], NULL);
    // Threads stop at different generations: the prefix is what every one of them has passed.
    synced = written_prefix();
    if (opt.count && synced > opt.count)
        synced = opt.count;
    if (fsync(target_fd) != 0)
        die("fsync");
    report(synced);
    printf("done synced=%" PRIu64 "\n", synced);
    return 0;
}

static int verify_blocks(void)
{
    target_fd = open_target(O_RDONLY);
    uint64_t *least = calloc(opt.blocks, sizeof *least); // for each block: the generation that it must have
    if (least == NULL)
        die("memory");
    for (uint64_t generation = 1; generation <= opt.synced; generation++)
        least[block_of(generation)] = generation;

    struct block *block = new_block();
    uint64_t bad = 0, holding = 0, newest = 0;
    for (uint64_t number = 0; number < opt.blocks; number++) {
        if (pread(target_fd, block, BLOCK_BYTES, (off_t)(number * BLOCK_BYTES)) != BLOCK_BYTES)
            die("read");
        const char *fault = NULL;
        bool ours = block->magic == MAGIC && block->seed == opt.seed;
        if (!ours && least[number] != 0)
            fault = "holds nothing that this run wrote";
        else if (ours && block->checksum != checksum_of(block))
            fault = "has a wrong checksum";
        else if (ours && (block->number != number || block->generation == 0 || block_of(block->generation) != number))
            fault = "holds another block's bytes";
        else if (ours && block->generation < least[number])
            fault = "is older than what was synced";
        else if (ours && opt.issued && block->generation > opt.issued)
            fault = "is newer than anything written by then";
        if (ours && fault == NULL) {
            holding++;
            if (block->generation > newest)
                newest = block->generation;
        }
        if (fault != NULL && bad++ < 10)
            fprintf(stderr, "vhs-load: block %" PRIu64 " %s (has generation %" PRIu64 ", needs %" PRIu64 ")\n", number,
                    fault, ours ? block->generation : 0, least[number]);
    }
    printf("%s blocks=%" PRIu64 " holding=%" PRIu64 " bad=%" PRIu64 " newest=%" PRIu64 " synced=%" PRIu64 "\n",
           bad ? "FAILED" : "verified", opt.blocks, holding, bad, newest, opt.synced);
    free(block);
    free(least);
    return bad ? 1 : 0;
}

static int usage(void)
{
    fputs("usage: vhs-load write|verify FILE --blocks N [--threads T] [--sync-every K] [--count G] [--seconds S]\n"
          "                [--seed X] [--synced P] [--issued I]\n",
          stderr);
    return 2;
}

int main(int argc, char **argv)
{
    static const struct option names[] = {
        {"blocks", required_argument, NULL, 'b'},
        {"threads", required_argument, NULL, 't'},
        {"sync-every", required_argument, NULL, 'k'},
        {"count", required_argument, NULL, 'c'},
        {"seconds", required_argument, NULL, 's'},
        {"seed", required_argument, NULL, 'x'},
        {"synced", required_argument, NULL, 'p'},
        {"issued", required_argument, NULL, 'i'},
        {0},
    };
    for (int name; (name = getopt_long(argc, argv, "", names, NULL)) != -1;) {
        uint64_t value = optarg ? strtoull(optarg, NULL, 0) : 0;
        /* clang-format off */
        switch (name) {
        case 'b': opt.blocks = value; break;
        case 't': opt.threads = value; break;
        case 'k': opt.sync_every = value; break;
        case 'c': opt.count = value; break;
        case 's': opt.seconds = value; break;
        case 'x': opt.seed = value; break;
        case 'p': opt.synced = value; break;
        case 'i': opt.issued = value; break;
        default: return usage();
        }
        /* clang-format on */
    }
    if (argc - optind != 2 || opt.threads == 0 || opt.threads > MAX_THREADS || opt.blocks < opt.threads)
        return usage();
    opt.path = argv[optind + 1];
    if (strcmp(argv[optind], "write") == 0)
        return write_blocks();
    if (strcmp(argv[optind], "verify") == 0)
        return verify_blocks();
    return usage();
}
