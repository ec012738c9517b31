/* SPDX-License-Identifier: Apache-2.0
 *
 * The switch: announcement, gate, drain, exchange, record, with and without --keep-mirror, and the destination lost
 * at any moment of it. Whatever disk the state record names has everything that was flushed, at every moment; and so
 * has the other one as long as the record calls it up to date. To a process that is started after a kill it names the
 * disk that the guest was on. What a guest reads is the same after the switch.
 *
 * Two queues, writes to two blocks, flushes; one write may fail on the source.
 */
#include "disks.pml"
#ifndef WRITES
#define WRITES 2
#endif
#ifndef FLUSHES
#define FLUSHES 2
#endif

mtype = { STEADY, DEGRADED, ALONE, OPEN, CLOSING, CLOSED, WRITTEN, PENDING };
mtype state = STEADY, gate = OPEN, record = WRITTEN;
bit current; /* e->source */
bit recorded; /* the disk that the state record names after a power cut */
bit named; /* and to whoever starts in the same boot, after a kill */
bool locked; /* RecordWriter.lock */
bool trusted = true; /* it calls the other one up to date */
bool keep_mirror, switched;

byte G, M, F, source_flushed;
byte taken, flushes, requests_in_flight, failed_writes, finished, epoch;
bool source_slot[BLOCKS], doubt[BLOCKS], mirrored[WRITES + 1], submitted[WRITES + 1], captured[WRITES + 1];
byte flushes_in_flight;

bool waiting[2];
byte request[2];

#define CHECK_HELD(q) (state != STEADY || request[q] <= F)
#define NEEDS_SOURCE(q) (waiting[q] && request[q] > source_flushed)
#define NEEDS_DESTINATION(q) (waiting[q] && state == STEADY && request[q] > F && request[q] <= M)
#ifdef BUG_SWITCH_GATE
#define TAKES_UP true
#else
#define TAKES_UP (gate == OPEN)
#endif

#define PREFIX \
    do :: M < G && (mirrored[M + 1] || !captured[M + 1]) -> M++ :: else -> break od

active [2] proctype queue() {
    byte write, block;
    bit disk;
    do
    :: atomic { /* take_up, start_write */
        taken < WRITES && TAKES_UP ->
        taken++;
        requests_in_flight++;
        write = taken;
        if :: block = 0 :: write > 1 -> block = 1 fi
      }
      atomic {
        !source_slot[block] ->
        source_slot[block] = true;
        disk = current;
        submit(disk, block, write)
      }
      atomic {
        source_slot[block] = false;
        requests_in_flight--;
        if
        :: land(disk, block, write); /* write_completed */
            complete(disk, block, write);
            doubt[block] = false;
            G++;
            ordered(G, block, write);
            captured[G] = (state == STEADY)
        :: failed_writes == 0 && !switched -> /* write_failed */
            failed_writes++;
            if :: land(disk, block, write) :: skip fi;
            complete(disk, block, write);
            doubt[block] = true
        fi;
        write = 0; block = 0; disk = 0
      }
    :: atomic {
        flushes < FLUSHES && TAKES_UP ->
        flushes++;
        requests_in_flight++;
        request[_pid] = G;
        waiting[_pid] = true
      }
      atomic {
        waiting[_pid] && request[_pid] <= source_flushed && CHECK_HELD(_pid) && record != PENDING ->
        promise(request[_pid]);
        requests_in_flight--;
        waiting[_pid] = false;
        request[_pid] = 0
      }
    :: atomic { taken == WRITES && flushes == FLUSHES -> finished++; break }
    od
}

active proctype source_flusher() {
    byte generation;
end:
    do
    :: atomic { NEEDS_SOURCE(0) || NEEDS_SOURCE(1) ->
        generation = G;
        flushes_in_flight++;
        if :: current == 0 -> flush_begin(0) :: else -> flush_begin(1) fi
      }
      atomic {
        if :: current == 0 -> flush_end(0) :: else -> flush_end(1) fi;
        flushes_in_flight--;
        source_flushed = (generation > source_flushed -> generation : source_flushed);
        generation = 0
      }
    od
}

active proctype destination_flusher() {
    byte count, mine;
end:
    do
    :: atomic { NEEDS_DESTINATION(0) || NEEDS_DESTINATION(1) ->
        count = M;
        mine = epoch;
        flushes_in_flight++;
        if :: current == 0 -> flush_begin(3) :: else -> flush_begin(2) fi
      }
      atomic {
        if :: flushing[3] -> flush_end(3) :: else -> flush_end(2) fi;
        flushes_in_flight--;
        if :: mine == epoch -> F = (count > F -> count : F) :: else fi;
        count = 0; mine = 0
      }
    od
}

#define TURN(place, earlier) (place <= earlier || generation_block[earlier] != generation_block[place] || \
    mirrored[earlier] || !captured[earlier])

proctype replica(byte place) {
    byte mine;
    bit disk;
end:
    atomic {
        G >= place && captured[place] && state == STEADY && TURN(place, 1) && TURN(place, 2) ->
        disk = 1 - current;
        mine = epoch;
        submitted[place] = true;
        submit(disk, generation_block[place], generation_content[place])
    }
    atomic {
        land(disk, generation_block[place], generation_content[place]);
        complete(disk, generation_block[place], generation_content[place]);
        submitted[place] = false;
        mirrored[place] = true;
        if :: state == STEADY && mine == epoch -> PREFIX :: else fi;
        mine = 0; disk = 0
    }
}

#ifdef BUG_SWITCH_DRAIN
#define DRAINED true
#else
#define DRAINED (M == G)
#endif
#ifdef BUG_RULE_5_SWITCH
#define CERTAIN true
#else
#define CERTAIN (!doubt[0] && !doubt[1])
#endif
#ifdef BUG_SWITCH_GATE
#define NOTHING_IN_FLIGHT true
#else
#define NOTHING_IN_FLIGHT (requests_in_flight == 0 && flushes_in_flight == 0)
#endif

inline take_back() { /* RecordWriter.take_back: the former record */
    atomic {
        recorded = current;
        named = current;
        trusted = true
    }
}

active proctype switcher() {
    byte generation;
    bool marks;
end:
    atomic { /* Switch.refuse_unless_possible; RecordWriter.prepare_switch: announced, under the lock */
        state == STEADY && CERTAIN ->
        if :: keep_mirror = true :: keep_mirror = false fi;
        if :: marks = true :: marks = false fi;
        locked = true;
#ifndef BUG_SWITCH_ANNOUNCE
        recorded = 1 - current;
        trusted = false;
#endif
        gate = CLOSING
    }
    atomic { /* gate_pump, drained; or too late, or the mirror is lost: gate_open */
        if
        :: gate == CLOSING && state == STEADY && NOTHING_IN_FLIGHT && DRAINED -> gate = CLOSED
        :: gate = OPEN; goto failed
        fi
    }
    atomic { /* Prepared.change, where there is no mark */
        if :: !marks -> named = 1 - current :: else fi
    }
    atomic { /* exchange_now, mirror_exchange, counts_exchange */
        if
        :: state == STEADY && CERTAIN ->
            assert(EQUAL(0) && EQUAL(1)); /* what the guest reads stays what it was */
            current = 1 - current;
            switched = true;
#ifndef BUG_SWITCH_MARK
            named = current;
#endif
            if
#ifdef BUG_SWITCH_COUNTS
            :: keep_mirror -> source_flushed = F
#else
            :: keep_mirror -> generation = source_flushed; source_flushed = F; F = generation; generation = 0
#endif
            :: else -> source_flushed = F; state = ALONE; epoch++; M = 0; F = 0
            fi;
            gate = OPEN
        :: else ->
#ifdef BUG_SWITCH_BACK
            gate = OPEN;
#endif
            if :: marks -> gate = OPEN :: else fi; /* nothing names the other disk in this boot */
            goto failed
        fi
    }
    atomic { /* RecordWriter.settle_switch */
        recorded = current;
        named = current;
        trusted = keep_mirror;
        locked = false
    }
    if
    :: false ->
failed:
        take_back(); /* first; then the guest goes on */
        atomic { gate = OPEN; locked = false }
    :: else -> skip
    fi;
    atomic { marks = false; keep_mirror = false }
}

active proctype degrade() { /* mirror_degrade, at any moment but between the halves of the exchange */
end:
    atomic {
        state == STEADY ->
        state = DEGRADED;
        record = PENDING;
        epoch++;
        M = 0; F = 0
    }
}

active proctype recorder() { /* RecordKeeper._record_outdated: names the disk that the guest is on */
end:
    atomic { record == PENDING && !locked -> recorded = current; named = current; trusted = false }
    atomic { record = WRITTEN }
}

init { atomic { run replica(1); run replica(2);
#if WRITES > 2
    run replica(3)
#endif
} }

ALWAYS(counts_in_order, state != STEADY || (F <= M && M <= G && source_flushed <= G))
/* Or on one that holds the same, but for a write that has failed. */
ALWAYS(a_kill_leaves_the_guest_on_its_disk,
    named == current || (gate != OPEN && (EQUAL(0) || doubt[0]) && (EQUAL(1) || doubt[1])))
ALWAYS(the_recorded_disk_has_what_was_flushed, SUFFICIENT(recorded))
ALWAYS(the_other_one_too_if_it_is_trusted, !trusted || SUFFICIENT(1 - recorded))
