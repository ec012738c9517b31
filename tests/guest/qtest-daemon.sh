#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
#
# In the place of qemu-storage-daemon for QEMU's own test of vhost-user-blk: each --export becomes a `vhostsync serve`
# on the disk that a --blockdev before it has named. Whatever QEMU's test may come to say that is not known here ends it.
set -eu

die() { printf 'qtest-daemon: %s\n' "$*" >&2; exit 1; }

value() { # of NAME in name=value,…
    local pair IFS=,
    for pair in $2; do
        if [ "${pair%%=*}" = "$1" ]; then printf '%s' "${pair#*=}"; return; fi
    done
    die "no $1 in $2"
}

declare -A file_of=()
backends=()
while [ $# -ge 2 ]; do
    case $1 in
        --blockdev)
            [ "$(value driver "$2")" = file ] || die "a disk of another kind: $2"
            file_of[$(value node-name "$2")]=$(value filename "$2")
            ;;
        --export)
            [ "$(value type "$2"),$(value addr.type "$2"),$(value writable "$2")" = vhost-user-blk,fd,on ] \
                || die "an export of another kind: $2"
            vhostsync serve --fd "$(value addr.str "$2")" --blk-file "${file_of[$(value node-name "$2")]}" \
                --num-queues "$(value num-queues "$2")" --no-state-file </dev/null &
            backends+=($!)
            ;;
        *) die "unknown: $1 $2" ;;
    esac
    shift 2
done
[ $# = 0 ] && [ ${#backends[@]} -gt 0 ] || die "nothing to serve, or one word too many: $*"

trap 'kill "${backends[@]}" 2>/dev/null || true' TERM INT
wait "${backends[@]}" || wait "${backends[@]}" # the first is interrupted by the signal
