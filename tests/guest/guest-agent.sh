#!/bin/busybox sh
# SPDX-License-Identifier: Apache-2.0
# Commands from the host over one serial port, one a line: `ID COMMAND`. Answer: the command's output, then
# `@@DONE ID STATUS` on a line of its own. Each command runs in a subshell, so none can end the agent.
exec <"/dev/$1" >"/dev/$1" 2>&1
stty raw -echo
echo "@@READY"
while IFS= read -r line; do
    (eval "${line#* }") </dev/null
    status=$?
    printf '\n@@DONE %s %s\n' "${line%% *}" "$status"
done
