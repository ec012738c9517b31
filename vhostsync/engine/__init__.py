# SPDX-License-Identifier: Apache-2.0
"""The data plane as Python sees it. Nothing but this imports the binding."""
