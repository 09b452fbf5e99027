#!/usr/bin/env bash
# Proves that the tests find bugs: breaks one promise of the product at a time, see
# storage/src/mutation.rs, and runs the tests that must fail then. Ends with 1 if one passes.
#
#   scripts/mutations.sh [mutation ...]     all of the table below if none is named
#
# RUNS is how often a test may pass before its mutation counts as not caught (1), LIMIT how many
# seconds one run may take (300), and CARGO_TARGET_DIR where to build (target/mutations).
set -euo pipefail
cd "$(dirname "$0")/.."

# mutation                      package          target      test
TABLE="
no-fsync                        quorate-storage  commit_log  crash::every_promise_survives_every_crash
no-fsync                        quorate-storage  commit_log  durability::a_failed_fsync_or_write_poisons_the_log
no-fsync                        quorate-storage  commit_log  every_crash::every_state_of_every_crash_is_recovered_from
fsync-after-ack                 quorate-storage  commit_log  crash::every_promise_survives_every_crash
fsync-after-ack                 quorate-storage  commit_log  every_crash::every_state_of_every_crash_is_recovered_from
retry-failed-fsync              quorate-storage  commit_log  durability::a_failed_fsync_or_write_poisons_the_log
retry-failed-fsync              quorate-storage  commit_log  durability::a_failed_fsync_is_not_healed_by_the_next_one
retry-failed-fsync              quorate-storage  commit_log  every_fault::every_failing_operation_is_survived_and_told
forget-vote                     quorate-storage  commit_log  crash::every_promise_survives_every_crash
forget-vote                     quorate-storage  commit_log  durability::a_vote_comes_after_the_appends_before_it
forget-vote                     quorate-storage  commit_log  every_crash::every_state_of_every_crash_is_recovered_from
vote-overtakes-appends          quorate-storage  commit_log  crash::every_promise_survives_every_crash
vote-overtakes-appends          quorate-storage  commit_log  every_crash::every_state_of_every_crash_is_recovered_from
callbacks-out-of-order          quorate-storage  commit_log  crash::every_promise_survives_every_crash
callbacks-out-of-order          quorate-storage  commit_log  every_crash::every_state_of_every_crash_is_recovered_from
append-not-readable             quorate-storage  commit_log  crash::every_promise_survives_every_crash
append-not-readable             quorate-storage  commit_log  every_crash::every_state_of_every_crash_is_recovered_from
truncate-at-any-bad-checksum    quorate-storage  commit_log  recovery::bad_bytes_below_the_durable_end_are_damage
truncate-at-any-bad-checksum    quorate-storage  commit_log  recovery::zeroes_in_the_middle_are_damage_too
revive-stale-tail               quorate-storage  commit_log  recovery::a_stale_tail_is_never_revived
revive-stale-tail               quorate-storage  commit_log  every_crash::every_state_of_every_crash_is_recovered_from
no-rewrite-after-restart        quorate-storage  commit_log  durability::what_a_restart_finds_after_a_failed_fsync_is_made_durable_before_it_counts
no-rewrite-after-restart        quorate-storage  commit_log  every_fault::every_failing_operation_is_survived_and_told
no-directory-fsync              quorate-storage  commit_log  durability::a_new_segment_is_in_its_directory_before_anything_in_it_is_promised
no-directory-fsync              quorate-storage  commit_log  crash::every_promise_survives_every_crash
no-directory-fsync              quorate-storage  commit_log  every_crash::every_state_of_every_crash_is_recovered_from
no-directory-fsync              quorate-storage  state_files snapshots::every_state_of_every_crash_is_recovered_from
no-directory-fsync              quorate-storage  state_files queue_index::every_state_of_every_crash_is_recovered_from
seal-not-synced                 quorate-storage  commit_log  crash::every_promise_survives_every_crash
seal-not-synced                 quorate-storage  commit_log  every_crash::every_state_of_every_crash_is_recovered_from
clean-without-carrying          quorate-storage  commit_log  crash::every_promise_survives_every_crash
clean-without-carrying          quorate-storage  commit_log  every_crash::every_state_of_every_crash_is_recovered_from
move-what-was-cut               quorate-storage  commit_log  cleaning::what_is_cut_while_it_is_moved_does_not_come_back
moved-not-synced                quorate-storage  commit_log  cleaning::a_quiet_group_is_moved_out_of_the_way_and_stays_what_it_was
serve-bad-frame                 quorate-storage  commit_log  recovery::bad_bytes_of_a_sealed_segment_are_damage_when_read
serve-bad-frame                 quorate-storage  commit_log  every_fault::a_wrong_byte_is_never_served
serve-bad-snapshot              quorate-storage  lib         snapshot::tests::every_flipped_byte_and_every_truncation_is_noticed_and_set_aside
serve-bad-snapshot              quorate-storage  state_files snapshots::a_wrong_byte_is_never_served
serve-bad-index-record          quorate-storage  lib         queue_index::tests::damage::every_flipped_byte_of_a_durable_record_is_noticed_when_it_is_read
serve-bad-index-record          quorate-storage  state_files queue_index::a_wrong_byte_is_never_served
snapshot-not-synced             quorate-storage  state_files snapshots::every_state_of_every_crash_is_recovered_from
index-not-synced                quorate-storage  state_files queue_index::every_state_of_every_crash_is_recovered_from
apply-not-clamped               quorate-raft     lib         machine::tests::a_checkpoint_beyond_the_end_of_the_log_is_not_begun_with_nor_found_again
suspect-tail-votes              quorate-raft     groups      suspect_tails_do_not_vote_until_caught_up
ack-before-majority             quorate-raft     groups      every_replica_applies_the_same
leader-restore                  quorate          simulation  SIM_SEEDS=12
read-past-commit                quorate          lib         broker::cluster_tests::a_leader_left_alone_shows_nothing_that_is_not_committed
skip-dedupe-in-snapshots        quorate          lib         broker::queue::state::tests::a_producers_retry_is_stored_once_across_restart_and_install
apply-with-node-clock           quorate          lib         broker::queue::state::tests::log_time_never_goes_back
no-member-check                 quorate          lib         coordinator::machine::tests::a_member_is_fenced_while_there_are_none
hand-over-at-once               quorate          lib         coordinator::membership::tests::no_queue_is_ever_owned_twice
any-member-commits              quorate          lib         coordinator::membership::tests::no_queue_is_ever_owned_twice
any-member-commits              quorate          lib         coordinator::membership::tests::commits_are_of_the_owner_in_an_epoch_in_which_it_had_the_queue
lease-twice                     quorate          lib         coordinator::leases::machine_tests::model::leases_keep_their_word
lease-twice                     quorate          lib         coordinator::leases::machine_tests::granting::a_stale_cursor_takes_nothing_new
forget-acks                     quorate          lib         coordinator::leases::machine_tests::model::leases_keep_their_word
ack-of-any-lease                quorate          lib         coordinator::leases::machine_tests::model::leases_keep_their_word
ignore-earlier-of-key           quorate          lib         coordinator::leases::machine_tests::model::leases_keep_their_word
take-forwarded-again            quorate          lib         broker::queue::state::tests::what_a_forwarder_brings_again_is_stored_once_however_late
deliver-by-log-time             quorate          lib         broker::queue::held_tests::another_leaders_fast_clock_makes_nothing_due
deliver-cancelled               quorate          lib         broker::queue::held_tests::a_delayed_batch_is_either_cancelled_or_delivered
cancel-delivered                quorate          lib         broker::queue::held_tests::a_delayed_batch_is_either_cancelled_or_delivered
decide-again                    quorate          lib         coordinator::transactions::random_tests::decisions_stand_and_replicas_agree
commit-unprepared               quorate          lib         coordinator::transactions::random_tests::decisions_stand_and_replicas_agree
show-rolled-back                quorate          lib         broker::transactions::tests::a_rollback_that_stops_anywhere_ends_right
leave-offsets-behind            quorate          lib         broker::transactions::tests::a_commit_that_stops_anywhere_ends_right
skip-refused                    quorate          http_api    exchange_flow::a_full_topic_gets_the_rest_when_it_has_room_and_holds_up_only_itself
trim-beyond-end                 quorate          lib         broker::queue::state::tests::a_trim_moves_the_beginning_forward_only_and_not_beyond_the_end
purge-under-late                quorate          lib         broker::queue::held_tests::what_is_still_needed_of_the_log_counts_what_was_delivered_late
open-without-boundary           quorate-raft     lib         machine::tests::a_log_that_was_purged_is_not_opened_without_its_boundary
ignore-in-flight                quorate          lib         broker::backlog::tests::the_last_one_that_fits_is_taken_and_the_next_is_not
ignore-in-flight                quorate          http_api    backlog::of_many_at_once_exactly_as_many_are_taken_as_fit
refuse-on-a-guess               quorate          http_api    backlog::of_many_at_once_exactly_as_many_are_taken_as_fit
believe-key-index               quorate          lib         broker::path_tests::what_the_key_index_names_is_compared_with_the_key
skip-members-in-snapshots       quorate          lib         coordinator::machine::tests::replicas_agree_whenever_they_restart
skip-leases-in-snapshots        quorate          lib         coordinator::leases::machine_tests::model::leases_keep_their_word
skip-transactions-in-snapshots  quorate          lib         coordinator::transactions::random_tests::decisions_stand_and_replicas_agree
skip-held-in-snapshots          quorate          lib         broker::queue::held_tests::held_batches_come_through_every_beginning
"

RUNS=${RUNS:-1}
LIMIT=${LIMIT:-300}
export CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-$PWD/target/mutations}
# A found counterexample is wanted here, and not to be kept or made small.
export PROPTEST_DISABLE_FAILURE_PERSISTENCE=1 PROPTEST_MAX_SHRINK_ITERS=0
unset QUORATE_MUTATION

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
chosen() { # the rows of the mutations asked for
    awk -v asked=" $* " 'NF == 4 && (asked == "  " || index(asked, " " $1 " "))' <<<"$TABLE"
}
chosen "$@" >"$work/rows"
for name in "$@"; do
    grep -q "^$name " "$work/rows" || { echo "no test is listed for $name" >&2; exit 2; }
done

build() {
    local flags=() target
    while read -r package; do flags+=(-p "$package"); done < <(awk '{print $2}' "$work/rows" | sort -u)
    while read -r target; do
        if [ "$target" = lib ]; then flags+=(--lib); else flags+=(--test "$target"); fi
    done < <(awk '{print $3}' "$work/rows" | sort -u)
    cargo test --no-run --features mutations "${flags[@]}" 2>"$work/build" ||
        { cat "$work/build" >&2; exit 2; }
}

executable() { # package target: the test program that cargo named
    local name=$2
    [ "$name" = lib ] && name=${1//-/_}
    sed -n "s|^ *Executable .* (\(.*/$name-[0-9a-f]*\))\$|\1|p" "$work/build" | head -1
}

directory() {
    case $1 in quorate) echo . ;; *) echo "${1#quorate-}" ;; esac
}

# Runs one test under a mutation, or none; leaves how it ended in $ended.
attempt() { # mutation package target test
    local program status=0 setting=() filter=(--exact "$4")
    [ "$3" != simulation ] || { setting=("$4") filter=(); } # a program without a test harness
    program=$(realpath "$(executable "$2" "$3")")
    (cd "$(directory "$2")" && QUORATE_MUTATION=$1 timeout -k 10 "$LIMIT" \
        env "${setting[@]}" "$program" "${filter[@]}" >"$work/output" 2>&1) 2>/dev/null || status=$?
    if [ "$status" = 0 ]; then
        grep -qE '^(running 1 test|[1-9][0-9]* seeds)' "$work/output" && ended=passed || ended=absent
    elif [ "$status" = 124 ] || [ "$status" = 137 ]; then
        ended=timeout
    elif grep -q '^ *[0-9.]* VIOLATION' "$work/output"; then
        ended=violation # of what the simulation checks
    elif ! grep -q '^test result: FAILED' "$work/output"; then
        ended=died
    elif grep -qE 'panicked at [^ ]*test' "$work/output"; then
        ended=assertion
    else
        ended=panic # in the product
    fi
}

build
echo "without a mutation, every test must pass:"
while read -r package target test; do
    attempt "" "$package" "$target" "$test"
    if [ "$ended" != passed ]; then
        cat "$work/output"
        echo "$package $target $test: $ended without a mutation" >&2
        exit 2
    fi
done < <(awk '{print $2, $3, $4}' "$work/rows" | sort -u)
echo "they do."
echo

format='%-30s %-10s %-18s %8s  %s\n'
# shellcheck disable=SC2059
printf "$format" mutation ended run seconds test
: >"$work/caught"
while read -r mutation package target test; do
    started=$(date +%s.%N)
    for ((run = 1; run <= RUNS; run++)); do
        attempt "$mutation" "$package" "$target" "$test"
        [ "$ended" = passed ] || break
    done
    [ "$run" -le "$RUNS" ] || run=$RUNS
    # The seed of a random test, or where a systematic one was.
    place=$(grep -oE '(CRASH|SIM)_SEED=[0-9]+|power lost after [0-9]+' "$work/output" | tail -1 |
        sed 's/.*_SEED=/, seed /; s/power lost after /, operation /' || true)
    case $ended in assertion | panic | violation) echo "$mutation $test" >>"$work/caught" ;; esac
    seconds=$(awk -v a="$started" -v b="$(date +%s.%N)" 'BEGIN { printf "%.1f", b - a }')
    # shellcheck disable=SC2059
    printf "$format" "$mutation" "$ended" "$run$place" "$seconds" "$test"
done <"$work/rows"

named() { sed -n 's/^ *("\(.*\)", Mutation::.*/\1/p' storage/src/mutation.rs; }
untested=$(named | grep -vxFf <(awk 'NF == 4 {print $1}' <<<"$TABLE") || true)
[ -z "$untested" ] || printf '\nno test is listed for: %s\n' "$(tr '\n' ' ' <<<"$untested")"

missed=$(awk '{print $1, $4}' "$work/rows" | grep -vxFf "$work/caught" || true)
if [ -n "$missed" ]; then
    printf '\nnot caught:\n%s\n' "$missed"
    exit 1
fi
printf '\nall %s mutations were caught\n' "$(awk '{print $1}' "$work/rows" | sort -u | wc -l)"
