/* SPDX-License-Identifier: Apache-2.0
 *
 * What the generated binding includes before its own code.
 */
#include "shim.h"
