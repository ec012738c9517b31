# SPDX-License-Identifier: Apache-2.0
"""What this process may still do: another user, capabilities, Landlock, seccomp."""
