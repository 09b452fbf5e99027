#!/usr/bin/env bash
# The HTTP API in a few calls of curl, against any node. Needs a running server:
#   quorate server --dev        or        scripts/cluster.sh start
set -euo pipefail

node=${QUORATE_URL:-http://127.0.0.1:8081}
node=${node%%,*}
topic=tour-$$

call() {
  printf '\n$ curl %s\n' "$*"
  curl --silent --show-error --fail-with-body --max-time 30 "$@"
  echo
}

trap 'curl --silent --max-time 30 -X DELETE "$node/v1/topics/$topic" >/dev/null || true' EXIT

call "$node/v1/cluster"

# A topic: two queues, each a Raft group.
call "$node/v1/topics" -H 'content-type: application/json' \
  -d "{\"name\":\"$topic\",\"queues\":2}"

# Acknowledged means: on the disks of a majority.
call "$node/v1/topics/$topic/messages" -H 'content-type: application/json' \
  -d '{"messages":[{"value":"hello","key":"order-17","tag":"created","headers":{"trace":"a1"},"queue":0}]}'

# A retry with the same key within ten minutes gets the first answer; nothing is stored twice.
for _ in 1 2; do
  call "$node/v1/topics/$topic/messages?queue=0" -H 'content-type: application/octet-stream' \
    -H 'idempotency-key: tour-1' --data-binary 'any bytes'
done

# Reading: from the beginning, and waiting for what is not there yet.
call "$node/v1/topics/$topic/queues/0/messages?offset=earliest"
call "$node/v1/topics/$topic/queues/0/messages?offset=latest&wait_ms=500"

# A consumer group commits where it has got to, and asks how far it is behind.
call -X PUT "$node/v1/groups/tour/offsets" -H 'content-type: application/json' \
  -d "{\"offsets\":[{\"topic\":\"$topic\",\"queue\":0,\"offset\":1}]}"
call "$node/v1/groups/tour/offsets?topic=$topic"
