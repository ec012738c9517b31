/* SPDX-License-Identifier: Apache-2.0
 *
 * A request's way from its ring to the source and back. See request_path.c, where reading the data plane begins.
 */
#ifndef VS_REQUEST_PATH_H
#define VS_REQUEST_PATH_H

struct guest;
struct queue;

enum service { SERVICE_EMPTY, SERVICE_MORE, SERVICE_STALLED, SERVICE_LIMITED };

/* Listens to the mirror. */
void request_path_init(struct guest *g);

/* Takes up what waits in a running ring, up to PASS_BUDGET. Empty: the guest
 * was asked to kick. Stalled: the head waits for room (or time) and stays in
 * the ring, to be looked at again when something has completed. Limited: it
 * waits for its turn (limited_rings.c). */
enum service request_path_service(struct guest *g, struct queue *q);

/* When a failover is over (source_failover.c): what the source has failed is answered so, or goes to the new source. */
void request_path_pump(struct guest *g);

#endif
