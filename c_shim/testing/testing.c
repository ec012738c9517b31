/* SPDX-License-Identifier: Apache-2.0
 *
 * How the testing library gets the core's table of functions. See testing.h.
 */
#include "testing.h"

const struct vs_disk_services *disk_core;

void vs_testing_begin(const struct vs_disk_services *services)
{
    if (!disk_services_fit(services))
        abort(); /* it was built from other headers than the core */
    disk_core = services;
}
