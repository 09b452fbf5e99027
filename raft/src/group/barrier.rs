//! Proof of leadership, shared: however many readers wait, one round at a time is under way.

use std::future::Future;

use parking_lot::Mutex;
use tokio::sync::oneshot;

use crate::error::ReadError;

type Waiter = oneshot::Sender<Result<(), ReadError>>;

/// Joins concurrent calls into rounds. A caller is served by a round that began after its call,
/// never by one already under way: that one may have looked at the log too early.
#[derive(Debug, Default)]
pub(crate) struct Rounds {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    running: bool,
    waiting: Vec<Waiter>,
}

impl Rounds {
    /// Registers a waiter. With true, the caller must drive [`Rounds::run`] in a task.
    pub(crate) fn join(&self) -> (oneshot::Receiver<Result<(), ReadError>>, bool) {
        let (tx, rx) = oneshot::channel();
        let mut state = self.state.lock();
        state.waiting.push(tx);
        let first = !state.running;
        state.running = true;
        (rx, first)
    }

    /// Runs rounds until nobody waits.
    pub(crate) async fn run<F, Fut>(&self, round: F)
    where
        F: Fn() -> Fut,
        Fut: Future<Output = Result<(), ReadError>>,
    {
        loop {
            let waiters = {
                let mut state = self.state.lock();
                if state.waiting.is_empty() {
                    state.running = false;
                    return;
                }
                std::mem::take(&mut state.waiting)
            };
            let result = round().await;
            for waiter in waiters {
                waiter.send(result.clone()).ok();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use tokio::sync::Notify;

    #[tokio::test]
    async fn late_callers_get_a_later_round() {
        let rounds = Arc::new(Rounds::default());
        let count = Arc::new(AtomicUsize::new(0));
        let gate = Arc::new(Notify::new());
        let (first, drive) = rounds.join();
        assert!(drive);
        let task = tokio::spawn({
            let (rounds, count, gate) = (rounds.clone(), count.clone(), gate.clone());
            async move {
                rounds
                    .run(|| async {
                        count.fetch_add(1, Ordering::SeqCst);
                        gate.notified().await;
                        Ok(())
                    })
                    .await;
            }
        });
        while count.load(Ordering::SeqCst) == 0 {
            tokio::task::yield_now().await;
        }
        let (second, drive) = rounds.join();
        let (third, _) = rounds.join();
        assert!(!drive, "a round is under way");
        gate.notify_one();
        first.await.unwrap().unwrap();
        gate.notify_one();
        second.await.unwrap().unwrap();
        third.await.unwrap().unwrap();
        task.await.unwrap();
        assert_eq!(count.load(Ordering::SeqCst), 2);
    }
}
