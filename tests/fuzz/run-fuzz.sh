#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
#
# Builds the fuzzers with clang and runs each: run-fuzz.sh [seconds each, 60] [name ...]
# sessions (vhost-user) and control (the control socket) are Python, and want the environment that `./run` makes.
# The corpus grows in build-fuzz/corpus-NAME; a finding is left in build-fuzz/findings-NAME-… and makes the exit code 1.
set -eu
top=$(cd "$(dirname "$0")/../.." && pwd)
build=${VHOSTSYNC_FUZZ_BUILD:-$top/build-fuzz}
seconds=${1:-60}
[ $# -gt 0 ] && shift
names=${*:-ring packed engine bitmap sessions control}
command -v clang >/dev/null || { echo "run-fuzz.sh: clang and its compiler-rt (libclang-rt-dev) are needed" >&2; exit 2; }
if ! meson test -C "$build" --no-rebuild --list >/dev/null 2>&1; then
    find "$build" -mindepth 1 -maxdepth 1 ! -name 'corpus-*' ! -name 'findings-*' -exec rm -rf {} + 2>/dev/null || true
    CC=clang meson setup "$build" "$top" -Dextension=disabled -Dcore_tests=false -Dfuzz=true -Db_lundef=false \
        -Db_sanitize=address,undefined -Dc_args='-fsanitize=fuzzer-no-link -fno-sanitize-recover=all -O1' >/dev/null
fi
ninja -C "$build" >/dev/null || { ninja -C "$build"; exit 2; }
failed=0
for name in $names; do
    case $name in sessions | control)
        echo "fuzzing $name for $seconds seconds"
        (cd "$top" && python -m tests.fuzz.python_targets "$name" "$seconds") >"$build/fuzz-$name.log" 2>&1 || failed=1
        grep -E 'finding' "$build/fuzz-$name.log" || { echo "$name ended without a word: see $build/fuzz-$name.log"; failed=1; }
        continue
        ;;
    esac
    if [ ! -d "$build/corpus-$name" ]; then
        # Any bytes are a run; long ones to begin with, since the fuzzer is slow to find that length pays.
        mkdir -p "$build/corpus-$name"
        for i in 1 2 3 4 5 6 7 8; do
            head -c $((i * 250)) /dev/urandom >"$build/corpus-$name/seed-$i"
        done
    fi
    echo "fuzzing $name for $seconds seconds"
    "$build/tests/fuzz/fuzz_$name" -max_total_time="$seconds" -max_len=4096 -len_control=0 -timeout=120 -rss_limit_mb=2048 \
        -print_final_stats=1 -print_funcs=0 -artifact_prefix="$build/findings-$name-" "$build/corpus-$name" \
        >"$build/fuzz-$name.log" 2>&1 || failed=1
    grep -E 'stat::number_of_executed_units|cov:.*DONE|ERROR|SUMMARY' "$build/fuzz-$name.log" || true
done
[ $failed = 0 ] || echo "findings: see $build/findings-* and fuzz-*.log" >&2
exit $failed
