/* SPDX-License-Identifier: Apache-2.0
 *
 * The counts, the count check and the loss of the destination: rules 6 and 7, and the state record.
 *
 * Steady. Two queues, three writes to two blocks, two flushes; a log with room for two. The destination may
 * fail a write or a flush, or hang, at any moment; one flush of the source may fail. A write-through write is
 * a write and a flush of its own generation, so it needs nothing of its own here.
 */
#include "disks.pml"
#ifndef WRITES
#define WRITES 3
#endif
#ifndef FLUSHES
#define FLUSHES 2
#endif
#ifndef LOG_ROOM
#define LOG_ROOM 2
#endif

mtype = { STEADY, DEGRADED, WRITTEN, PENDING, UP_TO_DATE, OUTDATED };
mtype state = STEADY, record = WRITTEN;
mtype worth = UP_TO_DATE; /* what the state record says durably of the destination */

byte G, M, F, source_flushed; /* c_shim/order/counts.c */
byte taken, flushes, reserved;
bool source_slot[BLOCKS], mirrored[WRITES + 1], captured[WRITES + 1];
bool hangs;
byte finished;

bool waiting[2], shares[2]; /* guest_flush.c: struct flush_waiter, and whether the source flush in flight serves it */
byte request[2]; /* R */
bool failed[2];
#ifdef SOURCE_MAY_FAIL
bool source_may_fail = true; /* once */
#endif

#define SOURCE_HOLDS(q) (request[q] <= source_flushed)
#define CHECK_HELD(q) (state != STEADY || request[q] <= F) /* vs_count_check */
#define NEEDS_SOURCE(q) (waiting[q] && !SOURCE_HOLDS(q) && !failed[q])
#define NEEDS_DESTINATION(q) (waiting[q] && state == STEADY && request[q] > F && request[q] <= M)

#ifdef BUG_RULE_6
#define ROOM true
#else
#define ROOM (state != STEADY || reserved < LOG_ROOM)
#endif
#ifdef BUG_RECORD_LATE
#define RECORDED true
#else
#define RECORDED (record != PENDING)
#endif

#define DEGRADE /* mirror_degrade, give_up */ \
    if :: state == STEADY -> state = DEGRADED; record = PENDING; M = 0; F = 0 :: else fi

/* counts_mirrored with log_mirrored_prefix: no gap. */
#define PREFIX \
    do :: M < G && (mirrored[M + 1] || !captured[M + 1]) -> M++ :: else -> break od

active [2] proctype queue() {
    byte write, block;
    bool has_entry;
    do
    :: atomic { /* take_up; reserve_log: room first, then the request */
        taken < WRITES && ROOM ->
        taken++;
        write = taken;
        has_entry = (state == STEADY && reserved < LOG_ROOM);
        if :: has_entry -> reserved++ :: else fi;
        if :: block = 0 :: write > 1 -> block = 1 fi /* the first one's block is called 0 */
      }
      atomic { !source_slot[block] -> source_slot[block] = true; submit(SOURCE, block, write) } /* to_source */
      d_step { /* write_completed */
        land(SOURCE, block, write);
        complete(SOURCE, block, write);
        source_slot[block] = false;
        ordered(G + 1, block, write);
        captured[G + 1] = has_entry && state == STEADY;
        if :: has_entry && state != STEADY -> reserved-- :: else fi;
        G++;
#ifdef BUG_RULE_6
        if :: state == STEADY -> PREFIX :: else fi;
#endif
        write = 0; block = 0; has_entry = false
      }
    :: atomic { /* start: a flush is taken up */
        flushes < FLUSHES -> flushes++;
        request[_pid] = G; /* counts_flush_requested */
        waiting[_pid] = true
      }
      atomic { /* decide, let_go */
        waiting[_pid] && (failed[_pid] || (SOURCE_HOLDS(_pid) && CHECK_HELD(_pid) && RECORDED)) ->
        if :: !failed[_pid] -> promise(request[_pid]) :: else fi;
        waiting[_pid] = false;
        failed[_pid] = false;
        shares[_pid] = false;
        request[_pid] = 0
      }
    :: atomic { taken == WRITES && flushes == FLUSHES -> finished++; break }
    od
}

active proctype source_flusher() { /* flush_source, source_flushed */
    byte generation;
end:
    do
    :: atomic {
        NEEDS_SOURCE(0) || NEEDS_SOURCE(1) ->
        generation = G; /* at its beginning */
        shares[0] = waiting[0];
        shares[1] = waiting[1];
        flush_begin(0)
      }
      atomic {
        if
        :: flush_end(0);
#ifdef BUG_SOURCE_FLUSHED_AT_END
            generation = G;
#endif
            source_flushed = (generation > source_flushed -> generation : source_flushed)
#ifdef SOURCE_MAY_FAIL
        :: source_may_fail ->
            source_may_fail = false;
            flush_failed(0);
            failed[0] = failed[0] || (shares[0] && !SOURCE_HOLDS(0));
            failed[1] = failed[1] || (shares[1] && !SOURCE_HOLDS(1))
#endif
        fi;
        shares[0] = false;
        shares[1] = false;
        generation = 0
      }
    od
}

active proctype destination_flusher() { /* flush_destination, destination_flushed */
    byte prefix;
end:
    do
    :: atomic {
        !hangs && (NEEDS_DESTINATION(0) || NEEDS_DESTINATION(1)) ->
        prefix = M; /* at its beginning */
        flush_begin(1)
      }
      atomic {
        if
        :: !hangs ->
            flush_end(1);
#ifdef BUG_F_AT_END
            prefix = M;
#endif
            if :: state == STEADY -> F = (prefix > F -> prefix : F) :: else fi /* epoch */
        :: !hangs -> flush_failed(1); DEGRADE
        :: state == DEGRADED -> flush_failed(1) /* silent until after that, or for ever */
        fi;
        prefix = 0
      }
    od
}

#define AFTER(place, earlier) (place <= earlier || generation_block[earlier] != generation_block[place] || mirrored[earlier])

proctype replica(byte place) { /* replicator_pump, submit, replica_done */
    byte block, content;
end:
    atomic {
        G >= place && captured[place] && state == STEADY && !hangs && AFTER(place, 1) && AFTER(place, 2) ->
        block = generation_block[place];
        content = generation_content[place];
        submit(DESTINATION, block, content)
    }
    atomic {
        if
        :: !hangs -> /* in time, or of a former epoch */
            land(DESTINATION, block, content);
            complete(DESTINATION, block, content);
            mirrored[place] = true;
            reserved--;
            if :: state == STEADY -> PREFIX :: else fi
        :: !hangs && state == STEADY -> DEGRADE /* failed; what it may leave is in "may" already */
        :: state == DEGRADED -> skip /* silent for ever */
        fi;
        block = 0;
        content = 0
    }
}

/* mirror_pump, mirror_deadline_ns: the destination is given up at any moment, whatever is in flight. With
 * SILENCE the two steps are told apart: it falls silent for ever, and its deadline passes. */
#ifdef SILENCE
active proctype silence() {
end:
    atomic { state == STEADY && !hangs -> hangs = true }
}

#ifndef BUG_RULE_7
active proctype deadline() {
end:
    atomic { state == STEADY && hangs -> DEGRADE }
}
#endif
#else
active proctype deadline() {
end:
    atomic { state == STEADY -> DEGRADE }
}
#endif

active proctype recorder() { /* RecordKeeper._record_outdated, then record_written */
end:
    do
    :: atomic { record == PENDING && worth == UP_TO_DATE -> worth = OUTDATED } /* renamed and fsynced */
    :: atomic { record == PENDING && worth == OUTDATED -> record = WRITTEN }
    od
}

init {
    atomic {
        run replica(1);
        run replica(2);
#if WRITES > 2
        run replica(3)
#endif
    }
}

ALWAYS(counts_in_order, state != STEADY || (F <= M && M <= G && source_flushed <= G))
ALWAYS(flushed_is_on_the_source, SUFFICIENT(SOURCE))
ALWAYS(flushed_is_on_the_destination_that_the_record_trusts, worth != UP_TO_DATE || SUFFICIENT(DESTINATION))

#define waits0 (waiting[0])
#define waits1 (waiting[1])
#ifdef LIVENESS
ltl a_flush_is_answered { [] (waits0 -> <> !waits0) } /* the queues are alike */
#endif
