/* SPDX-License-Identifier: Apache-2.0
 *
 * Rules 4, 5 and 8: bits before data, checkpoints, ranges in doubt, and the fence before a destination comes
 * back. A region without its bit is equal on both disks after a power cut of both at any moment; a restart is
 * such a cut (or less), so what it copies is enough.
 *
 * Two queues, writes to two regions, one of which may fail on the source. Once, at any moment, the destination
 * is given up, with writes of its own still on their way, and attached again for a resync; or the guest gets
 * ahead of it, and it catches up.
 */
#include "disks.pml"
#ifndef WRITES
#define WRITES 2
#endif

mtype = { SYNCING, STEADY, AHEAD, DEGRADED, NONE, MIRRORING, FLUSHING };
mtype state = STEADY, step = NONE;

byte G, taken, failed_writes, finished, uncaptured_writes;
byte epoch, capture_epoch; /* of the destination, and of the log */
byte generation; /* that the checkpoint waits for */
byte checkpoint_flushes;
byte source_tickets[BLOCKS], source_served[BLOCKS]; /* source_slots: in the order of taking up */
bool doubt[BLOCKS];
byte at_source[BLOCKS]; /* writes taken up and not over: request_path_mark_in_flight */
bool differs[BLOCKS], recent[BLOCKS], settling[BLOCKS], to_copy[BLOCKS], copy_in_use[BLOCKS];
byte tickets[BLOCKS], served[BLOCKS], ticket[WRITES + 2], order_next = 1;
bool captured[WRITES + 2], mirrored[WRITES + 2], placed[WRITES + 2];
byte destination_in_flight;

#define CAPTURING (state == STEADY || state == SYNCING)
#define ATTACHED (state != DEGRADED)

/* log_mirrored_prefix() >= generation */
#define OVER(place, generation) ((generation) < place || mirrored[place] || !captured[place])
#define MIRRORED(generation) (OVER(1, generation) && OVER(2, generation) && OVER(3, generation))

inline mark(region) { /* difference_mark */
    differs[region] = true;
    if :: ATTACHED -> recent[region] = true :: else fi
}

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
    :: atomic { /* start_write */
        taken < WRITES ->
        taken++;
        write = taken;
        if :: block = 0 :: write > 1 -> block = 1 fi;
        capture = CAPTURING;
        mine = capture_epoch;
        at_source[block]++;
        TAKE_SOURCE_SLOT
        if :: !capture -> uncaptured_writes++ :: else fi;
#ifndef BUG_RULE_4
        mark(block)
#endif
      }
      atomic { MY_TURN -> submit(SOURCE, block, write) }
      atomic { /* leave_source */
        source_served[block]++;
        at_source[block]--;
#ifdef BUG_RULE_4
        mark(block); /* when it is over */
#endif
        if
        :: land(SOURCE, block, write); /* write_completed, range_set_clear, log_append */
            complete(SOURCE, block, write);
            doubt[block] = false;
            G++;
            generation_block[G] = block;
            generation_content[G] = write;
            captured[G] = capture && mine == capture_epoch; /* still_captured */
            if :: !captured[G] -> uncaptured_writes-- :: else fi
        :: failed_writes == 0 -> /* write_failed: it may be there or not */
            failed_writes++;
            if :: land(SOURCE, block, write) :: skip fi;
            complete(SOURCE, block, write);
            doubt[block] = true;
            if :: !(capture && mine == capture_epoch) -> uncaptured_writes-- :: else fi
        fi;
        write = 0; block = 0; mine = 0; turn = 0; capture = false
      }
    :: atomic { taken == WRITES -> finished++; break }
    od
}

active proctype replicator() {
    byte block;
end:
    do
    :: atomic {
        ATTACHED && order_next <= G ->
        block = generation_block[order_next];
        if
        :: !captured[order_next]
        :: captured[order_next] && state == SYNCING && to_copy[block] -> mirrored[order_next] = true
        :: captured[order_next] && !(state == SYNCING && to_copy[block]) ->
            placed[order_next] = true;
            ticket[order_next] = tickets[block];
            tickets[block]++
        fi;
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
    atomic { /* maybe long after it was given up */
        land(DESTINATION, generation_block[place], generation_content[place]);
        complete(DESTINATION, generation_block[place], generation_content[place]);
        destination_in_flight--;
        if :: mine == epoch -> served[generation_block[place]]++; mirrored[place] = true :: else fi;
        placed[place] = false; ticket[place] = 0; mine = 0
    }
}

/* Never a region in doubt: what cannot be trusted is not copied over a good destination. */
proctype copier(byte region) {
    byte content, turn;
end:
    do
    :: atomic {
        state == SYNCING && uncaptured_writes == 0 && to_copy[region] && !copy_in_use[region] ->
        copy_in_use[region] = true;
        mark(region); /* place */
        to_copy[region] = false;
        turn = tickets[region];
        tickets[region]++
      }
      d_step { content = now[AT(SOURCE, region)] }
      atomic { served[region] == turn -> submit(DESTINATION, region, content); destination_in_flight++ }
      atomic {
        land(DESTINATION, region, content);
        complete(DESTINATION, region, content);
        destination_in_flight--;
        served[region]++;
        copy_in_use[region] = false;
        content = 0; turn = 0
      }
    od
}

#ifdef BUG_RULE_5
#define IN_DOUBT(region) false
#else
#define IN_DOUBT(region) doubt[region]
#endif
#ifdef BUG_RULE_4_RECENT
#define AGAIN(region) false
#else
#define AGAIN(region) recent[region]
#endif

inline settle(region) { /* region_is_kept, settle */
    if
    :: settling[region] && !AGAIN(region) && !to_copy[region] && !IN_DOUBT(region) -> differs[region] = false
    :: else
    fi;
    settling[region] = false
}

#ifdef BUG_RULE_4_IN_FLIGHT
#define IN_FLIGHT(region) false
#else
#define IN_FLIGHT(region) (at_source[region] > 0 || copy_in_use[region])
#endif

active proctype checkpoint() {
    byte mine;
end:
    do
    :: atomic { /* rotate */
        CAPTURING && step == NONE && (recent[0] || recent[1]) && checkpoint_flushes == 0 ->
        step = MIRRORING;
        settling[0] = recent[0];
        settling[1] = recent[1];
        recent[0] = IN_FLIGHT(0);
        recent[1] = IN_FLIGHT(1);
        generation = G
      }
    :: atomic { /* flush_both, when all of it is mirrored */
        ATTACHED && step == MIRRORING && MIRRORED(generation) && checkpoint_flushes == 0 ->
        step = FLUSHING;
        mine = epoch;
        checkpoint_flushes = 2;
        flush_begin(0);
        flush_begin(1);
        destination_in_flight++
      }
      atomic { flush_end(0); checkpoint_flushes-- }
      atomic { /* flushed, and if nothing has begun it anew or ended it meanwhile: settle */
#ifdef BUG_RULE_4_FLUSH
        flush_failed(1); /* only the source is flushed */
#else
        flush_end(1);
#endif
        checkpoint_flushes--;
        destination_in_flight--;
        if
        :: step == FLUSHING && mine == epoch -> settle(0); settle(1); step = NONE; generation = 0
        :: else
        fi;
        mine = 0
      }
    od
}

#ifdef BUG_RULE_8
#define FENCED true
#else
#define FENCED (destination_in_flight == 0)
#endif

#ifdef BUG_AHEAD
#define MAY_DIFFER_SOON(region) false
#else
#define MAY_DIFFER_SOON(region) (at_source[region] > 0)
#endif

inline stop_capture() { /* mirror_stop_capture */
    capture_epoch++;
    uncaptured_writes = at_source[0] + at_source[1]
}

active proctype mirror() {
end:
    atomic {
        state == STEADY ->
        stop_capture();
        if
        :: state = DEGRADED; /* give_up, difference_detach, replicator_drop */
            epoch++;
            step = NONE;
            generation = 0;
            settling[0] = false; settling[1] = false;
            recent[0] = false; recent[1] = false;
            captured[1] = false; captured[2] = false; /* log_drop_untaken */
            placed[1] = false; placed[2] = false
        :: state = AHEAD; /* get_ahead, difference_pull_ahead: the log goes on to the destination */
            settling[0] = settling[0] || recent[0];
            settling[1] = settling[1] || recent[1];
            recent[0] = MAY_DIFFER_SOON(0);
            recent[1] = MAY_DIFFER_SOON(1);
            generation = G;
            step = MIRRORING
        fi
    }
end2:
    atomic { /* close_former, mirror_start, difference_attach, copier_start; or is_drained, pull_ahead_catch_up */
        (state == DEGRADED && FENCED) ||
        (state == AHEAD && order_next > G && MIRRORED(G) && step == NONE && checkpoint_flushes == 0) ->
        state = SYNCING;
        to_copy[0] = differs[0];
        to_copy[1] = differs[1];
        tickets[0] = 0; tickets[1] = 0;
        served[0] = 0; served[1] = 0;
        order_next = G + 1
    }
}

init {
    atomic { run replica(1); run replica(2); run replica(3); run copier(0); run copier(1) }
}

#define ONE_CONTENT(disk, block) ((may[AT(disk, block)] & (may[AT(disk, block)] - 1)) == 0)
#define CLEAN_IS_EQUAL(block) (differs[block] || \
    (may[AT(SOURCE, block)] == may[AT(DESTINATION, block)] && ONE_CONTENT(SOURCE, block)))
ALWAYS(what_has_no_bit_is_equal_after_any_cut, CLEAN_IS_EQUAL(0) && CLEAN_IS_EQUAL(1))
