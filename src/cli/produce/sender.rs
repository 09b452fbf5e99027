//! Getting one batch stored: what may be repeated, when, and for how long.
//!
//! Plain: repeated only while every failure says that nothing was stored. Numbered: every request
//! carries the producer's sequence, so any retryable failure is repeated as it was; all messages
//! of a request go to one queue, and each queue counts for itself.

use std::time::Duration;

use reqwest::Method;
use serde_json::json;
use tokio::time::Instant;

use super::super::client::{Client, Repeat, Request};
use super::super::error::CliError;
use super::super::wire::{
    NewMessage, ProduceAnswer, ProduceBody, ProduceResult, ProducerIdentity, ProducerMark, Stored,
};

/// One try of a request that can be repeated; a silent node must not eat the whole time.
const TRY_TIMEOUT: Duration = Duration::from_secs(5);
const BACKOFF_MIN: Duration = Duration::from_millis(20);
const BACKOFF_MAX: Duration = Duration::from_millis(500);

#[derive(Debug)]
pub struct SenderOptions {
    pub topic: String,
    pub queue: Option<u32>,
    /// All messages have one key: the server finds their queue.
    pub keyed: bool,
    pub timeout: Duration,
}

#[derive(Debug)]
pub struct Sender<'a> {
    client: &'a Client,
    options: SenderOptions,
    numbering: Option<Numbering>,
    durability: String,
}

/// What became of a batch: stored messages in their places, and why the others are not.
#[derive(Debug)]
pub struct Sent {
    pub stored: Vec<Option<Stored>>,
    pub error: Option<CliError>,
}

impl<'a> Sender<'a> {
    pub fn plain(client: &'a Client, options: SenderOptions) -> Self {
        Self {
            client,
            options,
            numbering: None,
            durability: String::new(),
        }
    }

    pub async fn numbered(
        client: &'a Client,
        options: SenderOptions,
        name: Option<&str>,
    ) -> Result<Self, CliError> {
        let body = match name {
            Some(name) => json!({ "name": name }),
            None => json!({}),
        };
        let spreads = options.queue.is_none() && !options.keyed;
        let queues = match spreads {
            true => client.topic(&options.topic).await?.queues.len(),
            false => 1,
        };
        // Registering twice only raises the epoch twice.
        let request = Request::new(Method::POST, &["v1", "producers"], Repeat::Always);
        let identity = client.read(request.json(&body)?).await?;
        let mut sender = Self::plain(client, options);
        sender.numbering = Some(Numbering::new(identity, queues, spreads));
        Ok(sender)
    }

    /// What the server last said an acknowledgement is worth.
    pub fn durability(&self) -> &str {
        &self.durability
    }

    /// Sends until all is stored, or repeating is unsafe, useless, or out of time.
    pub async fn send(&mut self, messages: &mut [NewMessage]) -> Sent {
        let place = self
            .numbering
            .as_mut()
            .map(|numbering| numbering.place(messages));
        let mut sent = Sent {
            stored: vec![None; messages.len()],
            error: None,
        };
        let deadline = Instant::now() + self.options.timeout;
        let mut backoff = BACKOFF_MIN;
        loop {
            let missing: Vec<usize> = (0..messages.len())
                .filter(|index| sent.stored[*index].is_none())
                .collect();
            let batch: Vec<NewMessage> = missing
                .iter()
                .map(|index| messages[*index].clone())
                .collect();
            let answer = self.send_once(&batch, place, deadline).await;
            sent.error = match answer {
                Ok(answer) => self.take(answer, &missing, &mut sent.stored),
                Err(error) => Some(error),
            };
            match &sent.error {
                None => {
                    if let (Some(numbering), Some(place)) = (&mut self.numbering, place) {
                        numbering.stored(place, messages.len());
                    }
                    return sent;
                }
                Some(error) if !self.repeats(error) => return sent,
                Some(_) => {}
            }
            if Instant::now() + backoff >= deadline {
                return sent;
            }
            self.client.move_on();
            tokio::time::sleep(backoff).await;
            backoff = (backoff * 2).min(BACKOFF_MAX);
        }
    }

    fn repeats(&self, error: &CliError) -> bool {
        error.retryable() && (self.numbering.is_some() || !error.outcome_unknown())
    }

    async fn send_once(
        &self,
        messages: &[NewMessage],
        place: Option<Place>,
        deadline: Instant,
    ) -> Result<ProduceAnswer, CliError> {
        let producer = match (&self.numbering, place) {
            (Some(numbering), Some(place)) => Some(numbering.mark(place)),
            _ => None,
        };
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout = if producer.is_some() {
            left.min(TRY_TIMEOUT)
        } else {
            left
        };
        let path = ["v1", "topics", &self.options.topic, "messages"];
        let request = Request::new(Method::POST, &path, Repeat::IfUnsent)
            .json(&ProduceBody { messages, producer })?
            .timeout(timeout.max(Duration::from_millis(1)));
        self.client.read(request).await
    }

    /// Puts what was stored into its places; returns the failure that matters most, if any.
    fn take(
        &mut self,
        answer: ProduceAnswer,
        missing: &[usize],
        stored: &mut [Option<Stored>],
    ) -> Option<CliError> {
        if answer.results.len() != missing.len() {
            return Some(CliError::NoAnswer {
                url: "the node".into(),
                reason: format!("{} results for {}", answer.results.len(), missing.len()),
            });
        }
        self.durability = answer.durability;
        let mut worst: Option<CliError> = None;
        for (index, result) in missing.iter().zip(answer.results) {
            match result {
                ProduceResult::Stored(place) => stored[*index] = Some(place),
                ProduceResult::Dropped { queue, .. } => {
                    let text = format!("queue {queue} is full and dropped the message");
                    worst.get_or_insert(CliError::Failed(text));
                }
                ProduceResult::Failed { error } => {
                    let error = CliError::Problem(Box::new(error));
                    if worst.as_ref().is_none_or(|worst| self.repeats(worst)) {
                        worst = Some(error);
                    }
                }
            }
        }
        worst
    }
}

/// Where a numbered request goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Place {
    /// Index into the sequences; the queue too where this client chooses it.
    slot: usize,
}

/// The producer's identity and, per queue, the sequence of its next message.
#[derive(Debug)]
struct Numbering {
    identity: ProducerIdentity,
    next_sequences: Vec<u64>,
    spreads: bool,
    next_slot: usize,
}

impl Numbering {
    fn new(identity: ProducerIdentity, queues: usize, spreads: bool) -> Self {
        Self {
            identity,
            next_sequences: vec![0; queues.max(1)],
            spreads,
            next_slot: 0,
        }
    }

    /// Chooses one queue for the whole request, in turns unless the queue or the key decides.
    fn place(&mut self, messages: &mut [NewMessage]) -> Place {
        let slot = self.next_slot;
        self.next_slot = (slot + 1) % self.next_sequences.len();
        if self.spreads {
            for message in messages {
                message.queue = u32::try_from(slot).ok();
            }
        }
        Place { slot }
    }

    fn mark(&self, place: Place) -> ProducerMark<'_> {
        ProducerMark {
            id: &self.identity.id,
            epoch: self.identity.epoch,
            sequence: self.next_sequences[place.slot],
        }
    }

    fn stored(&mut self, place: Place, messages: usize) {
        self.next_sequences[place.slot] += messages as u64;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbering(queues: usize, spreads: bool) -> Numbering {
        let identity = ProducerIdentity {
            id: "p".into(),
            epoch: 2,
        };
        Numbering::new(identity, queues, spreads)
    }

    #[test]
    fn each_queue_counts_for_itself_and_only_what_was_stored() {
        let mut numbering = numbering(2, true);
        let mut batch = vec![NewMessage::default(); 3];
        let first = numbering.place(&mut batch);
        assert_eq!(batch[2].queue, Some(0));
        numbering.stored(first, 3);
        let second = numbering.place(&mut batch);
        assert_eq!(
            (batch[0].queue, numbering.mark(second).sequence),
            (Some(1), 0)
        );
        let third = numbering.place(&mut batch);
        assert_eq!(
            (batch[0].queue, numbering.mark(third).sequence),
            (Some(0), 3)
        );
    }

    #[test]
    fn a_chosen_queue_is_left_alone() {
        let mut numbering = numbering(1, false);
        let mut batch = vec![NewMessage {
            queue: Some(7),
            ..NewMessage::default()
        }];
        numbering.place(&mut batch);
        assert_eq!(batch[0].queue, Some(7));
    }

    use super::super::super::testing::{Act, ScriptedNode};

    const STORED: &str =
        r#"{"results":[{"queue":0,"offset":5,"message_id":"m"}],"durability":"majority_fsync"}"#;
    const UNKNOWN: &str =
        r#"{"title":"timeout","code":"timeout","retryable":true,"outcome":"unknown"}"#;
    const NO_LEADER: &str =
        r#"{"title":"no leader","code":"no_leader","retryable":true,"outcome":"not_committed"}"#;

    fn options() -> SenderOptions {
        SenderOptions {
            topic: "t".into(),
            queue: Some(0),
            keyed: false,
            timeout: Duration::from_secs(30),
        }
    }

    #[tokio::test]
    async fn a_plain_request_is_repeated_only_when_nothing_was_stored() {
        let acts = vec![Act::Answer(503, NO_LEADER), Act::Answer(200, STORED)];
        let node = ScriptedNode::start(acts).await;
        let client = Client::new(std::slice::from_ref(&node.url)).unwrap();
        let sent = Sender::plain(&client, options())
            .send(&mut [NewMessage::default()])
            .await;
        assert!(sent.error.is_none(), "{sent:?}");
        assert_eq!(sent.stored[0].as_ref().unwrap().offset, Some(5));

        let acts = vec![Act::Answer(504, UNKNOWN), Act::Answer(200, STORED)];
        let node = ScriptedNode::start(acts).await;
        let client = Client::new(std::slice::from_ref(&node.url)).unwrap();
        let sent = Sender::plain(&client, options())
            .send(&mut [NewMessage::default()])
            .await;
        assert!(sent.error.unwrap().outcome_unknown());
        assert_eq!(node.requests().len(), 1);
    }

    #[tokio::test]
    async fn a_numbered_request_is_repeated_as_it_was() {
        let acts = vec![
            Act::Answer(200, r#"{"id":"p","epoch":1}"#),
            Act::Hang,
            Act::Answer(504, UNKNOWN),
            Act::Answer(200, STORED),
            Act::Answer(200, STORED),
        ];
        let node = ScriptedNode::start(acts).await;
        let client = Client::new(std::slice::from_ref(&node.url)).unwrap();
        let mut sender = Sender::numbered(&client, options(), None).await.unwrap();
        for _ in 0..2 {
            let sent = sender.send(&mut [NewMessage::default()]).await;
            assert!(sent.error.is_none(), "{sent:?}");
        }
        let sequences: Vec<bool> = node.requests()[1..]
            .iter()
            .map(|request| request.contains(r#""sequence":0"#))
            .collect();
        assert_eq!(sequences, [true, true, true, false]);
        assert!(node.requests()[4].contains(r#""sequence":1"#));
    }

    #[tokio::test]
    async fn only_what_failed_is_sent_again() {
        let partly = r#"{"results":[{"queue":0,"offset":5,"message_id":"m"},{"error":
            {"title":"no leader","code":"no_leader","retryable":true,"outcome":"not_committed"}}]}"#;
        let acts = vec![Act::Answer(207, partly), Act::Answer(200, STORED)];
        let node = ScriptedNode::start(acts).await;
        let client = Client::new(std::slice::from_ref(&node.url)).unwrap();
        let mut batch = ["first", "second"].map(|value| NewMessage {
            value: Some(value.into()),
            ..NewMessage::default()
        });
        let sent = Sender::plain(&client, options()).send(&mut batch).await;
        assert!(
            sent.error.is_none() && sent.stored.iter().all(Option::is_some),
            "{sent:?}"
        );
        let again = &node.requests()[1];
        assert!(
            again.contains("second") && !again.contains("first"),
            "{again}"
        );
    }
}
