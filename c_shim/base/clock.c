/* SPDX-License-Identifier: Apache-2.0 */
#include "clock.h"

_Thread_local uint64_t clock_missed_ns;
