/* SPDX-License-Identifier: Apache-2.0
 *
 * How the records of both layouts begin (inflight.h, inflight_packed.h).
 */
#ifndef VS_INFLIGHT_HEADER_H
#define VS_INFLIGHT_HEADER_H

#include <stdint.h>

#define INFLIGHT_VERSION 1u

struct inflight_header {
    uint64_t features;
    uint16_t version, desc_num;
};

#endif
