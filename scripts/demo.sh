#!/usr/bin/env bash
# The main job, with commentary: three nodes, messages through all of them, the leader killed while
# they flow, and the proof that nothing acknowledged is missing. Exits 0 only if that is proved.
# It has its own data and ports, and leaves no process behind.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd -P)
root=$(cd "$here/.." && pwd -P)
topic=demo
queues=4

work=$(mktemp -d "${TMPDIR:-/tmp}/quorate-demo.XXXXXX")
export QUORATE_HOME=$work/cluster QUORATE_NODES=3
unset QUORATE_URL
background=()

cleanup() {
  local code=$?
  trap - EXIT
  # The nodes do not end by the Ctrl-C that ends this script: a second one must not stop the cleaning,
  # nor must a terminal that is gone.
  trap '' INT TERM HUP
  set +e
  # Producers read a pipe from their generators: both end when the generators see this file.
  touch "$work/stop"
  local pid
  for pid in "${background[@]}"; do
    kill "$pid" 2>/dev/null || true
  done
  wait 2>/dev/null || true
  if ((code != 0)) && [[ -d $QUORATE_HOME ]]; then
    say "the demo failed; the nodes' last words:"
    local node
    for node in 1 2 3; do
      tail -n 5 "$QUORATE_HOME/node-$node/log" 2>/dev/null | sed "s/^/  node $node: /" >&2 || true
    done
  fi
  "$here/cluster.sh" clean >/dev/null 2>&1 || true
  rm -rf -- "$work"
  exit "$code"
}
trap cleanup EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
trap 'exit 129' HUP

say() { printf '\n\033[1m== %s\033[0m\n' "$*"; }
[[ -t 1 ]] || say() { printf '\n== %s\n' "$*"; }
die() {
  printf 'demo.sh: %s\n' "$*" >&2
  exit 1
}

exec {never}<> <(:)
pause_for() { read -r -t "$1" -u "$never" _ || true; }
now_ms() { printf '%s' "$((${EPOCHREALTIME//[!0-9]/} / 1000))"; }

port_is_free() { ! (exec 3<>"/dev/tcp/127.0.0.1/$1") 2>/dev/null; }

choose_ports() {
  local try node
  for ((try = 0; try < 50; try++)); do
    QUORATE_BASE_PORT=$((20000 + (RANDOM % 200) * 50))
    for node in 1 2 3; do
      port_is_free $((QUORATE_BASE_PORT + node)) || continue 2
      port_is_free $((QUORATE_BASE_PORT + 100 + node)) || continue 2
    done
    export QUORATE_BASE_PORT
    return
  done
  die "found no free ports"
}

url() { printf 'http://127.0.0.1:%s' "$((QUORATE_BASE_PORT + $1))"; }
# All nodes, this one first: what a client with a list of addresses does.
urls_from() { printf '%s,%s,%s' "$(url "$1")" "$(url $(($1 % 3 + 1)))" "$(url $((($1 + 1) % 3 + 1)))"; }

# leaders NODE: "queue leader" a line, as that node knows it; "-" where there is none.
leaders() { "$binary" topic show "$topic" --url "$(urls_from "$1")" | awk '$1 ~ /^[0-9]+$/ { print $1, $2 }'; }

# all_led_without NODE LEADERS: whether every queue has a leader, and none is this node.
all_led_without() {
  awk -v gone="$1" -v queues="$queues" \
    '$2 == "-" || $2 == gone { bad = 1 } END { exit bad || NR != queues }' <<<"$2"
}

# A line every few milliseconds until told to stop. No line is ever the same as another.
generate() {
  local n=0
  while [[ ! -e $work/stop ]]; do
    n=$((n + 1))
    echo "producer $1 message $n"
    pause_for 0.005
  done
}

acknowledged() { cat "$work"/acked-* 2>/dev/null | wc -l | tr -d ' '; }

wait_for_acks() {
  local least=$1 deadline=$((SECONDS + 60))
  while (($(acknowledged) < least)); do
    ((SECONDS < deadline)) || die "producers got no further than $(acknowledged) acknowledgements"
    pause_for 0.1
  done
}

choose_ports
say "Three nodes on this machine"
"$here/cluster.sh" start
binary=${QUORATE_BIN:-${CARGO_TARGET_DIR:-$root/target}/release/quorate}

say "A topic with $queues queues; each queue is a Raft group of its own, on all three nodes"
"$binary" topic create "$topic" --queues "$queues" --replicas 3 --url "$(url 1)"

say "Three producers, one through each node; every acknowledgement is written down"
for node in 1 2 3; do
  generate "$node" | "$binary" produce "$topic" --retry --timeout-ms 60000 --quiet \
    --acked "$work/acked-$node" --url "$(urls_from "$node")" 2>"$work/producer-$node" &
  background+=("$!")
done
wait_for_acks 500
echo "$(acknowledged) messages acknowledged so far"

before=$(leaders 1)
victim=$(awk '$2 != "-" { led[$2]++ } END { for (n in led) if (led[n] > most) { most = led[n]; who = n } print who }' <<<"$before")
[[ $victim =~ ^[123]$ ]] || die "no node leads a queue: $before"
survivor=$((victim % 3 + 1))
"$binary" cluster watch --url "$(url "$survivor")" >"$work/events" 2>/dev/null &
watcher=$!
background+=("$watcher")
pause_for 0.3

say "kill -9 of node $victim, which leads the most queues, while messages flow"
killed_at=$(now_ms)
"$here/cluster.sh" kill "$victim"
deadline=$((SECONDS + 30))
until after=$(leaders "$survivor" 2>&1) && all_led_without "$victim" "$after"; do
  ((SECONDS < deadline)) || die "no new leaders within 30 s: $after"
  pause_for 0.02
done
echo "every queue has a living leader $(($(now_ms) - killed_at)) ms later (as seen by polling)"
at_failover=$(acknowledged)

say "What the cluster said meanwhile"
pause_for 0.5
grep -E " (node_[a-z]+|leader_[a-z]+ +$topic/)" "$work/events" | head -n 30 || true
internal=$(grep -c 'leader_elected  *_' "$work/events" || true)
echo "… and $internal elections in groups that keep metadata and consumer offsets"

say "Who led each queue, before and after"
paste <(echo "$before") <(echo "$after") |
  awk 'BEGIN { print "QUEUE  BEFORE  AFTER" } { printf "%5s  %6s  %5s\n", $1, $2, $4 }'

say "Two of three nodes go on"
wait_for_acks $((at_failover + 500))
echo "$(acknowledged) messages acknowledged so far"

say "Node $victim comes back on its old data and catches up, while messages flow"
"$here/cluster.sh" restart "$victim"
wait_for_acks $((at_failover + 1000))

say "The producers end"
touch "$work/stop"
producers=("${background[@]:0:3}")
for index in 0 1 2; do
  wait "${producers[$index]}" || {
    cat "$work/producer-$((index + 1))" >&2
    die "producer $((index + 1)) gave up"
  }
  echo "producer $((index + 1)): $(tail -n 1 "$work/producer-$((index + 1))")"
done
kill "$watcher" 2>/dev/null || true
wait "$watcher" 2>/dev/null || true
background=()

say "A consumer reads everything"
consumed=$("$binary" consume "$topic" --format value --url "$(url "$victim")" | wc -l | tr -d ' ')
echo "$consumed messages consumed through node $victim"
((consumed >= $(acknowledged))) || die "fewer messages than acknowledgements: $(acknowledged)"

say "The proof: each node's own replica against everything that was acknowledged"
"$binary" verify --acked "$work/acked-1" --acked "$work/acked-2" --acked "$work/acked-3" \
  --unique-values --url "$(url 1)"
