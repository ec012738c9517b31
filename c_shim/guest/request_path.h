/* SPDX-License-Identifier: Apache-2.0 */
#ifndef VS_REQUEST_PATH_H
#define VS_REQUEST_PATH_H

#include "guest.h"

enum service { SERVICE_EMPTY, SERVICE_MORE, SERVICE_STALLED };

int request_path_init(struct guest *g);
void request_path_free(struct guest *g);

/* Takes up what waits in a running ring, up to PASS_BUDGET. Empty: the guest
 * was asked to kick. Stalled: the head waits for room (or time) and stays in
 * the ring, to be looked at again when something has completed. */
enum service request_path_service(struct guest *g, struct queue *q);

/* No request is taken up until the reason is gone; then those that have waited have their turn. */
void guest_hold(struct guest *g, enum guest_hold reason);
void guest_release(struct guest *g, enum guest_hold reason);

/* For read_fallback.c and source_failover.c: the ends and the repetition of what the source has failed. */

/* Of the disk, not of the guest's memory or of our own doing. */
bool request_path_error_of_disk(int error);
/* The bytes of a read; NULL: the source's error. */
void request_path_answer_read(struct request *r, const uint8_t *from);
/* The guest is told of the source's error (rule 5). */
void request_path_source_failed(struct request *r);
/* Whether it can go to the source that there is now; a buffer for it is taken if need be. */
bool request_path_suits_source(struct request *r);
void request_path_to_source(struct request *r);

#endif
