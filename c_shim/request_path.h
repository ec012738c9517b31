/* SPDX-License-Identifier: Apache-2.0 */
#ifndef VS_REQUEST_PATH_H
#define VS_REQUEST_PATH_H

#include "engine.h"

enum service { SERVICE_EMPTY, SERVICE_MORE, SERVICE_STALLED };

int request_path_init(struct vs_engine *e);
void request_path_free(struct vs_engine *e);

/* Takes up what waits in a running ring, up to QUEUE_BUDGET. Empty: the guest
 * was asked to kick. Stalled: the head waits for room (or time) and stays in
 * the ring, to be looked at again when something has completed. */
enum service request_path_service(struct queue *q);

/* A checkpoint begins: what is at the source is not covered by it. */
void request_path_mark_in_flight(struct vs_engine *e);

#endif
