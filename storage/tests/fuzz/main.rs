//! Bytes from a disk or a client that are not what they should be. See [`mutate`] for how they are
//! made and how long that goes on, and `scripts/fuzz.sh` for the long form.

mod batch;
mod bounded;
mod commit_log;
mod frames;
mod mutate;
mod queue_index;
mod seeds;
mod snapshots;
