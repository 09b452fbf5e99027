//! Asking many queues at once, of which some may have nobody to answer.

use std::time::Duration;

use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use quorate_storage::RaftGroupId;
use tokio::time::{Instant, timeout_at};

use super::route::NO_LEADER;
use super::{Broker, BrokerResult};

/// All answers, in order. Who doesn't answer within `patience`, nor within `grace` after the last of
/// those that did, has no leader.
pub(super) async fn all_soon<T>(
    asked: impl IntoIterator<Item = impl Future<Output = BrokerResult<T>>>,
    patience: Duration,
    grace: Duration,
) -> Vec<BrokerResult<T>> {
    let numbered = asked.into_iter().enumerate();
    let mut asked: FuturesUnordered<_> = numbered
        .map(|(place, answer)| async move { (place, answer.await) })
        .collect();
    let mut answers: Vec<_> = (0..asked.len()).map(|_| Err(NO_LEADER)).collect();
    let deadline = Instant::now() + patience;
    let mut until = deadline;
    while let Ok(Some((place, answer))) = timeout_at(until, asked.next()).await {
        if answer.is_ok() {
            until = deadline.min(Instant::now() + grace);
        }
        answers[place] = answer;
    }
    answers
}

impl Broker {
    /// False: a majority of the group's replicas is on nodes that are down, so that nothing can be
    /// proved.
    pub(super) fn may_be_led(&self, group: u64) -> bool {
        let catalog = self.catalog();
        let replicas = match catalog.placement(RaftGroupId(group)) {
            Some(placement) => placement.nodes().collect(),
            None => Vec::new(),
        };
        let down = replicas.iter().filter(|node| self.is_down(**node)).count();
        2 * down < replicas.len().max(1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn the_silent_keep_nobody_waiting() {
        let after = |ms: Option<u64>| async move {
            match ms {
                Some(ms) => tokio::time::sleep(Duration::from_millis(ms)).await,
                None => std::future::pending().await,
            }
            Ok(ms)
        };
        let (patience, grace) = (Duration::from_secs(5), Duration::from_millis(200));
        let begun = Instant::now();
        let answers = all_soon(
            [None, Some(10), Some(190), Some(350)].map(after),
            patience,
            grace,
        )
        .await;
        let answered: Vec<bool> = answers.iter().map(Result::is_ok).collect();
        assert_eq!(
            answered,
            [false, true, true, true],
            "each one came soon after another"
        );
        assert_eq!(begun.elapsed(), Duration::from_millis(550));

        let begun = Instant::now();
        let answers = all_soon([Some(1_000), None].map(after), patience, grace).await;
        assert!(answers[0].is_ok(), "the only one is waited for");
        assert_eq!(begun.elapsed(), Duration::from_millis(1_200));
        let begun = Instant::now();
        all_soon([None, None].map(after), patience, grace).await;
        assert_eq!(begun.elapsed(), patience);
    }
}
