/* SPDX-License-Identifier: Apache-2.0
 *
 * How much of the bulk copy is in flight while the guest works. See copy_pace.c.
 */
#ifndef VS_COPY_PACE_H
#define VS_COPY_PACE_H

#include <stdbool.h>
#include <stdint.h>

enum copy_disk { COPY_SOURCE, COPY_DESTINATION, COPY_DISKS };
enum { COPY_ROUND = 8 };

/* Of the copy's requests to one disk. */
struct copy_latency {
    uint64_t ns[COPY_ROUND]; /* in this round, in their order of size */
    unsigned seen;
    bool far;          /* with one part in flight none was faster than COPY_FAR_NS */
    uint64_t alone_ns; /* what one typically took then */
};

struct copy_pace {
    unsigned depth;        /* the most parts at once */
    uint64_t least_bytes;  /* of a part, and of the window */
    uint64_t window_bytes; /* so much may be in flight */
    uint64_t round;        /* what was submitted in another one says nothing about this one */
    unsigned pause_rounds; /* more was too much: so many rounds are left until it is tried again */
    uint64_t renew_ns;     /* then the disks are looked at anew */
    struct copy_latency disk[COPY_DISKS];
};

/* A copy of these regions begins, at most so many parts at once. */
void copy_pace_init(struct copy_pace *p, unsigned depth, uint64_t region_bytes, uint64_t now_ns);
/* A read of the source (a write of the destination), submitted in "round", has succeeded. */
void copy_pace_completed(struct copy_pace *p, enum copy_disk disk, uint64_t round, uint64_t latency_ns,
                         uint64_t now_ns);
/* What holds now: bytes of a part, how many of them at once, and how many of these may be at the source. */
uint64_t copy_pace_part_bytes(const struct copy_pace *p);
unsigned copy_pace_parts(const struct copy_pace *p);
unsigned copy_pace_reads(const struct copy_pace *p);

#endif
