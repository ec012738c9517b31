/* SPDX-License-Identifier: Apache-2.0
 *
 * For C programs that have the core and the testing library linked in: the door
 * between the two is open when main() begins.
 */
#include "testing.h"

__attribute__((constructor)) static void begin(void)
{
    vs_testing_begin(vs_disk_services());
}
