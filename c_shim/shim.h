/* SPDX-License-Identifier: Apache-2.0 */
#ifndef VHOSTSYNC_SHIM_H
#define VHOSTSYNC_SHIM_H

#include <stdint.h>

#include "shim_api.h"

#endif
