/* SPDX-License-Identifier: Apache-2.0
 *
 * Frontends' attachments: their memory, their rings, and when a ring runs.
 */
#ifndef VS_ATTACHMENT_H
#define VS_ATTACHMENT_H

#include <stdbool.h>
#include <stdint.h>

#include "bell.h"
#include "dirty_log.h"
#include "disk.h"
#include "guest_memory.h"
#include "inflight.h"
#include "kick_watch.h"
#include "bounds.h"
#include "list.h"
#include "mailbox.h"
#include "virtqueue.h"

/* VHOST_F_LOG_ALL: requests' data and status are marked in the attachment's dirty log. */
#define FEATURE_LOG_ALL (1ull << 26)

/* A virtqueue of an attachment, and where it stands (attachment.c).
 * It runs if it was started (KICK), is enabled, mapped, whole, and its
 * attachment is the active one. */
struct queue {
    struct attachment *attachment;
    uint32_t index;
    struct virtqueue vq;
    /* Pinned: its rings' memory was taken away while requests were in flight (attachment_map_rings). */
    struct mem_table *leaving;
    bool started, enabled, running;
    bool base_set; /* base is to be taken at the next start */
    uint32_t base;
    uint32_t broken; /* enum vs_breach */
    bool limited;    /* its next request has had to wait for a limit (limited_rings.c) */
    struct kick_target kick;
    struct bell *call, *err;
    unsigned in_flight;      /* requests taken up, not answered */
    struct list ready_link;  /* in frontends.ready or stalled, or in limited_rings: to be looked at */
    struct list notify_link; /* in frontends.notify: used elements to be shown */
    /* Commands that wait until nothing is in flight; 0: none. */
    uint64_t stop_token, disable_token;
    uint64_t quiet_deadline_ns; /* for them: then the destination is given up */
};

/* A frontend's connection: its memory and its rings. */
struct attachment {
    struct frontends *frontends;
    bool open, closing, lost;
    uint64_t detach_token;
    /* 0, or it waits for its end or for memory to be unmapped: a pause holds nothing longer. */
    uint64_t patience_ends_ns;
    uint64_t features;
    bool write_cache; /* this guest's; a reconnecting frontend does not tell it again, so it begins as the device's */
    /* By this guest, since it came or its device was reset; else it follows the one that runs. */
    bool write_cache_chosen;
    struct guest_memory memory;
    struct inflight_area inflight;
    struct dirty_log dirty_log;
    struct bell *log_bell; /* rung when the dirty log has changed; NULL: nobody asked */
    struct queue queue[VS_MAX_QUEUES];
    unsigned in_flight;
};

/* All of them, and what their rings have to be given. */
struct frontends {
    struct mailbox *mailbox;
    const struct disk_host *host; /* its clock */
    struct bells bells;
    struct kick_watches watches;
    uint64_t stop_timeout_ns;
    struct attachment attachment[VS_MAX_ATTACHMENTS];
    struct attachment *active; /* the one whose rings run */
    /* Rings: to be looked at; waiting for room or time; with something to be shown. */
    struct list ready, stalled, notify;
    unsigned quieting; /* queues with a stop or disable command under way */
    bool write_cache;  /* config space WCE, as the guest on the active attachment has set it */
    bool write_cache_default;
    struct vs_queue_stats queue_stats[VS_MAX_QUEUES];
    uint64_t notifications;
};

/* host's ring may come to run later: see bells.uring. */
void frontends_init(struct frontends *f, struct mailbox *mailbox, const struct disk_host *host,
                    const struct vs_engine_config *config);
/* Once its first frontend comes: most of the memory for attachments is never touched, and costs nothing. */
void attachment_prepare(struct attachment *a, struct frontends *f);
/* The engine's thread has ended, and its ring with it. */
void frontends_free(struct frontends *f);
/* Ends what a lost mapping has touched. */
void attachments_check_memory(struct frontends *f);

/* The ring may have work. */
void queue_ready(struct queue *q);
/* Those that have waited for room or time have their turn again. */
void queues_retry(struct frontends *f);
/* A request of it was answered. */
void queue_finished_one(struct queue *q);
/* The guest's rubbish: this ring is not looked at again until it is set up anew. */
void queue_break(struct queue *q, uint32_t breach);
/* Shows the guest what was pushed since the last pass, one notification a ring. */
void queues_notify(struct frontends *f);

/* For attachment_command.c, which changes what an attachment and its rings have; attachment.c decides which rings
 * run. */

void queue_set_running(struct queue *q, bool running);
/* If nothing of it is in flight, what waited for that is answered. */
void queue_quiet(struct queue *q);

/* Which rings run, after any change of this attachment. */
void attachment_update(struct attachment *a);
/* The same after a change of the memory or of a ring's addresses. mapped_in: the table that was current until now. */
void attachment_map_rings(struct attachment *a, struct mem_table *mapped_in);
/* Before memory is taken away: the guest sees what is done. */
void attachment_show_done(struct attachment *a);
/* Its end, if it is closing and its last request is over. */
void attachment_maybe_closed(struct attachment *a);

#endif
