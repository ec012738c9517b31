/* SPDX-License-Identifier: Apache-2.0
 *
 * Rule 3, one ordering point: the copy of what differs beside the replication of what is written, the way into
 * steady, and the ways out of it and back: pulled ahead of a slow destination, or the destination given up.
 *
 * Two queues, two writes to two regions, a flush. The mirror begins at any moment, with whatever is in flight
 * and not captured, and a destination that holds what was there before all writes. Once, while it copies or in
 * steady, it is left behind at any moment, and brought back by a resync.
 */
#include "disks.pml"
#ifndef WRITES
#define WRITES 2
#endif
#ifndef FLUSHES
#define FLUSHES 1
#endif

mtype = { SYNCING, STEADY, AHEAD, WRITTEN, PENDING, UP_TO_DATE, OUTDATED, INCONSISTENT };
mtype state = AHEAD, record = WRITTEN;
mtype worth = OUTDATED;
byte starts, leaves;
bool drains; /* ahead, the destination still attached */

byte G, M, F, R, source_flushed;
byte taken, flushes, finished, uncaptured_writes;
byte epoch, capture_epoch; /* of the destination, and of the log */
byte source_tickets[BLOCKS], source_served[BLOCKS]; /* source_slots: in the order of taking up */
bool differs[BLOCKS], to_copy[BLOCKS];
bool copy_in_use[BLOCKS];
byte reads[BLOCKS]; /* of this resync; for the property */
bool joining, steady_flush;
byte joining_request;

/* mirror.slots: who comes takes the next ticket of its region, and has its turn when it is served. */
byte tickets[BLOCKS], served[BLOCKS];

byte order_next = 1; /* log_peek */
bool captured[WRITES + 2], mirrored[WRITES + 2], placed[WRITES + 2];
byte ticket[WRITES + 2];
byte destination_in_flight; /* the fence */
byte good_then[BLOCKS] = 1; /* what a destination that is outdated since then may hold; for the property */

bool waiting[2];
byte request[2];

#define CAPTURING (state != AHEAD)
#define ATTACHED (state != AHEAD || drains)

/* log_mirrored_prefix */
inline prefix(count) {
    do
    :: count < G && (mirrored[count + 1] || !captured[count + 1]) -> count++
    :: else -> break
    od
}

/* log_mirrored_prefix() >= generation */
#define OVER(place, generation) ((generation) < place || mirrored[place] || !captured[place])
#define MIRRORED(generation) (OVER(1, generation) && OVER(2, generation) && OVER(3, generation))

#ifdef BUG_JOIN
#define MAY_JOIN true
#define JOINED(q) true
#else
#define MAY_JOIN MIRRORED(joining_request)
#define JOINED(q) (!joining || request[q] <= joining_request)
#endif
#define ANSWERED(q) (request[q] <= source_flushed && JOINED(q) && (state != STEADY || request[q] <= F) && record != PENDING)
#define NEEDS_SOURCE(q) (waiting[q] && request[q] > source_flushed)
#define NEEDS_DESTINATION(q) (waiting[q] && state == STEADY && request[q] > F && request[q] <= M)

#ifdef BUG_RECORD_AHEAD
#define LET_GO_RECORD skip
#else
#define LET_GO_RECORD record = PENDING
#endif
#ifdef BUG_RULE_2_TURNS
#define TAKE_SOURCE_SLOT
#define MY_TURN source_tickets[block] == source_served[block] -> source_tickets[block]++ /* whoever comes first */
#else
#define TAKE_SOURCE_SLOT turn = source_tickets[block]; source_tickets[block]++;
#define MY_TURN (source_served[block] == turn)
#endif

active [2] proctype queue() {
    byte write, block, mine, turn;
    bool capture;
    do
    :: atomic { /* take_up, start_write */
        taken < WRITES ->
        taken++;
        write = taken;
        if :: block = 0 :: write > 1 -> block = 1 fi;
        differs[block] = true; /* difference_mark */
        capture = CAPTURING;
        mine = capture_epoch;
        TAKE_SOURCE_SLOT
        if :: !capture -> uncaptured_writes++ :: else fi
      }
      atomic { MY_TURN -> submit(SOURCE, block, write) }
      d_step { land(SOURCE, block, write) }
      atomic { /* leave_source, write_completed, log_append */
        complete(SOURCE, block, write);
        source_served[block]++;
        G++;
        ordered(G, block, write);
        captured[G] = capture && mine == capture_epoch; /* still_captured */
        if :: !captured[G] -> uncaptured_writes-- :: else fi;
        write = 0; block = 0; mine = 0; turn = 0; capture = false
      }
    :: atomic { flushes < FLUSHES -> flushes++; request[_pid] = G; R = G; waiting[_pid] = true }
      atomic {
        waiting[_pid] && ANSWERED(_pid) ->
        promise(request[_pid]);
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
    :: atomic { NEEDS_SOURCE(0) || NEEDS_SOURCE(1) -> generation = G; flush_begin(0) }
      atomic {
        flush_end(0);
        source_flushed = (generation > source_flushed -> generation : source_flushed);
        generation = 0
      }
    od
}

active proctype destination_flusher() {
    byte count, mine;
end:
    do
    :: atomic {
        NEEDS_DESTINATION(0) || NEEDS_DESTINATION(1) ->
        count = M;
        mine = epoch;
        destination_in_flight++;
        flush_begin(1)
      }
      atomic {
        flush_end(1);
        destination_in_flight--;
        if :: mine == epoch -> F = (count > F -> count : F) :: else fi;
        count = 0; mine = 0
      }
    od
}

/* replicator_pump: in the order of the log, each takes its ticket, or is left to the copy. */
active proctype replicator() {
    byte block;
end:
    do
    :: atomic {
        ATTACHED && order_next <= G ->
        block = generation_block[order_next];
        if
        :: !captured[order_next]
        :: captured[order_next] && state == SYNCING && to_copy[block] -> mirrored[order_next] = true /* left_to_the_copy */
        :: captured[order_next] && !(state == SYNCING && to_copy[block]) ->
            placed[order_next] = true;
            ticket[order_next] = tickets[block];
            tickets[block]++
        fi;
        if :: state == STEADY -> prefix(M) :: else fi;
        order_next++;
        block = 0
      }
    od
}

proctype replica(byte place) {
    byte mine;
end:
    atomic {
        placed[place] && ATTACHED && served[generation_block[place]] == ticket[place] ->
        submit(DESTINATION, generation_block[place], generation_content[place]);
        destination_in_flight++;
        mine = epoch
    }
    atomic {
        land(DESTINATION, generation_block[place], generation_content[place]);
        complete(DESTINATION, generation_block[place], generation_content[place]);
        destination_in_flight--;
        if
        :: mine == epoch ->
            served[generation_block[place]]++;
            mirrored[place] = true;
            if :: state == STEADY -> prefix(M) :: else fi
        :: else
        fi;
        placed[place] = false; ticket[place] = 0; mine = 0
    }
}

/* One copy at a time of each region. */
proctype copier(byte region) {
    byte content, turn, mine;
end:
    do
#ifdef BUG_RULE_3
    :: atomic { state == SYNCING && uncaptured_writes == 0 && to_copy[region] && !copy_in_use[region] ->
        copy_in_use[region] = true;
        mine = epoch;
        content = now[AT(SOURCE, region)] /* the read before the place in the order */
      }
      atomic {
        to_copy[region] = false;
        turn = tickets[region];
        tickets[region]++
      }
#else
    :: atomic { /* copier_pump, place */
        state == SYNCING && uncaptured_writes == 0 && to_copy[region] && !copy_in_use[region] ->
        copy_in_use[region] = true;
        mine = epoch;
        to_copy[region] = false;
        turn = tickets[region];
        tickets[region]++
      }
      d_step { content = now[AT(SOURCE, region)] } /* start_reading, read_done */
#endif
      if
      :: atomic { mine != epoch -> skip } /* copier_drop */
      :: atomic { /* slot_granted, put_next */
            mine == epoch && served[region] == turn ->
            reads[region]++;
            assert(reads[region] == 1); /* no region is copied twice */
            submit(DESTINATION, region, content);
            destination_in_flight++
        }
        atomic { /* piece_done, finish_copy */
            land(DESTINATION, region, content);
            complete(DESTINATION, region, content);
            destination_in_flight--;
            if :: mine == epoch -> served[region]++ :: else fi
        }
      fi;
      d_step { copy_in_use[region] = false; content = 0; turn = 0; mine = 0 }
    od
}

/* close_former, or is_drained. */
#define NOTHING_LEFT (!copy_in_use[0] && !copy_in_use[1] && !placed[1] && !placed[2] && (!drains || order_next > G))

active proctype mirror() {
    byte count;
    bool was_steady;
end:
    do
    :: atomic { /* Mirror._attach: recorded before the first byte goes there; close_former: the fence */
        state == AHEAD && starts < 2 && destination_in_flight == 0 && NOTHING_LEFT && record == WRITTEN ->
        starts++;
#ifndef BUG_RECORD_RESYNC
        worth = INCONSISTENT
#endif
      }
      atomic { /* mirror_start, copier_start */
        state = SYNCING;
        drains = false;
        to_copy[0] = differs[0];
        to_copy[1] = differs[1];
        reads[0] = 0; reads[1] = 0;
        tickets[0] = 0; tickets[1] = 0;
        served[0] = 0; served[1] = 0;
        order_next = G + 1
      }
    :: atomic { /* mirror_pump, begin_steady */
        state == SYNCING && uncaptured_writes == 0 && !to_copy[0] && !to_copy[1] && !copy_in_use[0] && !copy_in_use[1] ->
        joining = true;
        joining_request = R;
        count = 0
      }
      atomic {
        MAY_JOIN ->
        prefix(count);
        flush_begin(3)
      }
      atomic { /* steady_flushed, counts_enter_steady */
        flush_end(3);
        joining = false;
        joining_request = 0;
        M = count;
        F = count;
        prefix(M);
        state = STEADY;
        count = 0
      }
      atomic { worth = UP_TO_DATE } /* RecordKeeper._follow */
    :: atomic {
        (state == STEADY || state == SYNCING) && leaves < 1 ->
        leaves++;
        capture_epoch++; /* mirror_stop_capture */
        if :: state == STEADY -> LET_GO_RECORD; was_steady = true :: else fi;
        state = AHEAD;
        M = 0; F = 0;
        /* A copy may have read what is on its way to the source: a state that the source could have had, too. */
        good_then[0] = good[0] & (replaced[0] | in_flight[AT(SOURCE, 0)]);
        good_then[1] = good[1] & (replaced[1] | in_flight[AT(SOURCE, 1)]);
        uncaptured_writes = taken - G; /* those that were captured are not any more */
        if
        :: drains = true /* pull_ahead.c: what the log holds still goes there, in its order */
        :: drains = false; /* mirror_degrade, give_up: log_drop_untaken, replicator_drop, copier_drop */
            captured[1] = false; captured[2] = false;
            placed[1] = false; placed[2] = false;
            to_copy[0] = false; to_copy[1] = false;
            epoch++
        fi
      }
      if
      :: atomic { was_steady -> worth = OUTDATED } /* RecordKeeper._record_outdated */
      :: atomic { !was_steady -> skip }
      fi;
      atomic { record = WRITTEN; was_steady = false }
    od
}

init {
    atomic { run replica(1); run replica(2); run replica(3); run copier(0); run copier(1) }
end:
    atomic {
        finished == 2 && state == STEADY && M == G && worth == UP_TO_DATE ->
        assert(EQUAL(0) && EQUAL(1));
        assert(leaves == 0 || starts == 2)
    }
}

#define FROM_THEN(block) ((may[AT(DESTINATION, block)] & ~good_then[block]) == 0)
ALWAYS(counts_in_order, state != STEADY || (F <= M && M <= G && source_flushed <= G))
ALWAYS(flushed_is_on_the_source, SUFFICIENT(SOURCE))
ALWAYS(an_up_to_date_destination_has_what_was_flushed, worth != UP_TO_DATE || SUFFICIENT(DESTINATION))
ALWAYS(an_outdated_destination_is_of_that_moment, worth != OUTDATED || (FROM_THEN(0) && FROM_THEN(1)))
