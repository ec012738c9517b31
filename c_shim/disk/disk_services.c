/* SPDX-License-Identifier: Apache-2.0
 *
 * The table of what the core does for kinds of disks from outside. See disk_services.h.
 */
#include "disk_services.h"

const struct vs_disk_services *vs_disk_services(void)
{
    static const struct vs_disk_services services = {
        .services_bytes = sizeof services,
        .disk_bytes = sizeof(struct vs_disk),
        .io_bytes = sizeof(struct disk_io),
        .host_bytes = sizeof(struct disk_host),
        .init = disk_init,
        .complete = disk_complete,
        .complete_remote = disk_complete_remote,
        .complete_remote_all = disk_complete_remote_all,
        .thread_begin = io_thread_begin,
        .progress = disk_progress,
        .all_data = disk_all_data,
        .iov_aligned = disk_iov_aligned,
        .io_advance = disk_io_advance,
    };
    return &services;
}
