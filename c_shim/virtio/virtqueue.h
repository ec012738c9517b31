/* SPDX-License-Identifier: Apache-2.0
 *
 * The device's side of a split virtqueue (virtio 1.x, 2.7). Everything in
 * shared memory may change under our eyes: each field is read once, into a
 * local, and checked there.
 *
 * Not here: what a chain means (blk_request.h), and when to look (attachment.c).
 * A packed ring will come behind the same face.
 */
#ifndef VS_VIRTQUEUE_H
#define VS_VIRTQUEUE_H

#include <linux/virtio_ring.h>
#include <stdbool.h>
#include <stdint.h>

#include "dirty_log.h"
#include "guest_memory.h"
#include "inflight.h"

struct virtqueue {
    /* As the frontend set it up. */
    uint32_t num;
    uint64_t desc_user, avail_user, used_user;
    bool indirect, event_idx;
    /* Mapped; NULL while the ring's addresses are not all in the table. */
    struct vring_desc *desc;
    struct vring_avail *avail;
    struct vring_used *used;
    /* Free-running indices. */
    uint16_t next_avail;  /* the next head to take up */
    uint16_t avail_seen;  /* the guest's index when last read */
    uint16_t next_used;   /* the next used element to write */
    uint16_t used_shown;  /* the index that the guest sees */
    uint16_t used_signalled; /* used_shown when the guest was last considered for a notification */
    bool signalled_known;
    /* The record of what is in flight; NULL: the frontend keeps none. */
    struct inflight_ring *inflight;
    uint64_t inflight_counter;
    /* Where what is written to the used ring is logged, and under which guest address; NULL: it is not. */
    struct dirty_log *log;
    uint64_t used_log_addr;
    /* What a former process took up and did not answer: taken up again first. */
    uint32_t again_next, again_count;
    uint16_t again[VS_MAX_QUEUE_SIZE];
};

/* One descriptor of a chain, checked for nothing but its place. */
struct chain_segment {
    uint64_t addr;
    uint32_t len;
    bool device_writes;
};

/* A walk over a chain. */
struct chain {
    const struct virtqueue *vq;
    const struct mem_table *table;
    const struct vring_desc *descs;
    uint32_t desc_count; /* of the table that the walk is in */
    uint32_t next;
    uint32_t left; /* steps until a walk must have come to its end: a longer one loops */
    bool in_indirect, ended;
};

/* Translates the ring's addresses; false: they are not (all) in the table, or misaligned. */
bool virtqueue_map(struct virtqueue *vq, const struct mem_table *table);
void virtqueue_unmap(struct virtqueue *vq);
/* The ring starts: where to go on in the available ring, and in the used ring where its index in shared memory
 * says. With a record of requests in flight the base is worked out from that (frontends' bases differ then). */
void virtqueue_start(struct virtqueue *vq, uint16_t base);

/* 1 and the next head, 0: there is none, or minus an enum vs_breach. Takes nothing. */
int virtqueue_peek(struct virtqueue *vq, uint16_t *head);
/* Takes the head that virtqueue_peek showed. */
void virtqueue_take(struct virtqueue *vq, uint16_t head);

void chain_begin(struct chain *c, const struct virtqueue *vq, const struct mem_table *table, uint16_t head);
/* 1 and the next segment, 0: the chain has ended, or minus an enum vs_breach. */
int chain_next(struct chain *c, struct chain_segment *out);

/* Fills the next used element; the guest sees it after virtqueue_show_used(). */
void virtqueue_push(struct virtqueue *vq, uint16_t head, uint32_t written_bytes);
/* Publishes all that was pushed; true: the guest wants to be notified. */
bool virtqueue_show_used(struct virtqueue *vq);

/* The guest has put something into the ring since it was found empty. Only a look. */
bool virtqueue_has_more(const struct virtqueue *vq);
/* Asks for a kick at the next request; true: there is one already, look again. */
bool virtqueue_ask_for_kick(struct virtqueue *vq);
/* No kicks, please: the ring is being looked at. */
void virtqueue_no_kicks(struct virtqueue *vq);

#endif
