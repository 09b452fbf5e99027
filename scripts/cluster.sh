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
  restart N  start node N again on its old data (a running one is stopped first); without a
             majority of nodes running it does not wait until the node is ready
  wipe N     kill node N if it runs, and delete its data: a lost disk. The other nodes know it and
             refuse it when it comes back empty (docs/operations.md), so `start` and `restart N`
             fail then. The way back: put its saved data/ directory back, or `clean` the cluster
  logs N     the last lines of node N's log (with -f: and what comes)
  stop       end all nodes gracefully
  clean      stop, and delete data, logs and configuration

Nodes run on when this script or its caller is interrupted, until `stop` or `clean`.

Environment:
  QUORATE_HOME           data, logs and configuration (default: .quorate in this repository)
  QUORATE_BASE_PORT      default 8080; of an existing cluster, what it was made with
  QUORATE_NODES          number of nodes, 1 to 9 (default 3; of an existing cluster, the same)
  QUORATE_BIN            this binary instead of the one built here
  QUORATE_START_TIMEOUT  seconds to wait for the nodes (default 60)
Other QUORATE_… variables reach the nodes as their configuration.
EOF
}

complain() { printf 'cluster.sh: %s\n' "$*" >&2; }
die() {
  complain "$@"
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

# What starts or ends nodes does so one after the other: of two starts at once, the second finds the
# nodes of the first. The lock is on the home directory, so that no file stays behind; the kernel
# gives it back when this script ends. Nobody holds it while waiting for a node to be ready.
lock=''
take_lock() {
  command -v flock >/dev/null || return 0
  while [[ -d $home ]]; do
    [[ -r $home ]] || die "cannot read $home"
    { exec {lock}<"$home"; } 2>/dev/null || continue
    flock "$lock" || die "cannot lock $home"
    # Who had it before may have been `clean`: then this is no longer the directory of that name.
    [[ ! $home -ef /dev/fd/$lock ]] || return 0
    drop_lock
    [[ ${1:-} != make ]] || mkdir -p "$home"
  done
}

drop_lock() {
  [[ -n $lock ]] || return 0
  exec {lock}<&-
  lock=''
}

log_from=()
# launch N: starts node N's process. It has a session of its own, so that neither Ctrl-C nor a
# `timeout` around the caller ends the cluster; where there is no setsid, a process group of its own.
launch() {
  local node=$1 pid tries own_session=()
  write_config "$node"
  log_from[node]=$(wc -c 2>/dev/null <"$(dir "$node")/log" || echo 0)
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

# Whether nothing is left of process PID, ports and file locks included: a killed process loses its
# command line first. A zombie is gone: in a container there may be nobody to bury it.
is_gone() {
  local tasks
  if [[ ! -d /proc/self ]]; then
    if kill -0 "$1" 2>/dev/null; then return 1; else return 0; fi
  fi
  tasks=("/proc/$1/task"/*)
  ((${#tasks[@]} == 1)) || return 1
  [[ -d ${tasks[0]} ]] || return 0
  grep -q '^State:[[:space:]]*[ZX]' "/proc/$1/status" 2>/dev/null || [[ ! -d /proc/$1 ]]
}

# wait_gone PID SECONDS: whether the process has ended by then.
wait_gone() {
  local deadline=$((SECONDS + $2))
  until is_gone "$1"; do
    ((SECONDS < deadline)) || return 1
    pause_for 0.05
  done
}

kill_node() {
  local pid
  pid=$(pid_of "$1")
  [[ -n $pid ]] || return 0
  kill -KILL "$pid" 2>/dev/null || true
  wait_gone "$pid" 10 || die "node $1 (pid $pid) does not go away"
}

# stop_nodes N…: SIGTERM to all of them at once, then a bounded wait for each.
stop_nodes() {
  local node pid pids=()
  for node in "$@"; do
    pid=$(pid_of "$node")
    [[ -n $pid ]] || continue
    pids[node]=$pid
    kill -TERM "$pid" 2>/dev/null || true
    kill -CONT "$pid" 2>/dev/null || true
  done
  for node in "${!pids[@]}"; do
    if wait_gone "${pids[node]}" 20; then
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
  # The node may be killed at any moment: writing to it then must not end this script.
  trap : PIPE
  { exec {fd}<>"/dev/tcp/127.0.0.1/$((base + $1))"; } 2>/dev/null || return 1
  {
    printf 'GET %s HTTP/1.1\r\nHost: quorate\r\nConnection: close\r\n\r\n' "$2" >&"$fd" || true
    read -r -t 2 -u "$fd" line || true
    if [[ -n $line && $line != 'HTTP/1.1 200 '* ]]; then
      # The head, an empty line, and the body, which has no line end.
      while read -r -t 1 -u "$fd" said && [[ $said != $'\r' ]]; do :; done
      read -r -t 1 -u "$fd" said || true
    fi
  } 2>/dev/null
  exec {fd}>&-
  [[ $line == 'HTTP/1.1 200 '* ]]
}

is_ready() { health "$1" /health/ready && [[ -n $(pid_of "$1") ]]; }

# can_become_ready N: says why, with the end of the log, when node N's process has ended or is paused.
can_become_ready() {
  if [[ -z $(pid_of "$1") ]]; then
    show_log "$1" 20 >&2
    complain "node $1 has ended; its last log lines are above"
    return 1
  elif is_paused "$1"; then
    complain "node $1 is paused; resume it with: scripts/cluster.sh resume $1"
    return 1
  fi
}

too_late() {
  show_log "$1" 20 >&2
  health "$1" /health/ready || true
  complain "node $1 is not ready after $timeout s; its last log lines are above; it says: ${said:-nothing}"
}

# wait_ready N…: whether all of them become ready. The first that cannot ends the waiting: without a
# majority the others would wait for ever.
wait_ready() {
  local node waiting=("$@") left deadline=$((SECONDS + timeout))
  while :; do
    left=()
    for node in "${waiting[@]}"; do
      can_become_ready "$node" || return 1
    done
    for node in "${waiting[@]}"; do
      if is_ready "$node"; then
        echo "node $node is ready at $(url "$node")"
      else
        left+=("$node")
      fi
    done
    ((${#left[@]} > 0)) || return 0
    waiting=("${left[@]}")
    if ((SECONDS >= deadline)); then
      too_late "${left[0]}"
      return 1
    fi
    pause_for 0.1
  done
}

# show_log N LINES: the last ones; of a node started here, only what it has said since.
show_log() {
  tail -c "+$((${log_from[$1]:-0} + 1))" "$(dir "$1")/log" | tail -n "$2"
}

# The nodes that run and are not paused.
running() {
  local node found=()
  for ((node = 1; node <= nodes; node++)); do
    [[ -z $(pid_of "$node") ]] || is_paused "$node" || found+=("$node")
  done
  printf '%s' "${found[*]}"
}

# A majority of the nodes runs. Until then none of them can be ready.
majority_runs() {
  local up
  read -r -a up <<<"$(running)"
  ((${#up[@]} * 2 > nodes))
}

port_taken() { (exec 3<>"/dev/tcp/127.0.0.1/$1") 2>/dev/null; }

# need_ports N: another program on node N's ports would answer in its place.
need_ports() {
  local port deadline=$((SECONDS + 3))
  for port in "$((base + $1))" "$((base + 100 + $1))"; do
    while port_taken "$port"; do
      ((SECONDS < deadline)) ||
        die "node $1 needs port $port, and another program listens there. End that one, or set" \
          "QUORATE_BASE_PORT for a cluster elsewhere (of an existing one: after clean)"
      pause_for 0.1
    done
  done
}

# ---------------------------------------------------------------- commands

start() {
  local node all=() runs=() up
  build
  find_home make
  take_lock make
  # Another start may have made a cluster here meanwhile.
  load_settings
  for ((node = 1; node <= nodes; node++)); do
    all+=("$node")
    runs[node]=$(pid_of "$node")
    [[ -n ${runs[node]} ]] || need_ports "$node"
  done
  save_settings
  for node in "${all[@]}"; do
    if [[ -n ${runs[node]} ]]; then
      echo "node $node runs already"
    else
      launch "$node"
    fi
  done
  drop_lock
  wait_ready "${all[@]}" || {
    up=$(running)
    [[ -z $up ]] || complain "still running: node ${up// /, }; to end them: scripts/cluster.sh stop"
    exit 1
  }
}

restart() {
  local node=$1 deadline
  [[ -x $(binary) ]] || build
  take_lock
  [[ -d $(dir "$node")/data ]] || die "node $node was never started; use: scripts/cluster.sh start"
  stop_nodes "$node"
  need_ports "$node"
  launch "$node"
  drop_lock
  deadline=$((SECONDS + timeout))
  until is_ready "$node"; do
    can_become_ready "$node" || exit 1
    if ! majority_runs && health "$node" /health/live; then
      echo "node $node runs and waits for a majority"
      return 0
    fi
    if ((SECONDS >= deadline)); then
      too_late "$node"
      exit 1
    fi
    pause_for 0.1
  done
  echo "node $node is ready at $(url "$node")"
}

status() {
  local node pid state ready first=''
  printf '%-5s %-8s %-8s %-6s %s\n' NODE PROCESS PID READY URL
  for ((node = 1; node <= nodes; node++)); do
    pid=$(pid_of "$node") state=stopped ready=no
    if [[ -n $pid ]]; then
      state=running
      if is_paused "$node"; then
        state=paused
      elif health "$node" /health/ready; then
        ready=yes first=${first:-$(url "$node")}
      fi
    fi
    printf '%-5s %-8s %-8s %-6s %s\n' "$node" "$state" "${pid:--}" "$ready" "$(url "$node")"
  done
  if [[ -n $first && -x $(binary) ]]; then
    echo
    "$(binary)" cluster status --url "$first" || true
  fi
}

pause_node() {
  local pid tries
  pid=$(pid_of "$1")
  [[ -n $pid ]] || die "node $1 does not run"
  kill -STOP "$pid"
  for ((tries = 0; tries < 100; tries++)); do
    ! is_paused "$1" || return 0
    pause_for 0.02
  done
}

resume_node() {
  local pid
  pid=$(pid_of "$1")
  [[ -n $pid ]] || die "node $1 does not run"
  kill -CONT "$pid"
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
  take_lock
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
  start | status | stop | clean)
    (($# == 1)) || die "$command is for all nodes; it takes no argument"
    ;;
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
    pause_node "$node"
    echo "node $node paused"
    ;;
  resume)
    resume_node "$node"
    echo "node $node resumed"
    ;;
  wipe)
    [[ -d $(dir "$node") ]] || die "node $node was never started: it has nothing to wipe"
    take_lock
    kill_node "$node"
    rm -rf -- "$(dir "$node")/data"
    mkdir -p "$(dir "$node")/data"
    echo "node $node has lost its data; the nodes that know it will refuse it"
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
