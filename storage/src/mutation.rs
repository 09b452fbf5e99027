//! Deliberate faults, to show that the tests would find such bugs.
//!
//! Each is one promise broken in one place, behind `if mutation::on(..)`. Without the cargo feature
//! `mutations` the question is the constant `false` and nothing of it is left in the program; with it,
//! the environment variable `QUORATE_MUTATION` names the one fault of this process.
//! `scripts/mutations.sh` runs the tests that must fail under each.

/// A promise, broken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mutation {
    /// The writer reports bytes durable that were never fsynced.
    NoFsync,
    /// Callbacks are called before the fsync they promise.
    FsyncAfterAck,
    /// A failed fsync is tried again, and the second result believed.
    RetryFailedFsync,
    /// A vote is reported saved and never written.
    ForgetVote,
    /// A vote is written and reported ahead of the appends before it.
    VoteOvertakesAppends,
    /// The callbacks of one write come in the wrong order.
    CallbacksOutOfOrder,
    /// Appended entries are readable only after they were written.
    AppendNotReadable,
    /// Recovery takes damage below the durable end for a torn tail.
    TruncateAtAnyBadChecksum,
    /// What was cut off the log stays on disk, and frames are not tied to their epoch.
    ReviveStaleTail,
    /// Recovery counts bytes that it found but that may never have reached the disk.
    NoRewriteAfterRestart,
    /// Names of new files are not made durable.
    NoDirectoryFsync,
    /// The log goes on in the next segment before the full one is synced.
    SealNotSynced,
    /// Cleaning removes votes and purges without writing them again.
    CleanWithoutCarrying,
    /// Cleaning moves entries that were cut or purged since it read them.
    MoveWhatWasCut,
    /// Cleaning removes segments before what it moved out of them is synced.
    MovedNotSynced,
    /// An entry is served whatever its checksum says.
    ServeBadFrame,
    /// A snapshot is served whatever its checksum says.
    ServeBadSnapshot,
    /// A record of the queue index is believed whatever its checksum says.
    ServeBadIndexRecord,
    /// A snapshot gets its name before its bytes are durable.
    SnapshotNotSynced,
    /// The queue index reports records durable that were never fsynced.
    IndexNotSynced,
    /// A restarted leader goes on in its old term.
    LeaderRestore,
    /// A follower is taken to have stored appends that were never sent.
    AckBeforeMajority,
    /// A checkpoint beyond the end of the recovered log is restored.
    ApplyNotClamped,
    /// A replica that may have lost its tail votes.
    SuspectTailVotes,
    /// Checkpoints and snapshots leave the table of producers out.
    SkipDedupeInSnapshots,
    /// Apply reads the clock of its node.
    ApplyWithNodeClock,
    /// An offset commit is accepted from a member although there are none.
    NoMemberCheck,
    /// Reads serve entries of the log that are not committed.
    ReadPastCommit,
    /// A queue is given to its next owner while the last one still has it.
    HandOverAtOnce,
    /// A member commits in a queue that another one owns.
    AnyMemberCommits,
    /// A message is leased again before its lease has ended.
    LeaseTwice,
    /// An ack is confirmed, and the message stays in flight.
    ForgetAcks,
    /// The ack of a lease that has ended ends the one that another consumer has.
    AckOfAnyLease,
    /// An ordered consumer is given a message although an earlier one of its key is not done.
    IgnoreEarlierOfKey,
    /// What a forwarder brings again, a dead letter or a routed message, is stored again.
    TakeForwardedAgain,
    /// Delayed messages are due by the log's time, which a faster clock may have set.
    DeliverByLogTime,
    /// A cancelled message stays among those that become due.
    DeliverCancelled,
    /// A message that was delivered is cancelled.
    CancelDelivered,
    /// The decision of a transaction can be changed.
    DecideAgain,
    /// A commit is decided before all participants are prepared.
    CommitUnprepared,
    /// A queue shows its part of a transaction that was rolled back.
    ShowRolledBack,
    /// A commit leaves the offsets of its transaction where they were.
    LeaveOffsetsBehind,
    /// A forwarder goes on although a topic did not take everything.
    SkipRefused,
    /// A trim moves the beginning of a queue beyond its end.
    TrimBeyondEnd,
    /// The log is purged under messages that became visible long after they were stored.
    PurgeUnderLate,
    /// A log that was purged is opened with any later checkpoint.
    OpenWithoutBoundary,
    /// What is on its way into a bounded queue does not count.
    IgnoreInFlight,
    /// A bounded queue refuses without asking how far its consumers are.
    RefuseOnAGuess,
    /// What the key index names is not compared with the key that is looked for.
    BelieveKeyIndex,
    /// Checkpoints and snapshots leave the members of groups out.
    SkipMembersInSnapshots,
    /// Checkpoints and snapshots leave leases out.
    SkipLeasesInSnapshots,
    /// Checkpoints and snapshots leave transactions out.
    SkipTransactionsInSnapshots,
    /// Checkpoints and snapshots leave out what is held.
    SkipHeldInSnapshots,
}

/// Whether this process is to have the fault.
#[cfg(not(feature = "mutations"))]
#[inline(always)]
pub const fn on(_: Mutation) -> bool {
    false
}

#[cfg(feature = "mutations")]
pub use chosen::on;

#[cfg(feature = "mutations")]
mod chosen {
    use std::sync::OnceLock;

    use super::Mutation;

    const VARIABLE: &str = "QUORATE_MUTATION";

    const NAMES: &[(&str, Mutation)] = &[
        ("no-fsync", Mutation::NoFsync),
        ("fsync-after-ack", Mutation::FsyncAfterAck),
        ("retry-failed-fsync", Mutation::RetryFailedFsync),
        ("forget-vote", Mutation::ForgetVote),
        ("vote-overtakes-appends", Mutation::VoteOvertakesAppends),
        ("callbacks-out-of-order", Mutation::CallbacksOutOfOrder),
        ("append-not-readable", Mutation::AppendNotReadable),
        (
            "truncate-at-any-bad-checksum",
            Mutation::TruncateAtAnyBadChecksum,
        ),
        ("revive-stale-tail", Mutation::ReviveStaleTail),
        ("no-rewrite-after-restart", Mutation::NoRewriteAfterRestart),
        ("no-directory-fsync", Mutation::NoDirectoryFsync),
        ("seal-not-synced", Mutation::SealNotSynced),
        ("clean-without-carrying", Mutation::CleanWithoutCarrying),
        ("move-what-was-cut", Mutation::MoveWhatWasCut),
        ("moved-not-synced", Mutation::MovedNotSynced),
        ("serve-bad-frame", Mutation::ServeBadFrame),
        ("serve-bad-snapshot", Mutation::ServeBadSnapshot),
        ("serve-bad-index-record", Mutation::ServeBadIndexRecord),
        ("snapshot-not-synced", Mutation::SnapshotNotSynced),
        ("index-not-synced", Mutation::IndexNotSynced),
        ("leader-restore", Mutation::LeaderRestore),
        ("ack-before-majority", Mutation::AckBeforeMajority),
        ("apply-not-clamped", Mutation::ApplyNotClamped),
        ("suspect-tail-votes", Mutation::SuspectTailVotes),
        ("skip-dedupe-in-snapshots", Mutation::SkipDedupeInSnapshots),
        ("apply-with-node-clock", Mutation::ApplyWithNodeClock),
        ("no-member-check", Mutation::NoMemberCheck),
        ("read-past-commit", Mutation::ReadPastCommit),
        ("hand-over-at-once", Mutation::HandOverAtOnce),
        ("any-member-commits", Mutation::AnyMemberCommits),
        ("lease-twice", Mutation::LeaseTwice),
        ("forget-acks", Mutation::ForgetAcks),
        ("ack-of-any-lease", Mutation::AckOfAnyLease),
        ("ignore-earlier-of-key", Mutation::IgnoreEarlierOfKey),
        ("take-forwarded-again", Mutation::TakeForwardedAgain),
        ("deliver-by-log-time", Mutation::DeliverByLogTime),
        ("deliver-cancelled", Mutation::DeliverCancelled),
        ("cancel-delivered", Mutation::CancelDelivered),
        ("decide-again", Mutation::DecideAgain),
        ("commit-unprepared", Mutation::CommitUnprepared),
        ("show-rolled-back", Mutation::ShowRolledBack),
        ("leave-offsets-behind", Mutation::LeaveOffsetsBehind),
        ("skip-refused", Mutation::SkipRefused),
        ("trim-beyond-end", Mutation::TrimBeyondEnd),
        ("purge-under-late", Mutation::PurgeUnderLate),
        ("open-without-boundary", Mutation::OpenWithoutBoundary),
        ("ignore-in-flight", Mutation::IgnoreInFlight),
        ("refuse-on-a-guess", Mutation::RefuseOnAGuess),
        ("believe-key-index", Mutation::BelieveKeyIndex),
        (
            "skip-members-in-snapshots",
            Mutation::SkipMembersInSnapshots,
        ),
        ("skip-leases-in-snapshots", Mutation::SkipLeasesInSnapshots),
        (
            "skip-transactions-in-snapshots",
            Mutation::SkipTransactionsInSnapshots,
        ),
        ("skip-held-in-snapshots", Mutation::SkipHeldInSnapshots),
    ];

    /// Whether this process is to have the fault.
    ///
    /// # Panics
    /// If the environment names a mutation that there is not: a run without a fault must not pass
    /// for one with it.
    pub fn on(mutation: Mutation) -> bool {
        static CHOSEN: OnceLock<Option<Mutation>> = OnceLock::new();
        *CHOSEN.get_or_init(read) == Some(mutation)
    }

    fn read() -> Option<Mutation> {
        let name = std::env::var(VARIABLE).ok().filter(|n| !n.is_empty())?;
        let found = NAMES.iter().find(|(known, _)| *known == name);
        let (_, mutation) = found.unwrap_or_else(|| panic!("{VARIABLE}={name}: no such mutation"));
        Some(*mutation)
    }
}
