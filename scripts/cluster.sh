#!/usr/bin/env bash
# A cluster of Quorate nodes on this machine, to try things and to break things.
# Everything listens on 127.0.0.1; node N has HTTP port base + N and peer port base + 100 + N.
set -euo pipefail

usage() {
  cat <<'EOF'
Usage: scripts/cluster.sh COMMAND [N]

  start      build the release binary if needed, start every node that does not run, wait until ready
  status     what runs, and what the cluster says of itself
  kill N     SIGKILL node N
  pause N    SIGSTOP node N            resume N   SIGCONT node N
  restart N  start node N again on its old data (a running one is stopped first)
  wipe N     kill node N if it runs, and delete its data
  logs N     the last lines of node N's log (with -f: and what comes)
  stop       end all nodes gracefully
  clean      stop, and delete data, logs and configuration

Environment:
  QUORATE_HOME           data, logs and configuration (default: .quorate in this repository)
  QUORATE_BASE_PORT      default 8080
  QUORATE_NODES          number of nodes, 1 to 9 (default 3)
  QUORATE_BIN            this binary instead of the one built here
  QUORATE_START_TIMEOUT  seconds to wait for the nodes (default 60)
Other QUORATE_… variables reach the nodes as their configuration.
EOF
}

die() {
  printf 'cluster.sh: %s\n' "$*" >&2
  exit 1
}

unset CDPATH
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)

# ---------------------------------------------------------------- settings

# find_home [make]: where the cluster lives. Only what starts a cluster makes that directory.
find_home() {
  home=${QUORATE_HOME:-$root/.quorate}
  [[ $home == /* ]] || home=$PWD/$home
  check_home
  [[ ${1:-} != make ]] || mkdir -p "$home"
  [[ -d $home ]] || return 0
  home=$(cd "$home" && pwd -P)
  check_home
}

check_home() {
  [[ $home != / ]] || die "QUORATE_HOME must not be /"
  # The path is written into the nodes' configuration between single quotes.
  [[ $home != *[\'$'\n']* ]] || die "QUORATE_HOME must not have a ' or a line end in it"
}

# Number of nodes and base port: what the cluster in this home was started with. The environment
# chooses them for a new cluster only, because the nodes know each other by their addresses.
load_settings() {
  local saved='' saved_nodes='' saved_base='' file=$home/cluster.settings
  if [[ -e $file ]]; then
    saved=$(<"$file")
    [[ $saved =~ ^([1-9])\ ([1-9][0-9]{3,4})$ ]] ||
      die "$file is damaged; write 'NODES BASE_PORT' into it (node-1/config.toml tells), or clean"
    saved_nodes=${BASH_REMATCH[1]} saved_base=${BASH_REMATCH[2]}
  fi
  nodes=${QUORATE_NODES:-${saved_nodes:-3}}
  base=${QUORATE_BASE_PORT:-${saved_base:-8080}}
  timeout=${QUORATE_START_TIMEOUT:-60}
  [[ $nodes =~ ^[1-9]$ ]] || die "QUORATE_NODES must be 1 to 9, not $nodes"
  [[ $base =~ ^[1-9][0-9]{3,4}$ ]] && ((base >= 1024 && base + 109 <= 65535)) ||
    die "QUORATE_BASE_PORT must be 1024 to 65426, not $base"
  [[ $timeout =~ ^(0|[1-9][0-9]{0,5})$ ]] || die "QUORATE_START_TIMEOUT must be a number of seconds"
  same_as_saved QUORATE_NODES "$nodes" "$saved_nodes"
  same_as_saved QUORATE_BASE_PORT "$base" "$saved_base"
}

# same_as_saved VARIABLE WANTED SAVED
same_as_saved() {
  [[ -z $3 || $2 == "$3" ]] ||
    die "$home holds a cluster with $1=$3, not $2. Unset $1 to use that cluster;" \
      "set QUORATE_HOME to another directory for a second one; or delete it with: scripts/cluster.sh clean"
}

save_settings() {
  printf '%s %s\n' "$nodes" "$base" >"$home/cluster.settings.new"
  mv -f "$home/cluster.settings.new" "$home/cluster.settings"
}

dir() { printf '%s/node-%s' "$home" "$1"; }
url() { printf 'http://127.0.0.1:%s' "$((base + $1))"; }

binary() { printf '%s' "${QUORATE_BIN:-${CARGO_TARGET_DIR:-$root/target}/release/quorate}"; }

build() {
  if [[ -z ${QUORATE_BIN:-} ]]; then
    (cd "$root" && cargo build --release --locked --bin quorate) || die "the build failed"
  fi
  [[ -x $(binary) ]] || die "$(binary) is not there"
}

write_config() {
  local node=$1 other
  mkdir -p "$(dir "$node")/data"
  {
    printf "node_id = %s\ndata_dir = '%s/data'\n\n[cluster]\nnodes = [\n" "$node" "$(dir "$node")"
    for ((other = 1; other <= nodes; other++)); do
      printf '  { id = %s, peer = "127.0.0.1:%s", url = "%s" },\n' \
        "$other" "$((base + 100 + other))" "$(url "$other")"
    done
    printf ']\n\n[http]\nlisten = "127.0.0.1:%s"\n' "$((base + node))"
    printf '\n[peer]\nlisten = "127.0.0.1:%s"\n' "$((base + 100 + node))"
  } >"$(dir "$node")/config.toml"
}

# ---------------------------------------------------------------- processes

# The pid of node N's process, or nothing. A pid file alone proves nothing: pids are used again,
# so the process must be a server with this node's configuration.
pid_of() {
  local config pid='' args=() i
  config=$(dir "$1")/config.toml
  { read -r pid <"$(dir "$1")/pid"; } 2>/dev/null || return 0
  [[ $pid =~ ^[1-9][0-9]*$ ]] || return 0
  if [[ -d /proc/self ]]; then
    { mapfile -d '' -t args <"/proc/$pid/cmdline"; } 2>/dev/null || return 0
    for ((i = 2; i < ${#args[@]}; i++)); do
      if [[ ${args[i - 2]} == server && ${args[i - 1]} == --config && ${args[i]} == "$config" ]]; then
        printf '%s' "$pid"
        return 0
      fi
    done
  elif [[ "$(ps -ww -o args= -p "$pid" 2>/dev/null)" == *" server --config $config" ]]; then
    printf '%s' "$pid"
  fi
  return 0
}

is_paused() {
  local pid state=''
  pid=$(pid_of "$1")
  [[ -n $pid ]] || return 1
  if [[ -d /proc/self ]]; then
    state=$(grep '^State:' "/proc/$pid/status" 2>/dev/null || true)
    state=${state#State:}
  else
    state=$(ps -o state= -p "$pid" 2>/dev/null || true)
  fi
  [[ $state =~ ^[[:space:]]*[Tt] ]]
}

# launch N: starts node N's process. It has a session of its own, so that neither Ctrl-C nor a
# `timeout` around the caller ends the cluster; where there is no setsid, a process group of its own.
launch() {
  local node=$1 pid tries own_session=()
  write_config "$node"
  if command -v setsid >/dev/null; then
    # In a process group of its own it would fork, and the server would have another pid.
    set +m
    own_session=(setsid)
  else
    set -m
  fi
  become_server "$node" "${own_session[@]}" >>"$(dir "$node")/log" 2>&1 </dev/null &
  pid=$!
  set +m
  disown "$pid" 2>/dev/null || true
  # Until the process has become the server, its command line is not the one we look for.
  for ((tries = 0; tries < 500; tries++)); do
    [[ -z $(pid_of "$node") ]] || break
    kill -0 "$pid" 2>/dev/null || break
    pause_for 0.02
  done
}

# become_server N [COMMAND…]: the rest of this (background) process's life is node N's server. Its
# pid is on file before it starts: whoever interrupts this script leaves no process nobody knows of.
become_server() {
  local node=$1 fd
  shift
  printf '%s\n' "$BASHPID" >"$(dir "$node")/pid" || exit 1
  # Whoever waits for the end of a pipe of the caller's must not wait for the server.
  for fd in /dev/fd/*; do
    fd=${fd##*/}
    if [[ $fd =~ ^[0-9]+$ ]] && ((fd > 2)); then eval "exec $fd>&-"; fi
  done
  # What makes a node itself comes from its file, whatever the environment of the caller says.
  exec "$@" nohup env -u QUORATE_CONFIG -u QUORATE_DEV -u QUORATE_NODE_ID -u QUORATE_DATA_DIR \
    -u QUORATE_CLUSTER_NODES -u QUORATE_HTTP_LISTEN -u QUORATE_HTTP_ADVERTISE \
    -u QUORATE_PEER_LISTEN \
    "$(binary)" server --config "$(dir "$node")/config.toml"
}

# Sleeps without starting a process.
pause_for() {
  [[ -n ${never:-} ]] || exec {never}<> <(:)
  read -r -t "$1" -u "$never" _ || true
}

# wait_gone N SECONDS: whether node N's process has ended by then.
wait_gone() {
  local deadline=$((SECONDS + $2))
  while [[ -n $(pid_of "$1") ]]; do
    ((SECONDS < deadline)) || return 1
    pause_for 0.05
  done
}

kill_node() {
  local pid
  pid=$(pid_of "$1")
  [[ -n $pid ]] || return 0
  kill -KILL "$pid" 2>/dev/null || true
  wait_gone "$1" 10 || die "node $1 (pid $pid) does not go away"
  rm -f "$(dir "$1")/pid"
}

# stop_nodes N…: SIGTERM to all of them at once, then a bounded wait for each.
stop_nodes() {
  local node pid asked=()
  for node in "$@"; do
    pid=$(pid_of "$node")
    [[ -n $pid ]] || continue
    asked+=("$node")
    kill -TERM "$pid" 2>/dev/null || true
    kill -CONT "$pid" 2>/dev/null || true
  done
  for node in "${asked[@]}"; do
    if wait_gone "$node" 20; then
      echo "node $node stopped"
    else
      echo "node $node did not stop in time; killing it" >&2
      kill_node "$node"
    fi
  done
  for node in "$@"; do
    [[ -n $(pid_of "$node") ]] || rm -f "$(dir "$node")/pid"
  done
}

# ---------------------------------------------------------------- readiness

# health N PATH: whether node N answers 200 there. Plain bash, for machines without curl.
# What it says goes into `said`.
said=''
health() {
  local line='' fd
  said=''
  # shellcheck disable=SC2261
  { exec {fd}<>"/dev/tcp/127.0.0.1/$((base + $1))"; } 2>/dev/null || return 1
  printf 'GET %s HTTP/1.1\r\nHost: quorate\r\nConnection: close\r\n\r\n' "$2" >&"$fd" 2>/dev/null || true
  read -r -t 2 -u "$fd" line || true
  if [[ -n $line && $line != 'HTTP/1.1 200 '* ]]; then
    # The head, an empty line, and the body, which has no line end.
    while read -r -t 1 -u "$fd" said && [[ $said != $'\r' ]]; do :; done
    read -r -t 1 -u "$fd" said || true
  fi
  exec {fd}>&-
  [[ $line == 'HTTP/1.1 200 '* ]]
}

# wait_healthy N PATH DEADLINE: dies with the end of the log when the node does not make it.
wait_healthy() {
  local node=$1 path=$2 deadline=$3
  until health "$node" "$path" && [[ -n $(pid_of "$node") ]]; do
    if [[ -z $(pid_of "$node") ]]; then
      show_log "$node" 20 >&2
      die "node $node has ended; see its log above"
    fi
    if is_paused "$node"; then
      die "node $node is paused; resume it with: scripts/cluster.sh resume $node"
    fi
    if ((SECONDS >= deadline)); then
      show_log "$node" 20 >&2
      die "node $node does not answer 200 on $path; see its log above; it says: ${said:-nothing}"
    fi
    pause_for 0.1
  done
}

show_log() {
  tail -n "$2" "$(dir "$1")/log"
}

running() {
  local node count=0
  for ((node = 1; node <= nodes; node++)); do
    if [[ -n $(pid_of "$node") ]]; then count=$((count + 1)); fi
  done
  printf '%s' "$count"
}

# ---------------------------------------------------------------- commands

start() {
  local node deadline
  build
  find_home make
  save_settings
  for ((node = 1; node <= nodes; node++)); do
    if [[ -n $(pid_of "$node") ]]; then
      echo "node $node runs already"
    else
      launch "$node"
    fi
  done
  deadline=$((SECONDS + timeout))
  for ((node = 1; node <= nodes; node++)); do
    wait_healthy "$node" /health/ready "$deadline"
    echo "node $node is ready at $(url "$node")"
  done
}

restart() {
  local node=$1 deadline
  [[ -d $(dir "$node")/data ]] || die "node $node was never started; use: scripts/cluster.sh start"
  [[ -x $(binary) ]] || build
  stop_nodes "$node"
  launch "$node"
  deadline=$((SECONDS + timeout))
  wait_healthy "$node" /health/live "$deadline"
  # Without a majority no node can be ready: then the first nodes to come back must not wait.
  if (($(running) * 2 > nodes)); then
    wait_healthy "$node" /health/ready "$deadline"
    echo "node $node is ready at $(url "$node")"
  else
    echo "node $node is up and waits for a majority"
  fi
}

status() {
  local node pid state ready asked=''
  printf '%-5s %-8s %-8s %-6s %s\n' NODE PROCESS PID READY URL
  for ((node = 1; node <= nodes; node++)); do
    pid=$(pid_of "$node") state=stopped ready=no
    if [[ -n $pid ]]; then
      state=running
      if is_paused "$node"; then
        state=paused
      elif health "$node" /health/ready; then
        ready=yes asked=${asked:-$(url "$node")}
      fi
    fi
    printf '%-5s %-8s %-8s %-6s %s\n' "$node" "$state" "${pid:--}" "$ready" "$(url "$node")"
  done
  if [[ -n $asked && -x $(binary) ]]; then
    echo
    "$(binary)" cluster status --url "$asked" || true
  fi
}

signal() {
  local pid
  pid=$(pid_of "$1")
  [[ -n $pid ]] || die "node $1 does not run"
  kill "-$2" "$pid"
}

clean() {
  local node
  stop
  for node in "$home"/node-[1-9]; do
    [[ -d $node ]] && rm -rf -- "$node"
  done
  rm -f "$home/cluster.settings" "$home/cluster.settings.new"
  rmdir "$home" 2>/dev/null || true
}

stop() {
  local node all=()
  for ((node = 1; node <= 9; node++)); do all+=("$node"); done
  stop_nodes "${all[@]}"
}

main() {
  local command=${1:-} node=${2:-}
  case $command in
  '' | help | -h | --help)
    usage
    [[ -n $command ]] || exit 2
    exit 0
    ;;
  esac
  find_home
  # Ending what runs and deleting it need no settings, so nothing can be wrong with them.
  case $command in
  stop | clean) ;;
  *) load_settings ;;
  esac
  case $command in
  kill | pause | resume | restart | wipe | logs)
    [[ $node =~ ^[1-9]$ ]] && ((node <= nodes)) || die "$command needs a node, 1 to $nodes"
    ;;
  start | status | stop | clean) ;;
  *)
    usage >&2
    exit 2
    ;;
  esac
  case $command in
  start | status | stop | clean) "$command" ;;
  restart) restart "$node" ;;
  kill)
    [[ -n $(pid_of "$node") ]] || die "node $node does not run"
    kill_node "$node"
    echo "node $node killed"
    ;;
  pause)
    signal "$node" STOP
    echo "node $node paused"
    ;;
  resume)
    signal "$node" CONT
    echo "node $node resumed"
    ;;
  wipe)
    [[ -d $(dir "$node") ]] || die "node $node was never started: it has nothing to wipe"
    kill_node "$node"
    rm -rf -- "$(dir "$node")/data"
    mkdir -p "$(dir "$node")/data"
    echo "node $node has lost its data"
    ;;
  logs)
    [[ -r $(dir "$node")/log ]] || die "node $node has no log"
    if [[ ${3:-} == -f ]]; then
      exec tail -n 100 -F "$(dir "$node")/log"
    fi
    show_log "$node" 100
    ;;
  esac
}

main "$@"
