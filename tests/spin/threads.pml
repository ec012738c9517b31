/* SPDX-License-Identifier: Apache-2.0
 *
 * The channels between the data thread and its I/O threads, and how each of them goes to sleep and is woken
 * (io_threads.c): no job is left behind while everybody sleeps, and who takes a job sees what was written into it.
 *
 * Memory is not sequentially consistent here. A store may stay where only its own thread sees it for as long as it
 * likes: those to one place keep their order, those to different places do not, but for a release, which is seen after
 * all that was stored before it. A full fence waits until all of them are seen. So a store may pass the loads that
 * follow it, as it may on x86 and ARM. Loads that pass each other are not played: each look that decides is behind a
 * fence or an acquire.
 */
#ifndef IO_THREADS
#define IO_THREADS 1
#endif
#ifndef JOBS
#define JOBS 3
#endif

#define DATA 0 /* the data thread; 1 .. IO_THREADS: the others */
#define CHANNELS (2 * IO_THREADS)
#define TODO(thread) ((thread) - 1)
#define DONE(thread) (IO_THREADS + (thread) - 1)

byte put[CHANNELS];     /* the tail as its giver knows it, */
byte tail[CHANNELS];    /* and as everybody sees it */
byte written[CHANNELS]; /* jobs of which everybody sees what is in them */
byte head[CHANNELS];    /* its taker's */

bool asleep[1 + IO_THREADS];
bool says[1 + IO_THREADS], unseen[1 + IO_THREADS]; /* what its owner has stored last, and nobody else sees yet */
bool signalled[1 + IO_THREADS]; /* a completion of the poll of its eventfd stands in its ring */
bool stop[1 + IO_THREADS];

byte asked, lent, returned; /* requests of the guest, jobs made of them, and those that are over */
byte in_ring[1 + IO_THREADS], completed[1 + IO_THREADS]; /* jobs of an I/O thread that the kernel does */

/* ---- memory ------------------------------------------------------------------- */

#ifdef BUG_RELEASE
#define TAIL_MAY_BE_SEEN(c) (tail[c] < put[c])
#else
#define TAIL_MAY_BE_SEEN(c) (tail[c] < written[c])
#endif

/* Each store is seen at some time; of a tail's, one after the other. */
proctype memory(byte c) {
end:
    do
    :: atomic { written[c] < put[c] -> written[c]++ }
    :: atomic { TAIL_MAY_BE_SEEN(c) -> tail[c]++ }
    od
}

proctype flag(byte t) {
end:
    do
    :: atomic { unseen[t] -> asleep[t] = says[t]; unseen[t] = false }
    od
}

inline store_asleep(t, value) { atomic { says[t] = value; unseen[t] = true } }

/* ---- channels, sleeping and waking -------------------------------------------------- */

#define HOLDS(c) (tail[c] > head[c])

inline channel_put(c) { put[c]++ }

inline channel_take(c) {
    atomic {
        assert(written[c] > head[c]); /* what was put in is seen, not only that something was */
        head[c]++
    }
}

/* Thread t has put into channel c, for thread other. */
inline must_wake(t, c, other) {
#ifndef BUG_FENCE_WAKE
    !unseen[t] && tail[c] == put[c];
#endif
    if
    :: !asleep[other]
    :: asleep[other];
        atomic { mine = asleep[other]; asleep[other] = false } /* exchange */
        if :: mine -> signalled[other] = true :: !mine fi; /* maybe much later */
        mine = false
    fi
}

#ifdef BUG_LOOK_BEFORE_PUT
#define HAND_OVER(t, c, other) must_wake(t, c, other); channel_put(c)
#define WAKE(t, c, other)
#else
#define HAND_OVER(t, c, other) channel_put(c)
#define WAKE(t, c, other) must_wake(t, c, other);
#endif

inline say_asleep(t) {
    store_asleep(t, true);
#ifndef BUG_FENCE_SLEEP
    !unseen[t]
#endif
}

#ifdef BUG_LAST_LOOK
#define LAST_LOOK(found) false
#else
#define LAST_LOOK(found) (found)
#endif

/* ---- the threads ---------------------------------------------------------------------- */

#if IO_THREADS == 1
#define CHOOSE_THREAD to = 1
#define SOMETHING_IS_BACK HOLDS(DONE(1))
#define TAKES_TIME true
#else
#define CHOOSE_THREAD if :: to = 1 :: to = 2 fi
#define SOMETHING_IS_BACK (HOLDS(DONE(1)) || HOLDS(DONE(2)))
#define TAKES_TIME false /* else there are too many states */
#endif

active proctype data() {
    byte to;
    bool mine;
    do
    :: do /* io_threads_take_back */
       :: HOLDS(DONE(1)) -> channel_take(DONE(1)); returned++
#if IO_THREADS > 1
       :: HOLDS(DONE(2)) -> channel_take(DONE(2)); returned++
#endif
       :: !SOMETHING_IS_BACK -> break
       od;
       do /* io_threads_lend */
       :: lent < asked -> CHOOSE_THREAD; lent++; HAND_OVER(DATA, TODO(to), to); to = 0
       :: break
       od;
       WAKE(DATA, TODO(1), 1) /* io_threads_wake */
#if IO_THREADS > 1
       WAKE(DATA, TODO(2), 2)
#endif
       if :: returned == JOBS -> break :: else fi;
       say_asleep(DATA); /* io_threads_may_sleep */
       if
       :: LAST_LOOK(SOMETHING_IS_BACK)
       :: !LAST_LOOK(SOMETHING_IS_BACK) -> signalled[DATA] || lent < asked /* io_uring_enter */
       fi;
       store_asleep(DATA, false);
       signalled[DATA] = false /* uring_reap */
    od;
    for (to : 1 .. IO_THREADS) { /* io_threads_stop: a system call orders the two */
        atomic { stop[to] = true; signalled[to] = true }
    }
}

proctype io(byte t) {
    bool mine, finished;
    do
    :: do /* begin_batch */
       :: HOLDS(TODO(t)) ->
           channel_take(TODO(t));
           if
           :: HAND_OVER(t, DONE(t), DATA); finished = true /* done at once */
           :: TAKES_TIME -> in_ring[t]++
           fi
       :: finished -> finished = false; WAKE(t, DONE(t), DATA) /* WAKE_EARLY */
       :: break
       od;
       if :: finished -> finished = false; WAKE(t, DONE(t), DATA) :: !finished fi; /* look_after_data_thread */
       say_asleep(t); /* may_sleep */
       if
       :: LAST_LOOK(HOLDS(TODO(t)) || stop[t])
       :: !LAST_LOOK(HOLDS(TODO(t)) || stop[t]) -> signalled[t] || completed[t] > 0 /* io_uring_enter */
       fi;
       store_asleep(t, false);
       signalled[t] = false; /* uring_reap */
       do
       :: completed[t] > 0 -> completed[t]--; HAND_OVER(t, DONE(t), DATA); finished = true
       :: completed[t] == 0 -> break
       od;
       if :: stop[t] -> break :: !stop[t] fi
    od
}

/* Something completes at any time, a request comes at any time. */
proctype kernel(byte t) {
end:
    do
    :: atomic { in_ring[t] > 0 -> in_ring[t]--; completed[t]++ }
    od
}

active proctype guest() {
    do
    :: asked < JOBS -> asked++
    :: asked == JOBS -> break
    od
}

init {
    byte n;
    atomic {
        for (n : 0 .. CHANNELS - 1) { run memory(n) }
        for (n : 0 .. IO_THREADS) { run flag(n) }
        for (n : 1 .. IO_THREADS) { run io(n); run kernel(n) }
    }
    timeout; /* nobody can go on */
    assert(returned == JOBS && stop[IO_THREADS])
}
