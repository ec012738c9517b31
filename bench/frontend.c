/* SPDX-License-Identifier: Apache-2.0 */
#include "frontend.h"

#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

/* QEMU docs/interop/vhost-user.rst */
enum request {
    GET_FEATURES = 1,
    SET_FEATURES = 2,
    SET_OWNER = 3,
    SET_MEM_TABLE = 5,
    SET_VRING_NUM = 8,
    SET_VRING_ADDR = 9,
    SET_VRING_BASE = 10,
    GET_VRING_BASE = 11,
    SET_VRING_KICK = 12,
    SET_VRING_CALL = 13,
    GET_PROTOCOL_FEATURES = 15,
    SET_PROTOCOL_FEATURES = 16,
    GET_QUEUE_NUM = 17,
    SET_VRING_ENABLE = 18,
    GET_CONFIG = 24
};
enum { VERSION = 1, REPLY = 4, NEED_REPLY = 8 };
enum protocol_feature { PROTOCOL_F_MQ = 0, PROTOCOL_F_REPLY_ACK = 3, PROTOCOL_F_CONFIG = 9 };

struct header {
    uint32_t request;
    uint32_t flags;
    uint32_t bytes;
};

struct vring_state {
    uint32_t queue;
    uint32_t value;
};

struct vring_address {
    uint32_t queue;
    uint32_t flags;
    uint64_t descriptors;
    uint64_t used;
    uint64_t avail;
    uint64_t log;
};

struct memory_table {
    uint32_t regions;
    uint32_t padding;
    uint64_t guest_address;
    uint64_t bytes;
    uint64_t user_address;
    uint64_t mmap_offset;
};

/* virtio 1.x 5.2.4, as far as it is used */
struct blk_config {
    uint64_t capacity_sectors;
    uint32_t size_max;
    uint32_t seg_max;
    uint8_t geometry[4];
    uint32_t blk_size;
    uint8_t topology[8];
    uint8_t writeback;
    uint8_t unused;
    uint16_t num_queues;
} __attribute__((packed));
_Static_assert(sizeof(struct blk_config) == 36, "virtio 1.x 5.2.4 up to num_queues");

struct config_message {
    uint32_t offset;
    uint32_t bytes;
    uint32_t flags;
    struct blk_config config;
};

void die(const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    fputs("loadgen: ", stderr);
    vfprintf(stderr, format, arguments);
    fputc('\n', stderr);
    va_end(arguments);
    exit(1);
}

static void send_message(struct frontend *frontend, enum request request, uint32_t flags, const void *payload,
                         size_t bytes, int fd)
{
    struct header header = {request, VERSION | flags, (uint32_t)bytes};
    struct iovec parts[2] = {{&header, sizeof header}, {(void *)payload, bytes}};
    union {
        struct cmsghdr header;
        char space[CMSG_SPACE(sizeof(int))];
    } control;
    struct msghdr message = {.msg_iov = parts, .msg_iovlen = bytes ? 2 : 1};
    if (fd >= 0) {
        memset(&control, 0, sizeof control);
        message.msg_control = &control;
        message.msg_controllen = sizeof control.space;
        control.header = (struct cmsghdr){CMSG_LEN(sizeof fd), SOL_SOCKET, SCM_RIGHTS};
        memcpy(CMSG_DATA(&control.header), &fd, sizeof fd);
    }
    ssize_t sent = sendmsg(frontend->socket, &message, MSG_NOSIGNAL);
    if (sent != (ssize_t)(sizeof header + bytes))
        die("the backend is gone (request %d): %s", request, strerror(errno));
}

static void receive(struct frontend *frontend, enum request request, void *out, size_t bytes)
{
    ssize_t got = bytes ? recv(frontend->socket, out, bytes, MSG_WAITALL) : 0;
    if (got != (ssize_t)bytes)
        die("no answer from the backend to request %d: %s", request, got < 0 ? strerror(errno) : "it hung up");
}

static void ask(struct frontend *frontend, enum request request, const void *payload, size_t payload_bytes, void *reply,
                size_t reply_bytes)
{
    struct header header;
    send_message(frontend, request, 0, payload, payload_bytes, -1);
    receive(frontend, request, &header, sizeof header);
    if (header.request != (uint32_t)request || !(header.flags & REPLY) || header.bytes != reply_bytes)
        die("the answer to request %d is none: request %u, flags %#x, %u bytes", request, header.request, header.flags,
            header.bytes);
    receive(frontend, request, reply, reply_bytes);
}

static uint64_t ask_number(struct frontend *frontend, enum request request)
{
    uint64_t number;
    ask(frontend, request, NULL, 0, &number, sizeof number);
    return number;
}

/* Tells, and has it acknowledged where the backend can do so. */
static void tell(struct frontend *frontend, enum request request, const void *payload, size_t bytes, int fd)
{
    bool acknowledged = frontend->protocol_features >> PROTOCOL_F_REPLY_ACK & 1;
    send_message(frontend, request, acknowledged ? NEED_REPLY : 0, payload, bytes, fd);
    if (!acknowledged)
        return;
    struct header header;
    uint64_t failed;
    receive(frontend, request, &header, sizeof header);
    if (header.request != (uint32_t)request || header.bytes != sizeof failed)
        die("the acknowledgement of request %d is none", request);
    receive(frontend, request, &failed, sizeof failed);
    if (failed)
        die("the backend refused request %d (%llu)", request, (unsigned long long)failed);
}

void frontend_connect(struct frontend *frontend, const char *path, uint64_t wanted)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    if (strlen(path) >= sizeof address.sun_path)
        die("%s is too long for a socket", path);
    strcpy(address.sun_path, path);
    *frontend = (struct frontend){.socket = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0), .memory_fd = -1};
    if (frontend->socket < 0)
        die("socket: %s", strerror(errno));
    /* Between its bind and its listen a backend that starts refuses: wait a second for that, and for nothing else. */
    for (int tries = 0; connect(frontend->socket, (struct sockaddr *)&address, sizeof address) < 0; tries++) {
        if (errno != ECONNREFUSED || tries == 100)
            die("cannot connect to %s: %s", path, strerror(errno));
        usleep(10000);
    }

    uint64_t offered = ask_number(frontend, GET_FEATURES);
    uint64_t needed = 1ull << VIRTIO_F_VERSION_1 | 1ull << VHOST_USER_F_PROTOCOL_FEATURES;
    if (~offered & needed)
        die("the backend is no modern vhost-user device: it offers %#llx", (unsigned long long)offered);
    send_message(frontend, SET_OWNER, 0, NULL, 0, -1);
    uint64_t protocol = ask_number(frontend, GET_PROTOCOL_FEATURES);
    protocol &= 1ull << PROTOCOL_F_MQ | 1ull << PROTOCOL_F_REPLY_ACK | 1ull << PROTOCOL_F_CONFIG;
    if (!(protocol >> PROTOCOL_F_CONFIG & 1))
        die("the backend does not tell its configuration (protocol feature CONFIG)");
    send_message(frontend, SET_PROTOCOL_FEATURES, 0, &protocol, sizeof protocol, -1);
    frontend->protocol_features = protocol;
    frontend->queues_max = protocol >> PROTOCOL_F_MQ & 1 ? (uint32_t)ask_number(frontend, GET_QUEUE_NUM) : 1;

    struct config_message config = {.bytes = sizeof config.config};
    ask(frontend, GET_CONFIG, &config, sizeof config, &config, sizeof config);
    frontend->features = offered & (wanted | needed);
    frontend->capacity_bytes = config.config.capacity_sectors * 512;
    frontend->block_bytes = offered >> BLK_F_BLK_SIZE & 1 ? config.config.blk_size : 512;
    frontend->segment_bytes_max = offered >> BLK_F_SIZE_MAX & 1 ? config.config.size_max : 0;
    if (frontend->segment_bytes_max < 512) /* qemu-storage-daemon offers it and says 0 */
        frontend->segment_bytes_max = UINT32_MAX;
    frontend->segments_max = offered >> BLK_F_SEG_MAX & 1 ? config.config.seg_max : 1;
    uint64_t features = frontend->features;
    tell(frontend, SET_FEATURES, &features, sizeof features, -1);
}

static size_t round_up(size_t bytes, size_t to)
{
    return (bytes + to - 1) / to * to;
}

/* Where in a queue's share the avail and the used ring begin; returns its size. */
static size_t layout(uint32_t ring_size, size_t *avail, size_t *used)
{
    *avail = ring_size * sizeof(struct descriptor);
    *used = round_up(*avail + sizeof(struct avail_ring) + 2 * ring_size + 2, 4096);
    return round_up(*used + sizeof(struct used_ring) + sizeof(struct used_element) * ring_size + 2, 4096);
}

size_t frontend_ring_bytes(uint32_t queues, uint32_t ring_size)
{
    size_t avail, used;
    return queues * layout(ring_size, &avail, &used);
}

static void start_ring(struct frontend *frontend, uint32_t queue)
{
    size_t avail, used;
    size_t bytes = layout(frontend->ring_size, &avail, &used);
    uint8_t *base = frontend->memory + queue * bytes;
    struct ring *ring = &frontend->ring[queue];
    *ring = (struct ring){
        .descriptors = (struct descriptor *)base,
        .avail = (struct avail_ring *)(base + avail),
        .used = (struct used_ring *)(base + used),
        .kick_fd = eventfd(0, EFD_CLOEXEC),
        .call_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK),
    };
    if (ring->kick_fd < 0 || ring->call_fd < 0)
        die("eventfd: %s", strerror(errno));
    ring_begin(ring, has(frontend, VIRTIO_F_RING_PACKED), has(frontend, RING_F_EVENT_IDX), frontend->ring_size);

    struct vring_state number = {queue, frontend->ring_size}, first = {queue, ring_base(ring)}, enable = {queue, 1};
    struct vring_address address = {
        .queue = queue,
        .descriptors = (uintptr_t)ring->descriptors,
        .used = (uintptr_t)ring->used,
        .avail = (uintptr_t)ring->avail,
    };
    uint64_t just_queue = queue;
    tell(frontend, SET_VRING_NUM, &number, sizeof number, -1);
    tell(frontend, SET_VRING_BASE, &first, sizeof first, -1);
    tell(frontend, SET_VRING_ADDR, &address, sizeof address, -1);
    tell(frontend, SET_VRING_CALL, &just_queue, sizeof just_queue, ring->call_fd);
    tell(frontend, SET_VRING_KICK, &just_queue, sizeof just_queue, ring->kick_fd);
    tell(frontend, SET_VRING_ENABLE, &enable, sizeof enable, -1);
}

void frontend_start(struct frontend *frontend, uint32_t queues, uint32_t ring_size, size_t memory_bytes)
{
    frontend->queues = queues;
    frontend->ring_size = ring_size;
    frontend->memory_bytes = round_up(memory_bytes, 2u << 20);
    frontend->memory_fd = memfd_create("loadgen", MFD_CLOEXEC);
    if (frontend->memory_fd < 0 || ftruncate(frontend->memory_fd, (off_t)frontend->memory_bytes) < 0)
        die("memfd: %s", strerror(errno));
    frontend->memory =
        mmap(NULL, frontend->memory_bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, frontend->memory_fd, 0);
    if (frontend->memory == MAP_FAILED)
        die("mmap: %s", strerror(errno));
    struct memory_table table = {
        .regions = 1,
        .guest_address = GUEST_BASE,
        .bytes = frontend->memory_bytes,
        .user_address = (uintptr_t)frontend->memory,
    };
    tell(frontend, SET_MEM_TABLE, &table, sizeof table, frontend->memory_fd);
    for (uint32_t queue = 0; queue < queues; queue++)
        start_ring(frontend, queue);
}

void frontend_stop(struct frontend *frontend)
{
    for (uint32_t queue = 0; queue < frontend->queues; queue++) {
        struct vring_state state = {queue, 0};
        ask(frontend, GET_VRING_BASE, &state, sizeof state, &state, sizeof state);
        uint32_t base = ring_base(&frontend->ring[queue]);
        if (state.value != base)
            die("queue %u was stopped at %#x and stands at %#x", queue, state.value, base);
    }
    close(frontend->socket);
}
