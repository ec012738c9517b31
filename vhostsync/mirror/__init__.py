# SPDX-License-Identifier: Apache-2.0
"""The policy: what is allowed when, and what is recorded before what."""
