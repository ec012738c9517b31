# SPDX-License-Identifier: Apache-2.0
"""The command line: arguments, commands at a terminal, what they print. Of what runs it asks by the
control socket."""
