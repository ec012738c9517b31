/* SPDX-License-Identifier: Apache-2.0
 *
 * Two disks with volatile caches, and what the guest was promised. Every model includes this.
 *
 * A block's content is the number of the write that it came from; 0 is what was there before. For each block
 *   now   what a read gives,
 *   may   the set of contents that a power cut at this moment may leave: all that was submitted since the last
 *         flush, completed or not, and what that flush has made durable. A cache may lose or keep each block
 *         by itself, so a set for each block says it all, and no model has to try the cuts one by one: an
 *         invariant about "may" speaks of every cut at every moment.
 *   good  the contents that a disk may hold without losing what was flushed (a property, not part of the code).
 *
 * submit, land and complete are three steps: a write may be on the medium before its completion is seen, and
 * two in flight at once may land in another order than they complete.
 */
#define BLOCKS 2
#define ONE(content) (1 << (content))
#define AT(disk, block) ((disk) * BLOCKS + (block))
#define SOURCE 0
#define DESTINATION 1

byte now[4], over[4]; /* over: as now, of what has completed */
byte may[4] = 1;
byte in_flight[4];

/* A flush covers what had completed when it began. Two for each disk may run: number % 2 is the disk. */
byte keep[8];
bool flushing[4];

inline submit(disk, block, content) {
    may[AT(disk, block)] = may[AT(disk, block)] | ONE(content);
    in_flight[AT(disk, block)] = in_flight[AT(disk, block)] | ONE(content);
    if :: flushing[disk] -> keep[AT(disk, block)] = keep[AT(disk, block)] | ONE(content) :: else fi;
    if :: flushing[2 + (disk)] -> keep[AT(2 + (disk), block)] = keep[AT(2 + (disk), block)] | ONE(content) :: else fi
}

inline land(disk, block, content) { now[AT(disk, block)] = content }

inline complete(disk, block, content) {
    in_flight[AT(disk, block)] = in_flight[AT(disk, block)] & ~ONE(content);
    over[AT(disk, block)] = now[AT(disk, block)]
}

inline flush_begin(number) {
    flushing[number] = true;
    keep[AT(number, 0)] = ONE(over[AT((number) % 2, 0)]) | in_flight[AT((number) % 2, 0)];
    keep[AT(number, 1)] = ONE(over[AT((number) % 2, 1)]) | in_flight[AT((number) % 2, 1)]
}

inline flush_failed(number) {
    flushing[number] = false;
    keep[AT(number, 0)] = 0;
    keep[AT(number, 1)] = 0
}

/* & may: another flush may have made more durable meanwhile. */
inline flush_end(number) {
    may[AT((number) % 2, 0)] = may[AT((number) % 2, 0)] & keep[AT(number, 0)];
    may[AT((number) % 2, 1)] = may[AT((number) % 2, 1)] & keep[AT(number, 1)];
    flush_failed(number)
}

/* ---- what was promised: for each generation its block, and the contents that it has replaced ---------- */

byte generation_block[5], generation_replaced[5], generation_content[5];
byte replaced[BLOCKS] = 1;
byte good[BLOCKS] = 255;
byte promised;

/* counts_write_completed, seen from outside: the write has its place in the order. */
inline ordered(generation, block, content) {
    generation_block[generation] = block;
    generation_content[generation] = content;
    generation_replaced[generation] = replaced[block];
    replaced[block] = replaced[block] | ONE(content)
}

/* A flush that covers all up to "generation" was confirmed to the guest. */
inline promise(generation) {
    do
    :: promised < (generation) ->
        promised++;
        good[generation_block[promised]] = good[generation_block[promised]] & ~generation_replaced[promised]
    :: else -> break
    od
}

/* Whatever a cut leaves of this disk, it has every flushed write, and nothing older in its place. */
#define SUFFICIENT(disk) ((may[AT(disk, 0)] & ~good[0]) == 0 && (may[AT(disk, 1)] & ~good[1]) == 0)
#define EQUAL(block) (now[AT(SOURCE, block)] == now[AT(DESTINATION, block)])

/* A process that can only run when the invariant is broken: looked at in each state, costs no states. */
#define ALWAYS(name, invariant) active proctype name() { end: atomic { !(invariant) -> assert(false) } }
