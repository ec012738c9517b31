/* SPDX-License-Identifier: Apache-2.0
 *
 * How much the guest may do. See rate_limit.h.
 */
#include "rate_limit.h"

/* Without a burst, so much of a second may go at once; with a long one, of a second at its rate. */
#define AT_ONCE_S 0.1

static const enum vs_limited of_direction[2][4] = {
    {VS_BPS, VS_IOPS, VS_BPS_RD, VS_IOPS_RD},
    {VS_BPS, VS_IOPS, VS_BPS_WR, VS_IOPS_WR},
};

static bool rate_possible(const struct vs_rate *r)
{
    if (r->per_s > RATE_MAX)
        return false;
    if (r->burst == 0)
        return r->length_s <= 1;
    return r->per_s > 0 && r->burst >= r->per_s && r->burst <= RATE_MAX && r->length_s >= 1 &&
           r->length_s <= RATE_MAX / r->burst;
}

bool rate_limit_possible(const struct vs_limits *limits)
{
    for (unsigned i = 0; i < VS_LIMITED_KINDS; i++)
        if (!rate_possible(&limits->rate[i]))
            return false;
    return true;
}

static double at_most(double level, double most)
{
    return level < most ? level : most;
}

static void bucket_set(struct bucket *b, const struct vs_rate *r)
{
    b->rate = (double)r->per_s;
    b->size = r->burst ? (double)r->burst * (double)r->length_s : b->rate * AT_ONCE_S;
    b->burst_rate = r->burst && r->length_s > 1 ? (double)r->burst : 0;
    b->level = at_most(b->level, b->size);
    b->burst_level = at_most(b->burst_level, b->burst_rate * AT_ONCE_S);
}

static double leaked(double level, double rate, double passed_s)
{
    double left = level - rate * passed_s;
    return left > 0 ? left : 0;
}

static void leak(struct rate_limit *l, uint64_t now_ns)
{
    double passed_s = (double)(now_ns - l->leaked_ns) / 1e9;
    l->leaked_ns = now_ns;
    for (unsigned i = 0; i < VS_LIMITED_KINDS; i++) {
        struct bucket *b = &l->bucket[i];
        b->level = leaked(b->level, b->rate, passed_s);
        b->burst_level = leaked(b->burst_level, b->burst_rate, passed_s);
    }
}

void rate_limit_set(struct rate_limit *l, const struct vs_limits *limits, uint64_t now_ns)
{
    leak(l, now_ns);
    l->on = false;
    l->iops_size = limits->iops_size;
    for (unsigned i = 0; i < VS_LIMITED_KINDS; i++) {
        bucket_set(&l->bucket[i], &limits->rate[i]);
        l->on |= limits->rate[i].per_s > 0;
    }
}

/* Until it holds no more than its size. Rounded up, or who comes back then would wait again. */
static uint64_t until_ns(double level, double size, double rate)
{
    return level > size ? (uint64_t)((level - size) / rate * 1e9) + 1 : 0;
}

static uint64_t bucket_wait_ns(const struct bucket *b)
{
    uint64_t wait_ns = b->rate > 0 ? until_ns(b->level, b->size, b->rate) : 0;
    if (wait_ns == 0 && b->burst_rate > 0)
        return until_ns(b->burst_level, b->burst_rate * AT_ONCE_S, b->burst_rate);
    return wait_ns;
}

uint64_t rate_limit_wait_ns(struct rate_limit *l, bool writes, uint64_t now_ns)
{
    uint64_t longest_ns = 0;
    leak(l, now_ns);
    for (unsigned i = 0; i < 4; i++) {
        uint64_t wait_ns = bucket_wait_ns(&l->bucket[of_direction[writes][i]]);
        longest_ns = wait_ns > longest_ns ? wait_ns : longest_ns;
    }
    return longest_ns;
}

void rate_limit_charge(struct rate_limit *l, bool writes, uint64_t bytes)
{
    double requests = l->iops_size && bytes > l->iops_size ? (double)bytes / (double)l->iops_size : 1;
    for (unsigned i = 0; i < 4; i++) {
        enum vs_limited kind = of_direction[writes][i];
        struct bucket *b = &l->bucket[kind];
        double units = kind >= VS_IOPS ? requests : (double)bytes;
        if (b->rate > 0)
            b->level += units;
        if (b->burst_rate > 0)
            b->burst_level += units;
    }
}
