/* SPDX-License-Identifier: Apache-2.0
 *
 * Which layout a virtqueue has. All else is done by virtqueue_split.c or virtqueue_packed.c. See virtqueue.h.
 */
#include "virtqueue.h"

#include <errno.h>
#include <stdlib.h>

void virtqueue_reset(struct virtqueue *vq)
{
    free(vq->packed);
    *vq = (struct virtqueue){.layout = &ring_split};
}

int virtqueue_choose_layout(struct virtqueue *vq, bool packed)
{
    struct packed_ring *fresh = NULL;
    if (packed == virtqueue_is_packed(vq))
        return 0;
    if (packed && !(fresh = packed_ring_make()))
        return -ENOMEM;
    virtqueue_unmap(vq);
    free(vq->packed);
    vq->packed = fresh;
    vq->layout = packed ? &ring_packed : &ring_split;
    vq->record = NULL;
    vq->again_next = vq->again_count = 0;
    return 0;
}
