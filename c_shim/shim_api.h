/* SPDX-License-Identifier: Apache-2.0
 *
 * The boundary between the control plane (Python, through cffi) and the data
 * plane (C). Plain declarations only: cffi parses this file as it stands, and
 * shim_figures.h after it; C includes both through shim.h, which adds the guard.
 *
 * Every command returns a token at once. The engine's own thread applies it
 * between two batches of requests and answers with a VS_EV_DONE event that
 * carries the token; the event descriptor then becomes readable. Commands are
 * applied in the order of submission; their completions may overtake each
 * other (a ring that drains is answered when it has drained).
 */

enum vs_limit {
    VS_MAX_QUEUES = 64,
    VS_MAX_QUEUE_SIZE = 1024,
    VS_MAX_ATTACHMENTS = 8,
    VS_MAX_MEM_SLOTS = 128,
    VS_MEM_TABLE_REGIONS = 8, /* SET_MEM_TABLE's own bound */
    VS_SEGMENT_MAX = 126,     /* config space seg_max */
    VS_SEGMENT_BYTES_MAX = 65536,
    VS_REQUEST_BYTES_MAX = 8388608,
    VS_SERIAL_BYTES = 20,
    VS_LATENCY_BUCKETS = 32,      /* bucket i: latencies in [2^i, 2^(i+1)) ns */
    VS_ZERO_SECTORS_MAX = 524288, /* one discard or write-zeroes: 256 MiB */
    VS_COMMANDS_MAX = 512,
    VS_DIRTY_REGION_BYTES_MAX = 67108864,
    VS_BITMAP_REGIONS_MAX = 268435456,
    VS_EXTENTS_MIN = 64,
    VS_EXTENTS_MAX = 65536,
    VS_EXTENT_BYTES_MAX = 1073741824,
    VS_RANGES_MAX = 64,
    VS_POLL_AUTO = 1000000000,
    VS_THREADS_MAX = 16,
    VS_INFLIGHT_RING_BYTES = 16448, /* a split ring's part of the inflight region */
    VS_INFLIGHT_PACKED_RING_BYTES = 32832
};

typedef struct vs_engine vs_engine;
typedef struct vs_disk vs_disk;

/* ---- disks ------------------------------------------------------------- */

struct vs_disk_probe {
    uint64_t bytes;
    uint32_t is_block_device;
    uint32_t logical_block_bytes; /* offsets and lengths of direct I/O */
    uint32_t physical_block_bytes;
    uint32_t memory_align_bytes; /* buffers of direct I/O; 1 if buffered */
    uint32_t inline_io;          /* memory-backed: plain calls never wait */
    uint32_t discard_granularity_bytes;
    uint32_t may_block; /* io_uring would wait for it on the thread that submits: its workers do all of it */
};

/* Looks at an open descriptor. May block: call it off the event loop.
 * 0 or a negative errno. */
int vs_disk_probe_fd(int fd, int direct, struct vs_disk_probe *out);

/* A disk on an open file or block device. Owns fd on success. NULL: errno says why. */
vs_disk *vs_disk_file(int fd, const struct vs_disk_probe *probe, int direct);

/* What a kind of disk from outside needs of the core: a library of its own, loaded at run time, which makes a vs_disk
 * for the engine (disk/disk_services.h). */
struct vs_disk_services;
const struct vs_disk_services *vs_disk_services(void);

/* Only for a disk that no engine owns (yet, or any more). */
void vs_disk_close(vs_disk *disk);

/* ---- the dirty bitmap's file -------------------------------------------- */

typedef struct vs_bitmap vs_bitmap;

struct vs_bitmap_shape {
    uint64_t capacity_bytes;
    uint64_t extent_bytes; /* power of two, at least a region */
    uint32_t region_bytes;
    uint32_t extents; /* active at once */
};

enum vs_bitmap_open {
    VS_BITMAP_FRESH = 0,           /* everything differs; what the file held is overwritten */
    VS_BITMAP_SAME_BOOT = 1,       /* the page cache has outlived the last process */
    VS_BITMAP_AFTER_HOST_CRASH = 2 /* it has not: what the activity log names differs too */
};

/* How large the file has to be; 0: the shape is out of range. */
uint64_t vs_bitmap_file_bytes(const struct vs_bitmap_shape *shape);
/* May block. Owns fd on success. 0 or a negative errno; -EUCLEAN: the file is too short. */
int vs_bitmap_open(int fd, const struct vs_bitmap_shape *shape, enum vs_bitmap_open how, vs_bitmap **out);
/* Blocks that were damaged (all their regions differ), regions that the activity log has added. */
void vs_bitmap_found(const vs_bitmap *bitmap, uint64_t *bad_blocks, uint64_t *log_regions);
/* May block. Only of one that no engine owns. 0, or why it is not durable. */
int vs_bitmap_close(vs_bitmap *bitmap);

/* ---- the engine -------------------------------------------------------- */

struct vs_range {
    uint64_t offset;
    uint64_t length;
};

enum vs_limited { VS_BPS = 0, VS_BPS_RD, VS_BPS_WR, VS_IOPS, VS_IOPS_RD, VS_IOPS_WR, VS_LIMITED_KINDS };
struct vs_rate {
    uint64_t per_s;    /* 0: there is no limit */
    uint64_t burst;    /* a second, at least per_s; 0: no burst but a tenth of a second's worth at once */
    uint64_t length_s; /* how long a burst at that rate may last, at least 1; without one at most 1 */
};
struct vs_limits {
    struct vs_rate rate[6]; /* by enum vs_limited */
    uint64_t iops_size;     /* a larger request counts as so many of this size; 0: as one */
};
struct vs_engine_config {
    uint64_t capacity_bytes; /* what the guest sees */
    uint64_t log_bytes;
    uint64_t destination_timeout_us;
    uint64_t stop_timeout_us;
    uint64_t max_lag_us;
    uint64_t checkpoint_us; /* what both disks hold is found out, by flushing them, so often */
    uint32_t block_bytes;   /* the guest's logical block: 512 or 4096 */
    uint32_t queues_max;
    uint32_t read_only;
    uint32_t dirty_region_bytes; /* power of two */
    uint32_t copy_depth;         /* region copies in flight */
    uint32_t writeback;          /* 1: WCE on by default */
    uint32_t poll_us;            /* looks for work so long before it sleeps; 0: never, VS_POLL_AUTO: where it pays */
    uint32_t threads;            /* 1 .. VS_THREADS_MAX: one decides, the others do a share of the disks' work */
    uint32_t peer_tracked;       /* a peer is known: the bitmap tells what differs, or without one nothing does */
    vs_bitmap *bitmap;           /* NULL: none. Owned on success */
    char serial[20];
    uint32_t pull_ahead;             /* 1: on congestion the guest runs ahead of the destination; 0: its writes wait */
    uint64_t congestion_fill_bytes;  /* so much of the log in use is congestion */
    uint64_t ahead_backoff_us;       /* how soon it may catch up, the second time; then doubled */
    uint32_t read_fallback;          /* reads that the source fails are answered from a steady destination */
    uint32_t switch_on_source_error; /* what a steady source fails is kept back: VS_EV_SOURCE_FAILED */
    uint32_t pause_on_destination_error; /* flushes wait when a steady destination is lost: VS_EV_PAUSED */
    uint32_t doubt_count;                /* ranges of the source that an earlier run has left in doubt */
    struct vs_range doubt[64];           /* VS_RANGES_MAX */
    uint32_t spared_count;               /* of these: what the peer held better then */
    struct vs_range spared[64];
    struct vs_limits limits;
};

/* Starts the engine's thread; owns source on success. Returns 0 or a negative
 * errno; *step then names the system call that failed. */
int vs_engine_create(const struct vs_engine_config *config, vs_disk *source, vs_engine **out, const char **step);

/* Stops the thread and closes the disks and the bitmap. May block until the disks have
 * completed what was submitted to them: call it off the event loop.
 * Returns to which disks (1 << vs_disk_role) changes were sent that may still be carried out. */
uint32_t vs_engine_stop(vs_engine *engine);

/* After vs_engine_stop: the memory, and what the kernel takes its time to give up (tens of milliseconds). */
void vs_engine_free(vs_engine *engine);

/* Both. */
uint32_t vs_engine_destroy(vs_engine *engine);

int vs_engine_event_fd(vs_engine *engine);

/* 0: its rings take only what the engine asks of them. Else why they take all, a negative errno. */
int vs_engine_rings_restricted(const vs_engine *engine);

enum vs_command_kind {
    VS_CMD_SNAPSHOT = 1, /* refresh what vs_engine_snapshot returns */
    /* A frontend's attachment. "attachment" is 0 .. VS_MAX_ATTACHMENTS-1 and chosen by the caller. */
    VS_CMD_ATTACH,
    VS_CMD_DETACH,            /* done when its last request is over and its memory unmapped */
    VS_CMD_RESET,             /* device reset: features 0, write cache mode back to the default unless another one is
                               * attached; value of the completion: that mode */
    VS_CMD_SET_INFLIGHT,      /* fd, area; before the rings start */
    VS_CMD_SET_FEATURES,      /* value: virtio features as negotiated (without bit 30); bit 26 switches dirty logging */
    VS_CMD_SET_LOG_BASE,      /* fd, area: the dirty log, in the place of a former one */
    VS_CMD_SET_LOG_FD,        /* fd: signalled when the dirty log has changed */
    VS_CMD_SET_MEM_TABLE,     /* memory; rings are translated anew */
    VS_CMD_ADD_MEM_REGION,    /* memory: one */
    VS_CMD_REMOVE_MEM_REGION, /* memory: one, its fd -1; done when no request uses it */
    VS_CMD_VRING_NUM,         /* value */
    VS_CMD_VRING_ADDR,        /* ring */
    VS_CMD_VRING_BASE,        /* value */
    VS_CMD_VRING_KICK,        /* fd; starts the ring */
    VS_CMD_VRING_CALL,        /* fd or -1 */
    VS_CMD_VRING_ERR,         /* fd or -1 */
    VS_CMD_VRING_ENABLE,      /* value 0 or 1; 0 is done when the ring is quiet */
    VS_CMD_VRING_STOP,        /* done when drained; the event's value is the base */
    VS_CMD_GET_WRITE_CACHE,   /* the event's value: 0 or 1, as its config space shows it */
    VS_CMD_SET_WRITE_CACHE,   /* value 0 or 1 (config space WCE) */
    /* The mirror. */
    VS_CMD_MIRROR_START,     /* start (-EINVAL: resync, and no peer is tracked); then steady. fenced: -EBUSY */
    VS_CMD_MIRROR_SPEED,     /* value: bytes per second of the bulk copy, 0: no limit */
    VS_CMD_MIRROR_DRAIN,     /* done when F has reached the G of now (1: source_flushed too); -ENOTCONN: not steady */
    VS_CMD_MIRROR_STOP,      /* value: reason (vs_reason); leaves the destination as it is */
    VS_CMD_MIRROR_LEAVE,     /* as if a steady destination were lost: VS_EV_DEGRADED; -ENOTCONN: not steady */
    VS_CMD_BITMAP_VOID,      /* the state record does not name the bitmap any more: answers VS_EV_BITMAP_FAILED */
    VS_CMD_RECORD_WRITTEN,   /* value: 0 or an errno; answers VS_EV_DEGRADED: held flushes may go (or fail) */
    VS_CMD_GATE,             /* value: microseconds allowed; done when all is drained and M = G, else gate reopened,
                              * and -ETIMEDOUT, or -EAGAIN: drain first, for what was unreadable was written since */
    VS_CMD_UNGATE,           /* opens it, or ends the attempt to close it; event value: pause in ns, 0: it was open */
    VS_CMD_EXCHANGE,         /* exchange. Waits for the gate to close (-ECANCELED: it does not), opens it; event value:
                              * pause in ns. After an error the gate stays closed until VS_CMD_UNGATE */
    VS_CMD_VERIFY,           /* verify: compare both disks */
    VS_CMD_VERIFY_STOP,      /* -ENOENT: there is none */
    VS_CMD_GROW,             /* grow. Done when the guest may be told */
    VS_CMD_CATCH_UP,         /* ahead becomes syncing: the record says "inconsistent". -ENOTCONN: not ahead; -EBUSY:
                              * not drained, or the record is pending; -EAGAIN: sooner than VS_EV_AHEAD_DRAINED said */
    VS_CMD_FAILOVER_GIVE_UP, /* there is no switch after VS_EV_SOURCE_FAILED: what has failed is the guest's error */
    VS_CMD_PEER_DIFFERS,     /* value 1: a verification says that the destination differs (one that runs, as soon as it
                              * sees it): no substitute for the source (read_fallback, failover, exchange); 0: one */
    VS_CMD_DISK_SIZE, /* value: role; event value: how large it is now. -ENOTCONN: there is none; -EBUSY: asked */
    VS_CMD_GROW_STOP, /* the disk stays as large as it is: VS_CMD_GROW ends with -ECANCELED, if it has not ended */
    VS_CMD_LIMIT      /* limits, in the place of those that there were */
};

enum vs_start_flags {
    VS_START_RESYNC = 1,     /* copies only what may differ from the peer that is tracked, else everything */
    VS_START_SPARE_DOUBT = 2 /* but what the destination holds better: it is the last one, as the mirror has left it */
};

enum vs_exchange_flags {
    VS_EXCHANGE_KEEP = 1,      /* keeps the mirror: the roles swap */
    VS_EXCHANGE_ACCEPT = 2,    /* although there are ranges in doubt or unreadable; not with VS_EXCHANGE_KEEP */
    VS_EXCHANGE_DIFFERENT = 4, /* although a verification has found the destination different; else -EBADE */
    VS_EXCHANGE_HOLD = 8 /* the gate stays closed until VS_CMD_UNGATE; with VS_EXCHANGE_KEEP another one undoes it */
};

struct vs_region {
    uint64_t guest_addr;
    uint64_t bytes;
    uint64_t user_addr;
    uint64_t mmap_offset;
    int32_t fd;
};

struct vs_memory_change {
    uint32_t count;
    struct vs_region region[8]; /* VS_MEM_TABLE_REGIONS */
};

/* Memory of the frontend's, behind the command's fd. */
struct vs_area {
    uint64_t bytes;
    uint64_t offset;
    uint32_t queues; /* of the in-flight record */
};

struct vs_ring_addresses {
    uint64_t desc; /* frontend user addresses */
    uint64_t used;
    uint64_t avail;
    uint64_t log; /* guest address under which writes to "used" go into the dirty log; ~0: they do not */
};

struct vs_mirror_start {
    vs_disk *disk;  /* owned on success */
    uint32_t flags; /* enum vs_start_flags */
};

struct vs_exchange {
    uint32_t flags; /* enum vs_exchange_flags */
    /* Where mark_value is stored with the exchange: it tells the next process that it took place; or NULL. */
    uint64_t *mark;
    uint64_t mark_value;
};

struct vs_verify {
    uint32_t repair;            /* 1: what differs is mended on the destination */
    uint64_t speed_bytes_per_s; /* 0: no limit */
};

struct vs_grow {
    uint64_t capacity_bytes;
    uint64_t source_bytes;
    uint64_t destination_bytes; /* 0: there is none */
};

/* What a command needs, by its kind (enum vs_command_kind names the member): nothing, one number, or a struct. */
struct vs_command {
    uint32_t kind;
    uint32_t attachment; /* of VS_CMD_ATTACH .. VS_CMD_SET_WRITE_CACHE */
    uint32_t queue;      /* of VS_CMD_VRING_ */
    int32_t fd;          /* -1: it brings none */
    union {
        uint64_t value;
        struct vs_memory_change memory;
        struct vs_area area;
        struct vs_ring_addresses ring;
        struct vs_mirror_start start;
        struct vs_exchange exchange;
        struct vs_verify verify;
        struct vs_grow grow;
        struct vs_limits limits;
    };
};

/* The token, never 0; 0 if VS_COMMANDS_MAX are under way. Takes over the
 * descriptors in the command (also when it then fails), unless 0 is returned. */
uint64_t vs_engine_submit(vs_engine *engine, const struct vs_command *command);

enum vs_mirror_state { VS_PASSTHROUGH = 0, VS_SYNCING = 1, VS_STEADY = 2, VS_AHEAD = 3, VS_DEGRADED = 4 };

/* What moves it. */
enum vs_mirror_event {
    VS_MIRROR_STARTED = 0,
    VS_MIRROR_COPIED, /* everything, and flushed */
    VS_MIRROR_CONGESTED,
    VS_MIRROR_CATCHES_UP,
    VS_MIRROR_LOST,
    VS_MIRROR_STOPPED,
    VS_MIRROR_SWITCHED,     /* the destination is the source, and there is no mirror */
    VS_MIRROR_SWITCHED_KEPT /* the roles have changed */
};

struct vs_mirror_move {
    uint32_t from, event, to; /* vs_mirror_state, vs_mirror_event, vs_mirror_state */
    uint32_t captures;        /* 1: the guest's writes are captured after it; 0: not any more */
    uint32_t counts;          /* 1: the counts of the destination are known after it */
    uint32_t record;          /* 1: VS_EV_DEGRADED follows, and flushes are held until the record is written */
};

/* The moves there are, one by one from place 0; NULL: no more. */
const struct vs_mirror_move *vs_mirror_move_at(uint32_t place);

enum vs_reason {
    VS_REASON_COMMAND = 0,
    VS_REASON_COPY_DONE,
    VS_REASON_DESTINATION_WRITE,
    VS_REASON_DESTINATION_FLUSH,
    VS_REASON_DESTINATION_TIMEOUT,
    VS_REASON_STOP_TIMEOUT,
    VS_REASON_SWITCH,
    VS_REASON_CONGESTION, /* the destination is too slow, and the guest is not to wait */
    VS_REASON_CATCH_UP,
    VS_REASON_DESTINATION_LOST, /* its connection */
    VS_REASON_GROUP             /* VS_CMD_MIRROR_LEAVE */
};

enum vs_event_kind {
    VS_EV_DONE = 1,        /* token, result (0 or negative errno), value */
    VS_EV_STATE,           /* value: the new vs_mirror_state; reason; result: errno */
    VS_EV_DEGRADED,        /* the same, and differed; left steady: flushes are held until VS_CMD_RECORD_WRITTEN */
    VS_EV_QUEUE_BROKEN,    /* attachment, queue, reason: enum vs_breach */
    VS_EV_ATTACHMENT_LOST, /* attachment; value: enum vs_loss */
    VS_EV_IO_ERROR,        /* disk_role, op, result, offset, length; value: how many were not reported before it */
    VS_EV_FENCE_CLEAR,     /* a former destination was closed; value: 1 if a change of it was sent and never answered */
    VS_EV_BITMAP_FAILED,   /* result: why; writes that need it are held until VS_CMD_BITMAP_VOID */
    VS_EV_VERIFIED,        /* a verification is over; result: 0, -ECANCELED, -ENOTCONN (not steady any more) */
    VS_EV_AHEAD_DRAINED,   /* ahead: the destination holds durably what the log had; value: ns until it may catch up */
    VS_EV_READ_FALLBACK,   /* the first read of this mirror that the destination has answered: offset, length */
    VS_EV_SOURCE_FAILED,   /* op, result, offset, length; held back until VS_CMD_EXCHANGE or VS_CMD_FAILOVER_GIVE_UP */
    VS_EV_PAUSED,          /* value 1: flushes wait until a mirror is steady, or VS_CMD_MIRROR_STOP; 0: not any more */
    VS_EV_PAUSE_RELEASED,  /* a frontend waited too long; value: how many requests go without a mirror for that */
    VS_EV_SOURCE_CLOSED    /* the source that a switch has left was closed; value: as of VS_EV_FENCE_CLEAR */
};

enum vs_breach {
    VS_BREACH_NONE = 0,
    VS_BREACH_RING_ADDRESS,    /* a ring lies outside the memory table or is misaligned */
    VS_BREACH_AVAILABLE_INDEX, /* moved by more than the queue's size */
    VS_BREACH_HEAD,            /* a head that is no descriptor */
    VS_BREACH_CHAIN,           /* loops, leaves the table, or nests indirect tables */
    VS_BREACH_INDIRECT,        /* an indirect table of a bad length or address */
    VS_BREACH_NO_STATUS        /* no byte to write the status to */
};

enum vs_loss {
    VS_LOSS_MEMORY = 0,   /* the frontend has shrunk a file behind its memory (SIGBUS) */
    VS_LOSS_DIRTY_LOG = 1 /* the same of its dirty log, or that does not cover what the guest has us write */
};

enum vs_disk_role { VS_SOURCE = 0, VS_DESTINATION = 1 };
enum vs_disk_op { VS_DISK_READ = 0, VS_DISK_WRITE = 1, VS_DISK_FLUSH = 2, VS_DISK_ZERO = 3, VS_DISK_OPS = 4 };
/* What a disk is asked beside these, and is not counted: where there is data, how large it is now, and to close. */
enum vs_disk_errand { VS_DISK_EXTENTS = 4, VS_DISK_SIZE = 5, VS_DISK_CLOSE = 6, VS_DISK_KINDS = 7 };

struct vs_event {
    uint32_t kind;
    int32_t result;
    uint64_t token;
    uint64_t value;
    uint64_t offset;
    uint64_t length;
    uint32_t attachment;
    uint32_t queue;
    uint32_t reason;
    uint32_t disk_role;
    uint32_t op;
    uint32_t differed; /* 1: the destination was no copy (rule 5; what a verification has found) */
};

/* 1 and the next event, or 0. Clears the event descriptor when it returns 0. */
int vs_engine_next_event(vs_engine *engine, struct vs_event *out);

/* What the engine shows of itself: shim_figures.h. */

/* The count check alone (durability.md), for the exhaustive test: enum vs_check. */
enum vs_check { VS_CHECK_HELD = 0, VS_CHECK_FLUSH = 1, VS_CHECK_WAIT = 2 };
int vs_count_check(uint64_t flush_request, uint64_t writes_mirrored, uint64_t writes_flushed);

/* A hash of the C sources that this build was made from. */
const char *vs_source_hash(void);
