/* SPDX-License-Identifier: Apache-2.0
 *
 * What all files of the testing library use: the core's table of functions, and memory that is there or ends the test.
 */
#ifndef VS_TESTING_H
#define VS_TESTING_H

#include <stdlib.h>

#include "disk_services.h"
#include "shim.h"
#include "testing_api.h"

/* What the core does for this library's disks. */
extern const struct vs_disk_services *disk_core;

static inline void *checked(void *memory)
{
    if (!memory)
        abort(); /* a test without memory has nothing to say */
    return memory;
}

#endif
