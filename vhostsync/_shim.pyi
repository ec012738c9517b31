# SPDX-License-Identifier: Apache-2.0
# The extension module that the build generates from c_shim/shim_api.h. Only engine.py imports it.
from typing import Any

ffi: Any
lib: Any
