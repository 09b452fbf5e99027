#!/usr/bin/env bash
# Feeds every reader of outside bytes with changed inputs, each target for so many seconds:
#   scripts/fuzz.sh [seconds]
# What fails is written into the target's corpus (tests/corpus of its crate) and replayed by every
# later test run. FUZZ_SEED=… repeats a run; without it each run tries other inputs.
set -euo pipefail
cd "$(dirname "$0")/.."

FUZZ_SECONDS=${1:-300}
FUZZ_SEED=${FUZZ_SEED:-$(date +%s)000}
export FUZZ_SECONDS FUZZ_SEED
echo "$FUZZ_SECONDS seconds a target, FUZZ_SEED=$FUZZ_SEED"

log=$(mktemp)
trap 'rm -f "$log"' EXIT
failed=0
run() {
    cargo test "$@" that_lie -- --nocapture >"$log" 2>&1 || failed=1
    grep -aE '^test |inputs, |fails|panicked|^error' "$log" || true
}
run -p quorate-storage --test fuzz
run -p quorate-raft --lib
run -p quorate --test fuzz
exit "$failed"
