/* SPDX-License-Identifier: Apache-2.0
 *
 * The device's side of a virtqueue, of either layout: split (virtio 1.x, 2.7;
 * virtqueue_split.c) or packed (2.8; virtqueue_packed.c). Everything in shared
 * memory may change under our eyes: each field is read once, into a local, and
 * checked there.
 *
 * A chain has an identity, "chain": the head's index in a split ring, the buffer
 * ID in a packed one. Nobody outside looks into it.
 *
 * Not here: what a chain means (blk_request.h), and when to look (attachment.c).
 */
#ifndef VS_VIRTQUEUE_H
#define VS_VIRTQUEUE_H

#include <assert.h>
#include <linux/virtio_ring.h>
#include <stdbool.h>
#include <stdint.h>

#include "dirty_log.h"
#include "guest_memory.h"
#include "inflight.h"
#include "bounds.h"

struct chain;
struct chain_segment;
struct packed_ring;
struct ring_layout;

struct virtqueue {
    const struct ring_layout *layout;
    /* As the frontend set it up. Of a packed ring: "avail" is the driver's event suppression, "used" the device's. */
    uint32_t num;
    uint64_t desc_user, avail_user, used_user;
    bool indirect, event_idx;
    bool mapped;          /* all of the ring's addresses are in the table */
    bool signalled_known; /* false: the next notification is due whatever the guest has asked for */
    /* The record of what is in flight, laid out as the ring is; NULL: the frontend keeps none. */
    void *record;
    /* Where what is written to the used part is logged, and under which guest address; NULL: it is not. */
    struct dirty_log *log;
    uint64_t used_log_addr;
    /* A packed ring's (virtqueue_packed.c); NULL: it is a split one. */
    struct packed_ring *packed;
    /* A split ring's, mapped; the addresses stay after virtqueue_map() has failed, for answers. */
    struct vring_desc *desc;
    struct vring_avail *avail;
    struct vring_used *used;
    /* Free-running indices. */
    uint16_t next_avail;     /* the next head to take up */
    uint16_t avail_seen;     /* the guest's index when last read */
    uint16_t next_used;      /* the next used element to write */
    uint16_t used_shown;     /* the index that the guest sees */
    uint16_t used_signalled; /* used_shown when the guest was last considered for a notification */
    uint64_t inflight_counter;
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
    const void *descs; /* vring_desc or vring_packed_desc: of the table that the walk is in */
    uint32_t desc_count;
    uint32_t next;
    uint32_t left; /* steps until a walk must have come to its end: a longer one loops */
    bool in_indirect, ended;
};

/* The walk goes on in an indirect table, of descriptors as the ring's. 0 or minus an enum vs_breach. */
static inline int chain_enter_table(struct chain *c, uint64_t addr, uint32_t bytes)
{
    const uint32_t each = sizeof(struct vring_desc);
    static_assert(sizeof(struct vring_desc) == sizeof(struct vring_packed_desc), "the same in both layouts");
    if (bytes == 0 || bytes % each || bytes / each > VS_MAX_QUEUE_SIZE)
        return -VS_BREACH_INDIRECT;
    /* Alignment is not asked for by the specification; x86 and arm64 do without. */
    c->descs = guest_at(c->table, addr, bytes);
    if (!c->descs)
        return -VS_BREACH_INDIRECT;
    c->in_indirect = true;
    c->desc_count = c->left = bytes / each;
    c->next = 0;
    return 0;
}

/* What the two layouts do each in their way. What the functions below say holds for these. */
struct ring_layout {
    bool (*map)(struct virtqueue *vq, const struct mem_table *table);
    bool (*answerable)(const struct virtqueue *vq);
    void (*unmap)(struct virtqueue *vq);
    int (*start)(struct virtqueue *vq, uint32_t base);
    uint32_t (*base)(const struct virtqueue *vq);
    int (*peek)(struct virtqueue *vq, uint16_t *chain);
    void (*take)(struct virtqueue *vq, uint16_t chain);
    void (*chain_begin)(struct chain *c, uint16_t chain);
    int (*chain_next)(struct chain *c, struct chain_segment *out);
    void (*push)(struct virtqueue *vq, uint16_t chain, uint32_t written_bytes);
    bool (*show_used)(struct virtqueue *vq);
    bool (*has_more)(const struct virtqueue *vq);
    bool (*ask_for_kick)(struct virtqueue *vq);
    void (*no_kicks)(struct virtqueue *vq);
};

extern const struct ring_layout ring_split, ring_packed;
/* What a packed ring has beside the fields above; to be freed. NULL: there is no memory. */
struct packed_ring *packed_ring_make(void);

static inline bool virtqueue_is_packed(const struct virtqueue *vq)
{
    return vq->packed != NULL;
}

/* A split ring without size and addresses. Frees what there was. */
void virtqueue_reset(struct virtqueue *vq);
/* Chooses the layout, as the features say; a ring that changes is unmapped, and has no record. 0 or -ENOMEM. Nothing
 * of it is in flight. */
int virtqueue_choose_layout(struct virtqueue *vq, bool packed);

/* Translates the ring's addresses; false: they are not (all) in the table, or misaligned. Then it does not run, and the
 * former place stays known, for answers, until virtqueue_unmap(). */
static inline bool virtqueue_map(struct virtqueue *vq, const struct mem_table *table)
{
    vq->mapped = vq->layout->map(vq, table);
    return vq->mapped;
}

/* It has (or had) a place that answers go to. */
static inline bool virtqueue_answerable(const struct virtqueue *vq)
{
    return vq->layout->answerable(vq);
}

static inline void virtqueue_unmap(struct virtqueue *vq)
{
    vq->mapped = false;
    vq->layout->unmap(vq);
}

/* The ring starts: where to go on, as SET_VRING_BASE has it. With a record of requests in flight that is worked out
 * from there (frontends' bases differ then). 0 or minus an enum vs_breach. */
static inline int virtqueue_start(struct virtqueue *vq, uint32_t base)
{
    return vq->layout->start(vq, base);
}

/* What GET_VRING_BASE is answered with. Nothing is in flight, and all is shown. */
static inline uint32_t virtqueue_base(const struct virtqueue *vq)
{
    return vq->layout->base(vq);
}

/* 1 and the next chain, 0: there is none, or minus an enum vs_breach. Takes nothing. */
static inline int virtqueue_peek(struct virtqueue *vq, uint16_t *chain)
{
    return vq->layout->peek(vq, chain);
}

/* Takes the chain that virtqueue_peek showed. */
static inline void virtqueue_take(struct virtqueue *vq, uint16_t chain)
{
    vq->layout->take(vq, chain);
}

/* A walk over the chain that virtqueue_peek showed. */
static inline void chain_begin(struct chain *c, const struct virtqueue *vq, const struct mem_table *table,
                               uint16_t chain)
{
    c->vq = vq;
    c->table = table;
    vq->layout->chain_begin(c, chain);
}

/* 1 and the next segment, 0: the chain has ended, or minus an enum vs_breach. */
static inline int chain_next(struct chain *c, struct chain_segment *out)
{
    return c->vq->layout->chain_next(c, out);
}

/* Fills the next used element; the guest sees it after virtqueue_show_used(). */
static inline void virtqueue_push(struct virtqueue *vq, uint16_t chain, uint32_t written_bytes)
{
    vq->layout->push(vq, chain, written_bytes);
}

/* Publishes all that was pushed; true: the guest wants to be notified. */
static inline bool virtqueue_show_used(struct virtqueue *vq)
{
    return vq->layout->show_used(vq);
}

/* The guest has put something into the ring since it was found empty. Only a look. */
static inline bool virtqueue_has_more(const struct virtqueue *vq)
{
    return vq->layout->has_more(vq);
}

/* Asks for a kick at the next request; true: there is one already, look again. */
static inline bool virtqueue_ask_for_kick(struct virtqueue *vq)
{
    return vq->layout->ask_for_kick(vq);
}

/* No kicks, please: the ring is being looked at. */
static inline void virtqueue_no_kicks(struct virtqueue *vq)
{
    vq->layout->no_kicks(vq);
}

#endif
