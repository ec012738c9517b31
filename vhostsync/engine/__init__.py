# SPDX-License-Identifier: Apache-2.0
"""The data plane as Python sees it. Of others, only storage/native.py (local disks) imports the binding."""
