/* SPDX-License-Identifier: Apache-2.0
 *
 * What the engine shows of itself: the second part of the boundary, which cffi and C read after shim_api.h.
 */

struct vs_op_stats {
    uint64_t operations;
    uint64_t bytes;
    uint64_t errors;
    uint64_t latency_ns_total;
    uint64_t latency_ns_log2[32];
};

enum vs_request_op {
    VS_OP_READ = 0,
    VS_OP_WRITE = 1,
    VS_OP_FLUSH = 2,
    VS_OP_DISCARD = 3,
    VS_OP_WRITE_ZEROES = 4,
    VS_OP_OTHER = 5,
    VS_REQUEST_OPS = 6
};

struct vs_queue_stats {
    struct vs_op_stats op[6];
    uint64_t malformed;
    uint64_t kicks;
    uint64_t notifications;
    uint32_t in_flight;
    uint32_t running;
    uint32_t broken; /* enum vs_breach */
};

struct vs_disk_stats {
    struct vs_op_stats op[4];
    uint32_t in_flight;
};

struct vs_counts {
    uint64_t source_generation;
    uint64_t source_flushed;
    uint64_t writes_mirrored;
    uint64_t flush_request;
    uint64_t writes_flushed;
    uint32_t source_flush_known; /* 0: the source was not flushed yet in this process's life */
    uint32_t mirrored_known;     /* 0: not steady; writes_mirrored and writes_flushed mean nothing */
};

struct vs_snapshot {
    uint32_t mirror_state;
    uint32_t gated;
    uint32_t record_pending; /* VS_EV_DEGRADED waits for VS_CMD_RECORD_WRITTEN */
    uint32_t fenced;         /* a former destination is not over: its requests in flight, at least 1 */
    uint32_t write_cache;
    uint32_t active_attachment; /* VS_MAX_ATTACHMENTS: none */
    struct vs_counts counts;
    uint64_t lag_bytes;
    uint64_t lag_writes;
    uint64_t lag_ns;
    uint64_t log_bytes_used;
    uint64_t copy_bytes_total;
    uint64_t copy_bytes_done;   /* of copy_bytes_total; never falls within one copy */
    uint64_t copy_bytes_sparse; /* of copy_bytes_done: holes and zeroes that were not written out */
    uint64_t differing_bytes;   /* where source and peer may differ, while one is tracked */
    uint64_t bitmap_syncs;      /* flushes of the bitmap's file so far */
    uint64_t verify_bytes_done; /* of the last verification: looked at, among them */
    uint64_t verify_bytes_skipped;
    uint64_t verify_bytes_differing;
    uint64_t verify_bytes_repaired;
    uint32_t verify_running;
    uint32_t verify_range_count; /* of what differs; merged where there were too many */
    struct vs_range verify_ranges[64];
    uint32_t tracked;
    uint32_t bitmap_in_use;
    uint64_t throttled_ns;     /* how long writes waited for room in the log */
    uint64_t polled_ns;        /* how long the engine's thread looked for work before it slept */
    uint64_t polls, poll_hits; /* how often it did, and how often something came */
    uint64_t wakeups;          /* of the engine's thread */
    uint64_t lent;             /* disk operations (parts of them) that other threads have done */
    uint64_t syscalls;         /* io_uring_enter and notifications */
    uint64_t requests_waiting; /* flushes and write-through writes that wait */
    uint64_t events_lost;
    uint32_t doubt_count;
    struct vs_range doubt[64];
    uint32_t spared_count; /* of these: what the destination holds better, and no copy brings there */
    struct vs_range spared[64];
    struct vs_disk_stats disk[2]; /* by enum vs_disk_role */
    uint32_t unreadable_count;
    struct vs_range unreadable[64]; /* the copy could not read the source there: the destination lacks it */
    uint32_t ahead_drained;         /* VS_EV_AHEAD_DRAINED was posted, and the state is still ahead */
    uint64_t reads_from_destination;
    uint64_t source_failovers;
    uint32_t failover_pending;
    uint32_t paused;                          /* a steady destination was lost, and flushes wait for another */
    uint32_t pause_held;                      /* of requests_waiting: those held by the pause */
    uint64_t pause_ns;                        /* how long it has lasted */
    uint64_t pause_released;                  /* requests that a frontend could not wait for, since the start */
    uint64_t limited_requests, limited_bytes; /* that a limit has made wait at the head of their rings */
    uint64_t limited_ns;                      /* how long a limit has made some ring wait */
};

/* Both copy what the last VS_CMD_SNAPSHOT prepared. */
void vs_engine_snapshot(vs_engine *engine, struct vs_snapshot *out);
void vs_engine_queue_stats(vs_engine *engine, uint32_t queue, struct vs_queue_stats *out);
