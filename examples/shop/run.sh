#!/usr/bin/env bash
# The shop on three nodes of its own, killed at random for a while. Exit 0 only if the books balance.
#
#   examples/shop/run.sh [SECONDS]       60 if not said
#
# QUORATE_BIN is the server to test (default: the release binary, built if needed),
# QUORATE_BASE_PORT where its nodes listen (default 18080, beside a cluster at work).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
root=$(cd ../.. && pwd -P)

seconds=${1:-60}
export QUORATE_BASE_PORT=${QUORATE_BASE_PORT:-18080}
cargo build --locked --quiet
shop=${CARGO_TARGET_DIR:-target}/debug/shop

home=$(mktemp -d "${TMPDIR:-/tmp}/quorate-shop.XXXXXX")
export QUORATE_HOME=$home/cluster
cluster=$root/scripts/cluster.sh
finish() {
  local status=$?
  # The nodes do not end by the Ctrl-C that ends this script: a second one must not leave them behind.
  trap '' INT TERM HUP
  if ((status == 0)); then
    "$cluster" clean >/dev/null
    rm -rf "$home"
  else
    "$cluster" stop >/dev/null || true
    echo "books and logs are in $home" >&2
  fi
}
trap finish EXIT

"$cluster" start
urls=
for node in 1 2 3; do
  urls+=${urls:+,}http://127.0.0.1:$((QUORATE_BASE_PORT + node))
done
"$shop" drive --home "$home/shop" --urls "$urls" --seconds "$seconds" --cluster "$cluster"
"${QUORATE_BIN:-${CARGO_TARGET_DIR:-$root/target}/release/quorate}" cluster replicas --url "$urls"
