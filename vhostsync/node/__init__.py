# SPDX-License-Identifier: Apache-2.0
"""The process of `node`, from which backends are forked that are started quickly and share its memory."""
