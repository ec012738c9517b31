/* SPDX-License-Identifier: Apache-2.0
 *
 * How long a frontend waits for its requests. See frontend_patience.c.
 */
#ifndef VS_FRONTEND_PATIENCE_H
#define VS_FRONTEND_PATIENCE_H

#include <stdint.h>

struct guest;

/* If a ring has waited too long to become quiet, the destination is given up, and a pause holds the ring's requests no
 * more; nor those of a frontend that has waited too long for its end or its memory. */
void attachments_check_deadlines(struct guest *g);
uint64_t attachments_deadline_ns(const struct guest *g);

#endif
