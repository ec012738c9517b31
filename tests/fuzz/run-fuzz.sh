#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
#
# Builds the fuzzers with clang and runs each: run-fuzz.sh [seconds each, 60] [name ...]
# The corpus grows in build-fuzz/corpus-NAME; a finding is left in build-fuzz/findings-NAME-… and makes the exit code 1.
set -eu
top=$(cd "$(dirname "$0")/../.." && pwd)
build=${VHOSTSYNC_FUZZ_BUILD:-$top/build-fuzz}
seconds=${1:-60}
[ $# -gt 0 ] && shift
names=${*:-ring}
command -v clang >/dev/null || { echo "run-fuzz.sh: clang and its compiler-rt (libclang-rt-dev) are needed" >&2; exit 2; }
if ! meson test -C "$build" --no-rebuild --list >/dev/null 2>&1; then
    find "$build" -mindepth 1 -maxdepth 1 ! -name 'corpus-*' ! -name 'findings-*' -exec rm -rf {} + 2>/dev/null || true
    CC=clang meson setup "$build" "$top" -Dextension=disabled -Dcore_tests=false -Dfuzz=true -Db_lundef=false \
        -Db_sanitize=address,undefined -Dc_args='-fsanitize=fuzzer-no-link -fno-sanitize-recover=all -O1' >/dev/null
fi
ninja -C "$build" >/dev/null || { ninja -C "$build"; exit 2; }
failed=0
for name in $names; do
    mkdir -p "$build/corpus-$name"
    echo "fuzzing $name for $seconds seconds"
    "$build/tests/fuzz/fuzz_$name" -max_total_time="$seconds" -max_len=4096 -timeout=20 -rss_limit_mb=2048 \
        -print_final_stats=1 -verbosity=1 -artifact_prefix="$build/findings-$name-" "$build/corpus-$name" \
        >"$build/fuzz-$name.log" 2>&1 || failed=1
    grep -E 'stat::number_of_executed_units|cov:.*DONE|ERROR|SUMMARY' "$build/fuzz-$name.log" || true
done
[ $failed = 0 ] || echo "findings: see $build/findings-* and fuzz-*.log" >&2
exit $failed
