/* SPDX-License-Identifier: Apache-2.0 */
#include "range_slots.h"

#include "harness.h"

#define SLOTS 24

static struct range_slots set;
static struct actor {
    struct range_slot slot; /* first: the two share an address */
    bool used, granted;
    uint64_t start, end, asked; /* asked: when, in the order of asking */
} actor[SLOTS];
static uint64_t clock_now;
static int grants;

static bool overlap(const struct actor *a, const struct actor *b)
{
    return a->start < b->end && b->start < a->end;
}

/* As the header says it: granted when no overlapping slot that asked before is still there. */
static bool turn_has_come(const struct actor *a)
{
    for (int i = 0; i < SLOTS; i++)
        if (actor[i].used && &actor[i] != a && actor[i].asked < a->asked && overlap(&actor[i], a))
            return false;
    return true;
}

static void on_grant(struct range_slot *slot)
{
    struct actor *a = (struct actor *)slot;
    CHECK(a->used && !a->granted);
    CHECK(turn_has_come(a));
    a->granted = true;
    grants++;
}

static bool ask(struct actor *a, uint64_t offset, uint64_t length)
{
    a->used = true;
    a->start = offset;
    a->end = offset + length;
    a->asked = ++clock_now;
    a->slot.grant = on_grant;
    a->granted = range_take(&set, &a->slot, offset, length);
    CHECK_EQUAL(a->granted, turn_has_come(a));
    return a->granted;
}

static void give_back(struct actor *a)
{
    a->used = false;
    range_release(&set, &a->slot);
}

static void begin_slots(void)
{
    memset(actor, 0, sizeof actor);
    grants = 0;
    range_slots_init(&set);
}

/* Nothing that may go waits, and nothing that must wait goes. */
static void check_all(void)
{
    unsigned waiting = 0;
    for (int i = 0; i < SLOTS; i++) {
        if (actor[i].used)
            CHECK_EQUAL(actor[i].granted, turn_has_come(&actor[i]));
        waiting += actor[i].used && !actor[i].granted;
    }
    CHECK_EQUAL(set.waiting, waiting);
}

static void apart(void)
{
    begin_slots();
    CHECK(ask(&actor[0], 0, 4096));
    CHECK(ask(&actor[1], 4096, 4096)); /* neighbours do not overlap */
    CHECK(ask(&actor[2], 1 << 30, 512));
    check_all();
}

static void in_turn(void)
{
    begin_slots();
    CHECK(ask(&actor[0], 0, 8192));
    CHECK(!ask(&actor[1], 4096, 8192));
    CHECK(!ask(&actor[2], 8192, 512)); /* does not overlap the first, but one that waits for it */
    CHECK(ask(&actor[3], 16384, 512));
    give_back(&actor[0]);
    CHECK(actor[1].granted && !actor[2].granted);
    give_back(&actor[1]);
    CHECK(actor[2].granted);
    check_all();
}

/* A slot that is given back before its turn lets those behind it go. */
static void given_up(void)
{
    begin_slots();
    CHECK(ask(&actor[0], 0, 512));
    CHECK(!ask(&actor[1], 0, 2048));
    CHECK(!ask(&actor[2], 1024, 1024));
    give_back(&actor[1]);
    CHECK(actor[2].granted);
    check_all();
}

static void many_at_once(void)
{
    begin_slots();
    CHECK(ask(&actor[0], 0, 10240));
    for (int i = 1; i <= 10; i++)
        CHECK(!ask(&actor[i], (uint64_t)(i - 1) * 1024, 1024));
    give_back(&actor[0]);
    CHECK_EQUAL(grants, 10);
    check_all();
}

/* A granted operation that asks for more from within grant(). */
static void on_grant_ask_again(struct range_slot *slot)
{
    on_grant(slot);
    if (!actor[2].used)
        CHECK(!ask(&actor[2], 512, 512));
}

static void ask_within_grant(void)
{
    begin_slots();
    CHECK(ask(&actor[0], 0, 4096));
    CHECK(!ask(&actor[1], 0, 4096));
    actor[1].slot.grant = on_grant_ask_again;
    give_back(&actor[0]);
    CHECK(actor[1].granted && actor[2].used && !actor[2].granted);
    give_back(&actor[1]);
    CHECK(actor[2].granted);
    check_all();
}

/* Wide ranges stand outside the filter. */
static void wide(void)
{
    uint64_t much = (uint64_t)(RANGE_WIDE_CHUNKS + 4) * RANGE_CHUNK_BYTES;
    begin_slots();
    CHECK(ask(&actor[0], 0, much));
    CHECK(!ask(&actor[1], much - 512, 512));
    CHECK(ask(&actor[2], much, 512));
    CHECK(!ask(&actor[3], 0, 2 * much));
    give_back(&actor[0]);
    give_back(&actor[1]);
    CHECK(!actor[3].granted);
    give_back(&actor[2]);
    CHECK(actor[3].granted);
    CHECK(!ask(&actor[4], much, much));
    give_back(&actor[3]);
    CHECK(actor[4].granted);
    give_back(&actor[4]);
    CHECK_EQUAL(set.wide, 0);
    check_all();
}

static void filter_is_clean_again(void)
{
    for (unsigned i = 0; i < RANGE_FILTER; i++)
        CHECK_EQUAL(set.filter[i], 0);
    CHECK_EQUAL(set.wide, 0);
}

static void at_random(void)
{
    uint64_t state = 42;
    begin_slots();
    for (int step = 0; step < 200000; step++) {
        struct actor *a = &actor[test_random(&state) % SLOTS];
        if (a->used) {
            /* Mostly what is granted is given back; sometimes one that waits gives up. */
            if (a->granted || test_random(&state) % 8 == 0)
                give_back(a);
        } else {
            static const uint64_t span[] = {8, 64, 4096, 100000};
            uint64_t sectors = span[test_random(&state) % 4];
            uint64_t offset = test_random(&state) % 4 ? test_random(&state) % sectors : sectors * 8191;
            ask(a, offset * 512, (1 + test_random(&state) % sectors) * 512);
        }
        check_all();
    }
    for (int i = 0; i < SLOTS; i++)
        if (actor[i].used)
            give_back(&actor[i]);
    CHECK(list_empty(&set.all));
    filter_is_clean_again();
}

/* The end of the largest possible disk. */
static void at_the_end(void)
{
    begin_slots();
    CHECK(ask(&actor[0], UINT64_MAX - 4095, 4095));
    CHECK(!ask(&actor[1], UINT64_MAX - 1, 1));
    give_back(&actor[0]);
    CHECK(actor[1].granted);
    give_back(&actor[1]);
    filter_is_clean_again();
}

int main(void)
{
    test("ranges apart do not wait", apart);
    test("overlapping ranges take turns", in_turn);
    test("a waiting slot may be given up", given_up);
    test("one release grants many", many_at_once);
    test("asking within grant", ask_within_grant);
    test("wide ranges", wide);
    test("the end of the address space", at_the_end);
    test("at random, against the definition", at_random);
    return tests_end();
}
