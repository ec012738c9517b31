/* SPDX-License-Identifier: Apache-2.0 */
#include "blk_request.h"

#include "ring.h"

/* The guest's memory: rings at the bottom, then [HEADER], then data. Two regions
 * that touch at BORDER, so that a segment may cross from one to the other. */
#define HEADER 0x40000ull
#define DATA 0x50000ull
#define BORDER 0x80000ull
#define TOP 0x100000ull
#define CAPACITY (1ull << 30)

enum { NEXT = VRING_DESC_F_NEXT, W = VRING_DESC_F_WRITE };

static struct guest guest;
static struct guest_memory memory;
static struct ring ring;
static struct virtqueue vq;
static struct blk_request request;
static struct blk_limits limits;
static unsigned chain_length;

static void on_gone(struct guest_memory *m, uint64_t token)
{
    (void)m, (void)token;
}

static void world_make(void)
{
    guest = guest_make(TOP);
    ring = ring_make(&guest, 256);
    CHECK_EQUAL(guest_memory_init(&memory, on_gone), 0);
    struct vs_region r[2] = {guest_region(&guest, 0, BORDER), guest_region(&guest, BORDER, TOP - BORDER)};
    CHECK_EQUAL(guest_memory_set(&memory, r, 2), 0);
    vq = (struct virtqueue){.layout = &ring_split,
                            .num = 256,
                            .desc_user = USER_ADDR + ring.desc_at,
                            .avail_user = USER_ADDR + ring.avail_at,
                            .used_user = USER_ADDR + ring.used_at,
                            .indirect = true};
    CHECK(virtqueue_map(&vq, memory.current));
}

static void begin_request(uint32_t type, uint64_t sector)
{
    struct virtio_blk_outhdr header = {.type = type, .sector = sector};
    limits = (struct blk_limits){.capacity_bytes = CAPACITY, .block_bytes = 512};
    memcpy(guest.base + HEADER, &header, sizeof header);
    memset(&request, 0xa5, sizeof request);
    chain_length = 0;
}

/* A descriptor at the end of the chain; "at": an offset in the guest's memory. */
static void add(uint64_t at, uint32_t len, unsigned flags)
{
    if (chain_length > 0)
        ring.desc[chain_length - 1].flags |= NEXT;
    ring_desc(&ring.desc[chain_length], GUEST_ADDR + at, len, flags, chain_length + 1);
    chain_length++;
}

static int parse(void)
{
    int rc = blk_request_parse(&request, &vq, memory.current, 0, &limits);
    if (rc >= 0)
        CHECK(request.status);
    return rc;
}

static uint64_t offset_of(const void *pointer)
{
    for (unsigned i = 0; i < memory.current->count; i++) {
        const struct mem_region *r = memory.current->region[i];
        if ((const uint8_t *)pointer >= r->host && (const uint8_t *)pointer < r->host + r->bytes)
            return r->guest_addr - GUEST_ADDR + (uint64_t)((const uint8_t *)pointer - r->host);
    }
    return UINT64_MAX;
}

static void check_iov(int i, uint64_t at, uint64_t len)
{
    CHECK(i < request.iov_count);
    CHECK_EQUAL(offset_of(request.iov[i].iov_base), at);
    CHECK_EQUAL(request.iov[i].iov_len, len);
}

static uint64_t iov_sum(void)
{
    uint64_t sum = 0;
    for (int i = 0; i < request.iov_count; i++)
        sum += request.iov[i].iov_len;
    return sum;
}

/* ---- the usual ------------------------------------------------------------ */

static void a_read(void)
{
    begin_request(VIRTIO_BLK_T_IN, 8);
    add(HEADER, 16, 0);
    add(DATA, 4096, W);
    add(DATA + 8192, 512, W);
    add(HEADER + 16, 1, W);
    CHECK_EQUAL(parse(), BLK_OK);
    CHECK_EQUAL(request.op, VS_OP_READ);
    CHECK_EQUAL(request.offset, 4096);
    CHECK_EQUAL(request.length, 4608);
    CHECK_EQUAL(request.writable_bytes, 4609);
    CHECK_EQUAL(request.iov_count, 2);
    check_iov(0, DATA, 4096);
    check_iov(1, DATA + 8192, 512);
    CHECK_EQUAL(offset_of(request.status), HEADER + 16);
}

static void a_write(void)
{
    begin_request(VIRTIO_BLK_T_OUT, CAPACITY / 512 - 8);
    add(HEADER, 16, 0);
    add(DATA, 4096, 0);
    add(HEADER + 16, 1, W);
    CHECK_EQUAL(parse(), BLK_OK);
    CHECK_EQUAL(request.op, VS_OP_WRITE);
    CHECK_EQUAL(request.offset, CAPACITY - 4096);
    CHECK_EQUAL(request.length, 4096);
    CHECK_EQUAL(request.writable_bytes, 1);
    CHECK_EQUAL(request.iov_count, 1);
    check_iov(0, DATA, 4096);
    limits.read_only = true;
    CHECK_EQUAL(parse(), BLK_IOERR);
}

static void a_flush_and_an_id(void)
{
    begin_request(VIRTIO_BLK_T_FLUSH, 0);
    add(HEADER, 16, 0);
    add(HEADER + 16, 1, W);
    CHECK_EQUAL(parse(), BLK_OK);
    CHECK_EQUAL(request.op, VS_OP_FLUSH);
    CHECK_EQUAL(request.iov_count, 0);
    limits.read_only = true;
    CHECK_EQUAL(parse(), BLK_OK);
    begin_request(VIRTIO_BLK_T_GET_ID, 99);
    add(HEADER, 16, 0);
    add(DATA, 20, W);
    add(HEADER + 16, 1, W);
    CHECK_EQUAL(parse(), BLK_OK);
    CHECK_EQUAL(request.op, VS_OP_OTHER);
    check_iov(0, DATA, 20);
}

/* ---- layout ----------------------------------------------------------------- */

/* The borders of descriptors mean nothing: every cut of the same bytes is the same request. */
static void any_layout(void)
{
    for (uint32_t first = 1; first < 16; first++) {
        begin_request(VIRTIO_BLK_T_OUT, 1);
        add(HEADER, first, 0);
        add(HEADER + first, 16 - first + 512, 0);
        add(DATA, 1, W);
        CHECK_EQUAL(parse(), BLK_OK);
        CHECK_EQUAL(request.length, 512);
        check_iov(0, HEADER + 16, 512);
        begin_request(VIRTIO_BLK_T_IN, 1);
        for (uint32_t i = 0; i < 16; i++)
            add(HEADER + i, 1, 0);
        add(DATA, 512 - first, W);
        add(DATA + 4096, first + 1, W); /* the end of the data and the status byte */
        CHECK_EQUAL(parse(), BLK_OK);
        CHECK_EQUAL(request.length, 512);
        check_iov(1, DATA + 4096, first);
        CHECK_EQUAL(offset_of(request.status), DATA + 4096 + first);
    }
    begin_request(VIRTIO_BLK_T_IN, 0); /* empty ones in between */
    add(DATA, 0, 0);
    add(HEADER, 16, 0);
    add(DATA, 0, W);
    add(DATA, 513, W);
    add(DATA + 600, 0, W);
    CHECK_EQUAL(parse(), BLK_OK);
    CHECK_EQUAL(request.iov_count, 1);
    CHECK_EQUAL(offset_of(request.status), DATA + 512);
}

static void over_a_border_of_regions(void)
{
    begin_request(VIRTIO_BLK_T_OUT, 0);
    add(HEADER, 16, 0);
    add(BORDER - 100, 512, 0);
    add(HEADER + 16, 1, W);
    CHECK_EQUAL(parse(), BLK_OK);
    CHECK_EQUAL(request.iov_count, 2);
    check_iov(0, BORDER - 100, 100);
    check_iov(1, BORDER, 412);
    begin_request(VIRTIO_BLK_T_IN, 0);
    add(HEADER, 16, 0);
    add(BORDER - 512, 513, W); /* the status byte alone beyond it */
    CHECK_EQUAL(parse(), BLK_OK);
    CHECK_EQUAL(request.iov_count, 1);
    check_iov(0, BORDER - 512, 512);
    CHECK_EQUAL(offset_of(request.status), BORDER);
}

static void indirect(void)
{
    begin_request(VIRTIO_BLK_T_OUT, 0);
    add(HEADER, 16, 0);
    add(DATA, 512, 0);
    add(HEADER + 16, 1, W);
    memcpy(guest.base + 0x30000, ring.desc, 48);
    ring_desc(&ring.desc[0], GUEST_ADDR + 0x30000, 48, VRING_DESC_F_INDIRECT, 0);
    CHECK_EQUAL(parse(), BLK_OK);
    check_iov(0, DATA, 512);
    /* The longest that the configuration space allows. */
    struct vring_desc *table = (struct vring_desc *)(void *)(guest.base + 0x30000);
    ring_desc(&table[0], GUEST_ADDR + HEADER, 16, NEXT, 1);
    for (unsigned i = 1; i <= VS_SEGMENT_MAX; i++)
        ring_desc(&table[i], GUEST_ADDR + DATA, VS_SEGMENT_BYTES_MAX, NEXT, i + 1);
    ring_desc(&table[VS_SEGMENT_MAX + 1], GUEST_ADDR + HEADER + 16, 1, W, 0);
    ring.desc[0].len = 16 * (VS_SEGMENT_MAX + 2);
    CHECK_EQUAL(parse(), BLK_OK);
    CHECK_EQUAL(request.length, (uint64_t)VS_SEGMENT_MAX * VS_SEGMENT_BYTES_MAX);
    CHECK_EQUAL(request.iov_count, VS_SEGMENT_MAX);
    /* More than that, in too many pieces: answered, not broken. */
    for (unsigned i = 1; i < 400; i++)
        ring_desc(&table[i], GUEST_ADDR + DATA, 512, NEXT, i + 1);
    ring_desc(&table[400], GUEST_ADDR + HEADER + 16, 1, W, 0);
    ring.desc[0].len = 16 * 401;
    CHECK_EQUAL(parse(), BLK_IOERR);
    CHECK_EQUAL(offset_of(request.status), HEADER + 16);
}

/* ---- malformed -------------------------------------------------------------- */

static void no_status(void)
{
    begin_request(VIRTIO_BLK_T_OUT, 0);
    add(HEADER, 16, 0);
    add(DATA, 512, 0);
    CHECK_EQUAL(parse(), -VS_BREACH_NO_STATUS);
    add(HEADER + 16, 0, W); /* no byte in it */
    CHECK_EQUAL(parse(), -VS_BREACH_NO_STATUS);
    ring.desc[2].len = 1;
    CHECK_EQUAL(parse(), BLK_OK);
    ring.desc[2].addr = GUEST_ADDR + TOP;
    CHECK_EQUAL(parse(), -VS_BREACH_NO_STATUS);
    ring.desc[2].addr = UINT64_MAX;
    CHECK_EQUAL(parse(), -VS_BREACH_NO_STATUS);
    ring.desc[2].len = UINT32_MAX;
    CHECK_EQUAL(parse(), -VS_BREACH_NO_STATUS);
    ring.desc[0].next = 0; /* a loop */
    CHECK_EQUAL(parse(), -VS_BREACH_CHAIN);
}

static void bad_headers(void)
{
    for (uint32_t len = 0; len < 16; len++) {
        begin_request(VIRTIO_BLK_T_IN, 0);
        add(HEADER, len, 0);
        add(DATA, 513, W);
        CHECK_EQUAL(parse(), BLK_IOERR);
        CHECK_EQUAL(offset_of(request.status), DATA + 512);
    }
    begin_request(VIRTIO_BLK_T_IN, 0);
    add(TOP, 16, 0); /* not in memory */
    add(DATA, 513, W);
    CHECK_EQUAL(parse(), BLK_IOERR);
    begin_request(VIRTIO_BLK_T_IN, 0);
    add(HEADER, 16, W); /* the wrong direction */
    add(DATA, 513, W);
    CHECK_EQUAL(parse(), BLK_IOERR);
    begin_request(VIRTIO_BLK_T_IN, 0); /* readable after writable */
    add(HEADER, 16, 0);
    add(DATA, 513, W);
    add(DATA + 1024, 512, 0);
    CHECK_EQUAL(parse(), BLK_IOERR);
    begin_request(VIRTIO_BLK_T_IN, 0);
    add(DATA, 513, W);
    add(HEADER, 16, 0);
    CHECK_EQUAL(parse(), BLK_IOERR);
}

static void bad_data(void)
{
    begin_request(VIRTIO_BLK_T_IN, 0); /* a read with readable data */
    add(HEADER, 16, 0);
    add(DATA, 512, 0);
    add(DATA, 513, W);
    CHECK_EQUAL(parse(), BLK_IOERR);
    begin_request(VIRTIO_BLK_T_OUT, 0); /* a write with writable data */
    add(HEADER, 16, 0);
    add(DATA, 512, 0);
    add(DATA, 513, W);
    CHECK_EQUAL(parse(), BLK_IOERR);
    begin_request(VIRTIO_BLK_T_OUT, 0); /* data that runs out of memory */
    add(HEADER, 16, 0);
    add(TOP - 100, 512, 0);
    add(HEADER + 16, 1, W);
    CHECK_EQUAL(parse(), BLK_IOERR);
    ring.desc[1].addr = UINT64_MAX - 100;
    CHECK_EQUAL(parse(), BLK_IOERR);
    ring.desc[1].addr = 0;
    CHECK_EQUAL(parse(), BLK_IOERR);
    begin_request(VIRTIO_BLK_T_OUT, 0); /* more than a request may have */
    add(HEADER, 16, 0);
    for (int i = 0; i < 17; i++)
        add(BORDER, 0x80000, 0);
    add(HEADER + 16, 1, W);
    CHECK_EQUAL(parse(), BLK_IOERR);
    begin_request(VIRTIO_BLK_T_IN, 0);
    add(HEADER, 16, 0);
    for (int i = 0; i < 16; i++) /* exactly what it may */
        add(BORDER, 0x80000, W);
    add(HEADER + 16, 1, W);
    CHECK_EQUAL(parse(), BLK_OK);
    CHECK_EQUAL(request.length, VS_REQUEST_BYTES_MAX);
    CHECK_EQUAL(request.writable_bytes, VS_REQUEST_BYTES_MAX + 1);
}

static int transfer(uint32_t type, uint64_t sector, uint32_t bytes, uint32_t block, uint64_t capacity)
{
    begin_request(type, sector);
    limits.block_bytes = block;
    limits.capacity_bytes = capacity;
    add(HEADER, 16, 0);
    if (bytes)
        add(DATA, bytes, type == VIRTIO_BLK_T_IN ? W : 0);
    add(HEADER + 16, 1, W);
    return parse();
}

static void ranges(void)
{
    for (uint32_t type = VIRTIO_BLK_T_IN; type <= VIRTIO_BLK_T_OUT; type++) {
        CHECK_EQUAL(transfer(type, 0, 0, 512, CAPACITY), BLK_IOERR);
        CHECK_EQUAL(transfer(type, 0, 1, 512, CAPACITY), BLK_IOERR);
        CHECK_EQUAL(transfer(type, 0, 511, 512, CAPACITY), BLK_IOERR);
        CHECK_EQUAL(transfer(type, 0, 513, 512, CAPACITY), BLK_IOERR);
        CHECK_EQUAL(transfer(type, 0, 512, 512, CAPACITY), BLK_OK);
        CHECK_EQUAL(transfer(type, 0, 512, 4096, CAPACITY), BLK_IOERR);
        CHECK_EQUAL(transfer(type, 1, 4096, 4096, CAPACITY), BLK_IOERR);
        CHECK_EQUAL(transfer(type, 8, 4096, 4096, CAPACITY), BLK_OK);
        CHECK_EQUAL(transfer(type, CAPACITY / 512 - 1, 512, 512, CAPACITY), BLK_OK);
        CHECK_EQUAL(transfer(type, CAPACITY / 512 - 1, 1024, 512, CAPACITY), BLK_IOERR);
        CHECK_EQUAL(transfer(type, CAPACITY / 512, 512, 512, CAPACITY), BLK_IOERR);
        CHECK_EQUAL(transfer(type, UINT64_MAX, 512, 512, CAPACITY), BLK_IOERR);
        CHECK_EQUAL(transfer(type, 1ull << 55, 512, 512, CAPACITY), BLK_IOERR); /* times 512 is 0 */
        CHECK_EQUAL(transfer(type, UINT64_MAX / 512, 512, 512, CAPACITY), BLK_IOERR);
        CHECK_EQUAL(transfer(type, 0, 512, 512, 0), BLK_IOERR);
        CHECK_EQUAL(transfer(type, (INT64_MAX >> 9) - 1, 512, 512, INT64_MAX & ~511ull), BLK_OK);
    }
}

static void unknown_types(void)
{
    static const uint32_t types[] = {2, 3, 5, 6, 7, 9, 10, 12, 14, 25, 0x100, 0x80000000, UINT32_MAX};
    for (size_t i = 0; i < sizeof types / sizeof types[0]; i++) {
        begin_request(types[i], 0);
        add(HEADER, 16, 0);
        add(DATA, 513, W);
        CHECK_EQUAL(parse(), BLK_UNSUPP);
        CHECK_EQUAL(request.op, VS_OP_OTHER);
        CHECK_EQUAL(offset_of(request.status), DATA + 512);
    }
}

/* ---- discard and write zeroes ------------------------------------------------ */

static int zero(uint32_t type, uint64_t sector, uint32_t sectors, uint32_t flags)
{
    struct virtio_blk_discard_write_zeroes s = {.sector = sector, .num_sectors = sectors, .flags = flags};
    uint32_t block = limits.block_bytes;
    begin_request(type, 12345); /* the header's sector means nothing here */
    limits.block_bytes = block ? block : 512;
    memcpy(guest.base + DATA, &s, sizeof s);
    add(HEADER, 16, 0);
    add(DATA, sizeof s, 0);
    add(HEADER + 16, 1, W);
    return parse();
}

static void zeroing(void)
{
    static const uint32_t both[] = {VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_WRITE_ZEROES};
    for (int i = 0; i < 2; i++) {
        bool discard = i == 0;
        CHECK_EQUAL(zero(both[i], 16, 8, 0), BLK_OK);
        CHECK_EQUAL(request.op, discard ? VS_OP_DISCARD : VS_OP_WRITE_ZEROES);
        CHECK_EQUAL(request.offset, 8192);
        CHECK_EQUAL(request.length, 4096);
        CHECK_EQUAL(request.may_unmap, discard);
        CHECK_EQUAL(zero(both[i], 16, 8, 1), discard ? BLK_UNSUPP : BLK_OK);
        CHECK(discard || request.may_unmap);
        CHECK_EQUAL(zero(both[i], 16, 8, 2), BLK_UNSUPP);
        CHECK_EQUAL(zero(both[i], 16, 8, 0x80000000), BLK_UNSUPP);
        CHECK_EQUAL(zero(both[i], 16, 0, 0), BLK_IOERR);
        CHECK_EQUAL(zero(both[i], 0, VS_ZERO_SECTORS_MAX, 0), BLK_OK);
        CHECK_EQUAL(zero(both[i], 0, VS_ZERO_SECTORS_MAX + 1, 0), BLK_IOERR);
        CHECK_EQUAL(zero(both[i], CAPACITY / 512 - 8, 8, 0), BLK_OK);
        CHECK_EQUAL(zero(both[i], CAPACITY / 512 - 8, 9, 0), BLK_IOERR);
        CHECK_EQUAL(zero(both[i], UINT64_MAX, 1, 0), BLK_IOERR);
        CHECK_EQUAL(zero(both[i], 1ull << 55, 1, 0), BLK_IOERR);
        limits.block_bytes = 4096;
        CHECK_EQUAL(zero(both[i], 1, 8, 0), BLK_IOERR);
        CHECK_EQUAL(zero(both[i], 8, 1, 0), BLK_IOERR);
        CHECK_EQUAL(zero(both[i], 8, 8, 0), BLK_OK);
        limits.block_bytes = 512;
        zero(both[i], 16, 8, 0);
        limits.read_only = true;
        CHECK_EQUAL(parse(), BLK_IOERR);
        /* Exactly one segment, wherever it is cut. */
        zero(both[i], 16, 8, 0);
        ring.desc[1].len = 15;
        CHECK_EQUAL(parse(), BLK_IOERR);
        ring.desc[1].len = 17;
        CHECK_EQUAL(parse(), BLK_IOERR);
        for (uint32_t count = 2; count < 4; count++) { /* whole ones, but too many */
            ring.desc[1].len = count * 16;
            CHECK_EQUAL(parse(), BLK_UNSUPP);
        }
        ring.desc[1].len = 0;
        CHECK_EQUAL(parse(), BLK_IOERR);
        zero(both[i], 16, 8, 0);
        for (uint32_t cut = 1; cut < 16; cut++) {
            begin_request(both[i], 0);
            add(HEADER, 16, 0);
            add(DATA, cut, 0);
            add(DATA + cut, 16 - cut, 0);
            add(HEADER + 16, 1, W);
            CHECK_EQUAL(parse(), BLK_OK);
            CHECK_EQUAL(request.offset, 8192);
        }
        ring.desc[3].len = 2; /* writable data in it */
        CHECK_EQUAL(parse(), BLK_IOERR);
    }
}

/* ---- all of it, at random ----------------------------------------------------- */

/* Chains of random descriptors: whatever comes, what is accepted is within all bounds. */
static void at_random(void)
{
    static const uint32_t types[] = {0, 0, 0, 1, 1, 1, 4, 8, 11, 13, 2, 99};
    static const uint32_t lengths[] = {0, 1, 15, 16, 17, 512, 512, 512, 513, 4096, 4096, 0x80000, 1u << 31, UINT32_MAX};
    uint64_t state = 5, accepted = 0, errors = 0, broken = 0;
    for (int step = 0; step < 300000; step++) {
        unsigned count = 1 + (unsigned)(test_random(&state) % 6);
        begin_request(types[test_random(&state) % 12],
                      test_random(&state) % 8 ? test_random(&state) % 64 : test_random(&state));
        for (unsigned i = 0; i < count; i++) {
            bool likely = test_random(&state) % 8 != 0;
            uint64_t at = test_random(&state) % 16 ? test_random(&state) % TOP : test_random(&state);
            uint32_t len = lengths[test_random(&state) % 14];
            if (likely && i == 0)
                add(HEADER, 16, 0);
            else if (likely && i == count - 1)
                add(at, 1, W);
            else
                add(at, len, test_random(&state) % 2 ? W : 0);
        }
        if (test_random(&state) % 32 == 0)
            ring.desc[test_random(&state) % count].next = (uint16_t)test_random(&state);
        int rc = parse();
        if (rc < 0) {
            broken++;
            continue;
        }
        CHECK(offset_of(request.status) < TOP);
        CHECK(request.iov_count >= 0 && request.iov_count <= REQUEST_IOV_MAX);
        if (rc != BLK_OK) {
            errors++;
            continue;
        }
        accepted++;
        for (int i = 0; i < request.iov_count; i++) {
            CHECK(request.iov[i].iov_len > 0);
            CHECK(offset_of(request.iov[i].iov_base) < TOP);
            CHECK(offset_of((uint8_t *)request.iov[i].iov_base + request.iov[i].iov_len - 1) < TOP);
        }
        if (request.op == VS_OP_READ || request.op == VS_OP_WRITE) {
            CHECK_EQUAL(iov_sum(), request.length);
            CHECK(request.length > 0 && request.length <= VS_REQUEST_BYTES_MAX);
        }
        if (request.op == VS_OP_READ)
            CHECK_EQUAL(request.writable_bytes, request.length + 1);
        if (request.op != VS_OP_FLUSH && request.op != VS_OP_OTHER) {
            CHECK(request.offset % 512 == 0 && request.length % 512 == 0);
            CHECK(request.offset <= CAPACITY && request.length <= CAPACITY - request.offset);
        }
    }
    CHECK(accepted > 10000 && errors > 10000 && broken > 1000);
}

int main(void)
{
    world_make();
    test("a read", a_read);
    test("a write", a_write);
    test("a flush and an ID", a_flush_and_an_id);
    test("any layout", any_layout);
    test("over a border of regions", over_a_border_of_regions);
    test("indirect", indirect);
    test("no status byte", no_status);
    test("bad headers", bad_headers);
    test("bad data", bad_data);
    test("ranges", ranges);
    test("unknown types", unknown_types);
    test("discard and write zeroes", zeroing);
    test("at random", at_random);
    return tests_end();
}
