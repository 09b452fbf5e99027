//! Fetching from many queues at once, within common bounds.
//!
//! A request may name a thousand queues, so what is read for it is bounded as a whole: a few queues
//! at a time, each for its part, and none any more once the answer is full. Who waits for messages
//! waits for a sign of them in each queue, and then reads one queue.

use std::time::Duration;

use futures_util::StreamExt;
use futures_util::future::join_all;
use futures_util::stream::FuturesUnordered;
use tokio::time::Instant;

use super::fetch::size_of_message;
use super::{
    Broker, BrokerError, BrokerResult, FetchAnswer, FetchRequest, MultiFetchRequest, QueueFetch,
    Selection, StartAt,
};

/// Queues that are read at the same time.
const AT_ONCE: usize = 16;
/// Read of all queues together, unless each has only [`LEAST_BYTES`] of it.
const READ_BYTES: usize = 16 << 20;
const LEAST_BYTES: usize = 64 << 10;
/// Filters may look at much to find little: after this long, no further queue is looked through.
const LOOK_FOR: Duration = Duration::from_secs(1);

/// What one queue is asked for. Its first message is read however large it is.
fn bytes_of_each(max_bytes: usize, queues: usize) -> usize {
    let part = READ_BYTES / queues.max(1);
    part.max(LEAST_BYTES).min(max_bytes)
}

impl Broker {
    /// Many queues at once: whatever they have now, or else the first that has something in time.
    pub async fn fetch_many(
        &self,
        request: MultiFetchRequest,
    ) -> BrokerResult<Vec<BrokerResult<FetchAnswer>>> {
        if request.queues.is_empty() {
            let text = "queues must name at least one queue".to_owned();
            return Err(BrokerError::InvalidRequest(text));
        }
        let deadline = Instant::now() + Duration::from_millis(request.wait_ms);
        let mut answers = self.look(&request).await;
        if request.wait_ms == 0 || answers.iter().any(has_some) {
            return Ok(answers);
        }
        let mut request = request;
        let left = || deadline.saturating_duration_since(Instant::now());
        let mut waiting = FuturesUnordered::new();
        for (n, answer) in answers.iter().enumerate() {
            // It goes on from here: the latest is not somewhere else by then.
            request.queues[n].go_on_after(answer);
            waiting.push(self.wait_for(n, sign_of(&request, n, left())));
        }
        while let Some((n, sign)) = waiting.next().await {
            let has_come = has_some(&sign);
            let answer = match sign {
                Ok(_) if has_come => self.fetch_one(&request, n).await,
                sign => sign,
            };
            let found = has_some(&answer);
            request.queues[n].go_on_after(&answer);
            answers[n] = answer;
            if found {
                break;
            }
            // All that came was filtered out or has expired.
            if has_come && !left().is_zero() {
                waiting.push(self.wait_for(n, sign_of(&request, n, left())));
            }
        }
        Ok(answers)
    }

    /// What the queues have now, as far as it fits; of the others, where they stand.
    async fn look(&self, request: &MultiFetchRequest) -> Vec<BrokerResult<FetchAnswer>> {
        let until = Instant::now() + LOOK_FOR;
        let mut share = Share::new(request);
        let mut answers = Vec::with_capacity(request.queues.len());
        let places: Vec<usize> = (0..request.queues.len()).collect();
        for places in places.chunks(AT_ONCE) {
            let is_over = share.is_used_up() || Instant::now() >= until;
            let each = places.iter().map(|n| async move {
                match is_over {
                    true => self.fetch(sign_of(request, *n, Duration::ZERO)).await,
                    false => self.fetch_one(request, *n).await,
                }
            });
            for answer in join_all(each).await {
                answers.push(answer.map(|answer| match is_over {
                    true => cut(answer, 0),
                    false => share.take(answer),
                }));
            }
        }
        answers
    }

    async fn fetch_one(&self, request: &MultiFetchRequest, n: usize) -> BrokerResult<FetchAnswer> {
        let max_bytes = bytes_of_each(request.max_bytes, request.queues.len());
        self.fetch(FetchRequest {
            max_messages: request.max_messages,
            max_bytes,
            selection: request.queues[n].selection.clone(),
            ..sign_of(request, n, Duration::ZERO)
        })
        .await
    }

    async fn wait_for(&self, n: usize, sign: FetchRequest) -> (usize, BrokerResult<FetchAnswer>) {
        (n, self.fetch(sign).await)
    }
}

fn has_some(answer: &BrokerResult<FetchAnswer>) -> bool {
    !matches!(answer, Ok(answer) if answer.messages.is_empty())
}

/// Asks for the first message of a queue, whatever it is.
fn sign_of(request: &MultiFetchRequest, n: usize, wait: Duration) -> FetchRequest {
    let QueueFetch {
        topic,
        queue,
        start,
        ..
    } = request.queues[n].clone();
    FetchRequest {
        topic,
        queue,
        start,
        max_messages: 1,
        max_bytes: 1,
        wait_ms: wait.as_millis() as u64,
        selection: Selection::default(),
        consistency: request.consistency,
    }
}

impl QueueFetch {
    fn go_on_after(&mut self, answer: &BrokerResult<FetchAnswer>) {
        if let Ok(answer) = answer {
            self.start = StartAt::Offset(answer.next_offset);
        }
    }
}

/// The first `keep` messages of an answer; it goes on at the next.
fn cut(mut answer: FetchAnswer, keep: usize) -> FetchAnswer {
    if let Some(dropped) = answer.messages.get(keep) {
        answer.next_offset = dropped.offset;
        answer.messages.truncate(keep);
    }
    answer
}

/// What the answer has of its bounds.
struct Share {
    messages: usize,
    bytes: usize,
    max_messages: usize,
    max_bytes: usize,
}

impl Share {
    fn new(request: &MultiFetchRequest) -> Self {
        Self {
            messages: 0,
            bytes: 0,
            max_messages: request.max_messages,
            max_bytes: request.max_bytes,
        }
    }

    fn is_used_up(&self) -> bool {
        self.messages > 0 && (self.messages >= self.max_messages || self.bytes >= self.max_bytes)
    }

    /// As many of the messages as fit; the first one always does.
    fn take(&mut self, answer: FetchAnswer) -> FetchAnswer {
        let mut keep = 0;
        for message in &answer.messages {
            let size = size_of_message(message);
            let fits = self.messages < self.max_messages && self.bytes + size <= self.max_bytes;
            if self.messages > 0 && !fits {
                break;
            }
            self.messages += 1;
            self.bytes += size;
            keep += 1;
        }
        cut(answer, keep)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn many_queues_share_what_is_read() {
        assert_eq!(bytes_of_each(1 << 20, 1), 1 << 20);
        assert_eq!(bytes_of_each(1 << 20, 16), 1 << 20);
        assert_eq!(bytes_of_each(16 << 20, 4), 4 << 20);
        assert_eq!(bytes_of_each(16 << 20, 1000), LEAST_BYTES);
        assert_eq!(bytes_of_each(100, 1000), 100);
    }
}
