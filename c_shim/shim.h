/* SPDX-License-Identifier: Apache-2.0
 *
 * shim_api.h and shim_figures.h as C includes them: with a guard, and with the types that cffi knows by itself.
 */
#ifndef VHOSTSYNC_SHIM_H
#define VHOSTSYNC_SHIM_H

#include <stdint.h>

#include "shim_api.h"
#include "shim_figures.h"

#endif
