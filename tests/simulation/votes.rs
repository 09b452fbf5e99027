//! A vote that was on disk is found again, or a later one.

use std::collections::BTreeMap;

use parking_lot::Mutex;
use quorate_storage::RaftGroupId;
use quorate_storage::commit_log::CommitLog;

/// Term of the newest vote by group.
type Terms = BTreeMap<RaftGroupId, u64>;

/// The newest votes of one machine that are known to be on its disk.
#[derive(Debug, Default)]
pub struct DurableVotes {
    durable: Mutex<Terms>,
    broken: Mutex<Vec<String>>,
}

fn votes_of(log: &CommitLog) -> Terms {
    let groups = log.groups().into_iter();
    groups
        .filter_map(|id| Some((id, log.group(id).state().vote?.term)))
        .collect()
}

impl DurableVotes {
    /// All that the log has taken is durable.
    pub fn are_durable(&self, log: &CommitLog) {
        *self.durable.lock() = votes_of(log);
    }

    /// A removed group's vote may be gone or not.
    pub fn forget_removed(&self, log: &CommitLog) {
        let known = log.groups();
        self.durable.lock().retain(|group, _| known.contains(group));
    }

    /// To be called with a log that was just recovered.
    pub fn check_recovered(&self, log: &CommitLog) {
        let found = votes_of(log);
        for (group, term) in self.durable.lock().iter() {
            if found.get(group).is_none_or(|found| found < term) {
                let found = found.get(group);
                let text = format!("{group}: a durable vote of term {term}, recovered {found:?}");
                self.broken.lock().push(text);
            }
        }
    }

    /// What was found broken since the last call.
    pub fn take_broken(&self) -> Vec<String> {
        std::mem::take(&mut self.broken.lock())
    }
}
