# SPDX-License-Identifier: Apache-2.0
# The extension module that the build generates from c_shim/rbd. Only storage/rbd_image.py imports it.
from typing import Any

ffi: Any
lib: Any
