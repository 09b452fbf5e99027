#!/usr/bin/env bash
# The figures in the README, measured on this machine: three nodes and the load side by side on it.
# It has its own data and ports, and leaves no process behind. Needs Linux (/proc).
set -euo pipefail

usage() {
  cat <<'EOF'
Usage: scripts/figures.sh [WHAT…]

  throughput  closed-loop load of five shapes, then the memory of each node (half a minute)
  idle        processor time of a cluster that has 200 queues and nothing to do
  restart     kill -9 of a node whose log holds 2,000,000 messages: time to ready, bytes read
  failover    kill -9, ten times, of the node that leads most, with 1 and with 100 busy queues:
              the longest time a retrying client waits for an acknowledgement
  delayed     1,000,000 delayed messages: the memory of each node while they wait, the restart of a
              killed one, and how late each message becomes visible

Without WHAT: all of them.

Environment:
  QUORATE_BIN       this binary instead of the one built here
  FIGURES_SECONDS   length of each load of `throughput` (default 10)
  FIGURES_MESSAGES  messages for `restart` (default 2000000)
  FIGURES_DELAYED   messages for `delayed` (default 1000000)
  FIGURES_KILLS     kills for `failover` (default 10)
EOF
}

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd -P)
root=$(cd "$here/.." && pwd -P)
binary=${QUORATE_BIN:-${CARGO_TARGET_DIR:-$root/target}/release/quorate}
work=$(mktemp -d "${TMPDIR:-/tmp}/quorate-figures.XXXXXX")
export QUORATE_HOME=$work/cluster QUORATE_NODES=3 QUORATE_BASE_PORT=${QUORATE_BASE_PORT:-27100}
unset QUORATE_URL

cleanup() {
  local code=$?
  trap - EXIT
  # The nodes do not end by the Ctrl-C that ends this script: a second one must not stop the cleaning,
  # nor must a terminal that is gone.
  trap '' INT TERM HUP
  set +e
  "$here/cluster.sh" clean >/dev/null 2>&1 || true
  rm -rf -- "$work"
  exit "$code"
}
trap cleanup EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
trap 'exit 129' HUP

say() { printf '\n== %s\n' "$*"; }
exec {never}<> <(:)
pause_for() { read -r -t "$1" -u "$never" _ || true; }
now_ms() { printf '%s' "$((${EPOCHREALTIME//[!0-9]/} / 1000))"; }

url() { printf 'http://127.0.0.1:%s' "$((QUORATE_BASE_PORT + $1))"; }
urls=$(url 1),$(url 2),$(url 3)
pid() { cat "$QUORATE_HOME/node-$1/pid"; }

# A new cluster for each kind of figure.
fresh() {
  "$here/cluster.sh" clean >/dev/null 2>&1 || true
  "$here/cluster.sh" start >"$work/start" 2>&1 || { cat "$work/start" >&2; exit 1; }
}

bench() { "$binary" bench --url "$urls" --nodes "$urls" "$@"; }

memory() {
  local node
  for node in 1 2 3; do
    echo "node $node: $(awk '/^VmRSS/ { printf "%d MiB\n", $2 / 1024 }' "/proc/$(pid "$node")/status")"
  done
}

throughput() {
  local seconds=${FIGURES_SECONDS:-10} shape
  fresh
  for shape in "--queues 1 --in-flight 1" "--queues 1 --in-flight 64" \
    "--queues 16 --in-flight 256" "--queues 16 --in-flight 256 --to-leaders" \
    "--queues 16 --in-flight 16 --batch 100"; do
    say "bench --size 1024 $shape"
    # shellcheck disable=SC2086 # a list of arguments
    "$binary" bench --url "$urls" --size 1024 --duration "${seconds}s" $shape
  done
  say "memory of each node after that"
  memory
}

# Processor time of node N so far, in clock ticks.
ticks() { awk '{ print $14 + $15 }' "/proc/$(pid "$1")/stat"; }

idle() {
  local node before=() seconds=20
  fresh
  "$binary" topic create idle --queues 200 --url "$urls" >/dev/null
  pause_for 15
  for node in 1 2 3; do before[node]=$(ticks "$node"); done
  pause_for "$seconds"
  say "idle for $seconds s with 200 queues: processor time, of one core"
  for node in 1 2 3; do
    awk -v used="$(($(ticks "$node") - before[node]))" -v hz="$(getconf CLK_TCK)" -v s="$seconds" \
      -v node="$node" 'BEGIN { printf "node %d: %.2f %%\n", node, 100 * used / hz / s }'
  done
}

# The sum of the queues' ends.
stored() { "$binary" topic show "$1" --url "$urls" | awk '$1 ~ /^[0-9]+$/ { sum += $NF } END { print sum + 0 }'; }

restart() {
  local least=${FIGURES_MESSAGES:-2000000} begun read_before
  fresh
  "$binary" topic create restart --queues 4 --url "$urls" >/dev/null
  while (($(stored restart) < least)); do
    bench --topic restart --queues 4 --in-flight 16 --batch 500 --size 1024 --duration 5s >/dev/null
  done
  say "restart after kill -9 with $(stored restart) messages"
  du -sh "$QUORATE_HOME/node-1/data/log" | awk '{ print "log on disk: " $1 }'
  "$here/cluster.sh" kill 1
  begun=$(now_ms)
  "$here/cluster.sh" restart 1 >/dev/null
  echo "ready after $(($(now_ms) - begun)) ms"
  read_before=$(awk '/^rchar/ { print $2 }' "/proc/$(pid 1)/io")
  echo "bytes read until then: $((read_before / 1024)) KiB"
  grep 'commit log recovered' "$QUORATE_HOME/node-1/log" | tail -n 1 | sed 's/.*RecoveryReport/recovery:/'
}

leads_most() {
  "$binary" topic show "$1" --url "$urls" |
    awk '$1 ~ /^[0-9]+$/ && $2 != "-" { led[$2]++ } END { for (n in led) if (led[n] > most) { most = led[n]; who = n } print who }'
}

failover() {
  local kills=${FIGURES_KILLS:-10} queues kill victim load gap
  for queues in 1 100; do
    fresh
    "$binary" topic create failover --queues "$queues" --url "$urls" >/dev/null
    say "kill -9 of the node that leads most, $queues busy queues: longest gap of a retrying client"
    : >"$work/gaps"
    for ((kill = 1; kill <= kills; kill++)); do
      victim=$(leads_most failover)
      # A hundred clients that never pause would measure how busy two cores are.
      bench --gap --json --topic failover --queues "$queues" --size 1024 --duration 5s \
        --pause "$([[ $queues == 1 ]] && echo 0ms || echo 10ms)" >"$work/gap" &
      load=$!
      pause_for 2.5
      "$here/cluster.sh" kill "$victim"
      wait "$load"
      gap=$(grep -o '"longest_gap_ms":[0-9.]*' "$work/gap" | head -n 1 | cut -d: -f2)
      echo "$gap" >>"$work/gaps"
      echo "kill $kill (node $victim): $gap ms"
      "$here/cluster.sh" restart "$victim" >/dev/null
      # Leaderships go back to where they belong, so that the next kill meets a full node.
      pause_for 7
    done
    sort -n "$work/gaps" | awk '{ gaps[NR] = $1 } END { printf "shortest %s ms, median %s ms, longest %s ms\n", gaps[1], gaps[int((NR + 1) / 2)], gaps[NR] }'
  done
}

delayed() {
  local messages=${FIGURES_DELAYED:-1000000} load node begun over
  over=$((messages / 10000 > 30 ? messages / 10000 : 30))
  fresh
  say "memory of each node before"
  memory
  bench --topic delayed --queues 4 --delayed "$messages" --batch 500 --in-flight 8 --size 100 \
    --after "$((over + 60))s" --over "${over}s" >"$work/late" 2>"$work/stored" &
  load=$!
  until grep -q 'messages wait' "$work/stored"; do
    kill -0 "$load" 2>/dev/null || { cat "$work/stored" >&2; exit 1; }
    pause_for 0.5
  done
  say "$(cat "$work/stored")"
  say "memory of each node while they wait"
  memory
  du -sh "$QUORATE_HOME/node-1/data/derived" | awk '{ print "derived store on disk: " $1 }'
  "$here/cluster.sh" kill 1
  begun=$(now_ms)
  "$here/cluster.sh" restart 1 >/dev/null
  echo "node 1 killed and ready again after $(($(now_ms) - begun)) ms"
  memory
  say "how late they became visible, spread over $over s"
  wait "$load"
  cat "$work/late"
  "$binary" cluster replicas --url "$urls"
}

all=("$@")
((${#all[@]} > 0)) || all=(throughput idle restart failover delayed)
for what in "${all[@]}"; do
  case $what in
  throughput | idle | restart | failover | delayed) ;;
  -h | --help | help) usage; exit 0 ;;
  *) usage >&2; exit 2 ;;
  esac
done
if [[ -z ${QUORATE_BIN:-} ]]; then
  (cd "$root" && cargo build --release --locked --bin quorate)
fi
echo "$(grep -c ^processor /proc/cpuinfo) processors, $("$binary" --version)"
for what in "${all[@]}"; do "$what"; done
