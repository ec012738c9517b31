#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
#
# A service manager of a test's own, in namespaces of its own (mounts, processes): with the units of folder $1 and a /run that
# nobody else sees. Runs the rest of the arguments, in which `systemctl --user` reaches it. 77: it does not come up here.
# Started by: unshare --mount --pid --fork --kill-child --mount-proc own_manager.sh UNITS CGROUP COMMAND...
units=$1 cgroup=$2
shift 2

mount -t tmpfs tmpfs /run || exit 77
# What it makes for its services lies below the test's own, which the test removes.
for hierarchy in /sys/fs/cgroup /sys/fs/cgroup/unified /sys/fs/cgroup/*; do
    [ -e "$hierarchy/cgroup.procs" ] || continue
    mkdir -p "$hierarchy/$cgroup" && echo $$ >"$hierarchy/$cgroup/cgroup.procs"
done 2>/dev/null
mkdir -p /run/user/systemd/user /run/systemd/system
cp -r "$units"/. /run/user/systemd/user
export XDG_RUNTIME_DIR=/run/user XDG_CONFIG_HOME=/run/user XDG_STATE_HOME=/run/user SYSTEMD_LOG_TARGET=console
unset NOTIFY_SOCKET DBUS_SESSION_BUS_ADDRESS
/lib/systemd/systemd --user --unit=basic.target </dev/null >&2 &
for _ in $(seq 100); do
    [ "$(systemctl --user is-system-running 2>/dev/null)" = running ] && exec "$@"
    sleep 0.1
done
exit 77
