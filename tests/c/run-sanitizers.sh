#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
#
# Builds the C core and its tests twice, under AddressSanitizer with UndefinedBehaviorSanitizer and under
# ThreadSanitizer, and runs them. Exit code 1 on any finding. Names of tests may be given: run-sanitizers.sh engine
# VHOSTSYNC_SANITIZER=asan, or tsan, does one of the two.
set -eu
top=$(cd "$(dirname "$0")/../.." && pwd)
failed=0

# Newer kernels place mappings where older ThreadSanitizers do not expect them; without randomisation they fit.
fixed_addresses=
if setarch -R true 2>/dev/null; then
    fixed_addresses="setarch -R"
fi

run() { # name, sanitizers, environment…
    name=$1 sanitize=$2
    shift 2
    [ "${VHOSTSYNC_SANITIZER:-$name}" = "$name" ] || return 0
    build=${VHOSTSYNC_SANITIZER_BUILDS:-$top}/build-$name
    # Also made anew when another meson's version made it.
    if ! meson test -C "$build" --no-rebuild --list >/dev/null 2>&1; then
        rm -rf "$build"
        meson setup "$build" "$top" -Dextension=disabled -Db_sanitize="$sanitize" -Db_lundef=false -Dwerror=true \
            -Doptimization=1 >/dev/null || return 1
    fi
    ninja -C "$build" >"$build/ninja.log" 2>&1 || { tail -n 40 "$build/ninja.log"; return 1; }
    env "$@" $fixed_addresses meson test -C "$build" --no-rebuild --print-errorlogs --timeout-multiplier 4 $tests
}

tests=$*
run asan address,undefined \
    ASAN_OPTIONS=abort_on_error=1:detect_leaks=1:detect_stack_use_after_return=1:strict_string_checks=1 \
    UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 || failed=1
run tsan thread TSAN_OPTIONS=halt_on_error=1:second_deadlock_stack=1 || failed=1
[ $failed = 0 ] || echo "run-sanitizers.sh: there are findings (above)" >&2
exit $failed
