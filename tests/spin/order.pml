/* SPDX-License-Identifier: Apache-2.0
 *
 * Rules 1, 2 and 9: the same bytes, in the same order where it shows, read the same afterwards.
 *
 * Two queues, three writes or discards to two blocks, a guest that scribbles on its buffers at any moment. All
 * is mirrored; at the end both disks are equal, and at every moment the destination holds, block by block,
 * only what the source has held.
 */
#include "disks.pml"
#define WRITES 3

byte taken, G, finished;
byte buffer[WRITES + 1]; /* in guest memory */
bool source_slot[BLOCKS]; /* e->source_slots */

byte entry_block[WRITES + 1], entry_content[WRITES + 1]; /* the log, by place in its order */
bool mirrored[WRITES + 1];
byte held[BLOCKS] = 1; /* what the source has held; for the property */

active [2] proctype queue() {
    byte content, block, write;
    do
    :: atomic { /* take_up, start_write, gather_data */
        taken < WRITES ->
        taken++;
        write = taken;
        if :: block = 0 :: write > 1 -> block = 1 fi; /* the first one's block is called 0 */
        if
        :: buffer[write] = write; content = write
        :: content = 0 /* discard or write-zeroes: reads as zeroes afterwards */
        fi
      }
#ifndef BUG_RULE_2_SOURCE
      atomic { !source_slot[block] -> source_slot[block] = true } /* range_take, slot_granted */
#endif
      d_step { /* to_source */
#ifdef BUG_RULE_1
        if :: content != 0 -> content = buffer[write] :: else fi; /* from guest memory instead of the capture */
#endif
        submit(SOURCE, block, content);
        held[block] = held[block] | ONE(content)
      }
      d_step { land(SOURCE, block, content) }
      d_step { /* source_done, leave_source, write_completed, log_append */
        complete(SOURCE, block, content);
        source_slot[block] = false;
        entry_block[G + 1] = block;
#ifdef BUG_RULE_1
        entry_content[G + 1] = (content -> write : 0);
#else
        entry_content[G + 1] = content;
#endif
        G++;
        write = 0; content = 0; block = 0
      }
    :: atomic { taken == WRITES -> finished++; break }
    od
}

/* The guest may change a buffer at any moment: the source was written with the old bytes or the new ones. */
active proctype scribbler() {
    byte write;
    atomic {
        taken > 0 ->
        if :: write = taken :: taken > 1 -> write = taken - 1 fi;
        if :: buffer[write] != 0 -> buffer[write] = write + 3 :: else fi;
        write = 0
    }
}

/* range_take in mirror.slots: what overlaps and is earlier in the log is over. */
#ifdef BUG_RULE_2_DESTINATION
#define TURN(place, earlier) true
#else
#define TURN(place, earlier) (place <= earlier || entry_block[earlier] != entry_block[place] || mirrored[earlier])
#endif

/* One entry on its way to the destination: replicator_pump, submit, replica_done. */
proctype replica(byte place) {
    byte block, content, neighbour;
    atomic {
        G >= place && TURN(place, 1) && TURN(place, 2) ->
        block = entry_block[place];
        content = entry_content[place];
#ifdef BUG_RULE_9_BLOCK
        neighbour = now[AT(DESTINATION, 1 - block)]; /* a larger logical block: read, modify, write */
#endif
        submit(DESTINATION, block, content)
    }
    d_step {
#ifdef BUG_RULE_9
        if :: content != 0 -> land(DESTINATION, block, content) :: else fi /* EOPNOTSUPP taken for done */
#else
        land(DESTINATION, block, content)
#endif
    }
#ifdef BUG_RULE_9_BLOCK
    d_step { now[AT(DESTINATION, 1 - block)] = neighbour }
#endif
    d_step { complete(DESTINATION, block, content); mirrored[place] = true }
}

init {
    atomic { run replica(1); run replica(2); run replica(3) }
    atomic {
        finished == 2 && mirrored[1] && mirrored[2] && mirrored[3] ->
        assert(EQUAL(0) && EQUAL(1))
    }
}

ALWAYS(only_what_the_source_has_held,
    (may[AT(DESTINATION, 0)] & ~held[0]) == 0 && (may[AT(DESTINATION, 1)] & ~held[1]) == 0)
