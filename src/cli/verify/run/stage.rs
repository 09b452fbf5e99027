//! What all parts of a run share: the nodes, the clock and the history.

use std::sync::Arc;

use parking_lot::Mutex;
use tokio::time::Instant;
use xxhash_rust::xxh3::xxh3_64;

use super::super::super::client::Client;
use super::super::super::error::CliError;
use super::super::super::wire::Message;
use super::history::{History, Id, Lane, Stored, time};
use super::plan::Plan;
use super::watch::Shown;

/// A node as its clients know it.
#[derive(Debug)]
pub struct NodeClient {
    pub id: u64,
    /// Asks this node and no other.
    pub client: Client,
}

#[derive(Debug)]
pub struct Stage {
    pub nodes: Vec<NodeClient>,
    pub topics: Vec<String>,
    queues: u32,
    pub history: Mutex<History>,
    clock: Instant,
}

impl Stage {
    /// `nodes` are ids and URLs.
    pub fn new(
        plan: &Plan,
        client: &Client,
        nodes: &[(u64, String)],
    ) -> Result<Arc<Self>, CliError> {
        let topics: Vec<String> = (1..=plan.topics)
            .map(|number| format!("verify-{}-{number}", plan.run))
            .collect();
        let lanes = topics
            .iter()
            .flat_map(|topic| (0..plan.queues).map(|queue| Lane::new(topic, queue)));
        let history = Mutex::new(History::new(lanes.collect()));
        let nodes = nodes.iter().map(|(id, url)| {
            let client = client.only(url)?;
            Ok(NodeClient { id: *id, client })
        });
        Ok(Arc::new(Self {
            nodes: nodes.collect::<Result<_, CliError>>()?,
            history,
            topics,
            queues: plan.queues,
            clock: Instant::now(),
        }))
    }

    pub fn now_us(&self) -> u64 {
        // Half a million years fit.
        self.clock.elapsed().as_micros() as u64
    }

    pub fn time(&self) -> String {
        time(self.now_us())
    }

    pub fn lanes(&self) -> u16 {
        // The plan's bounds keep it below 2^8.
        (self.topics.len() as u32 * self.queues) as u16
    }

    pub fn place(&self, lane: u16) -> (String, u32) {
        let (topic, queue) = (u32::from(lane) / self.queues, u32::from(lane) % self.queues);
        (self.topics[topic as usize].clone(), queue)
    }

    pub fn lane_of(&self, topic: usize, queue: u32) -> u16 {
        (topic as u32 * self.queues + queue) as u16
    }

    pub fn queues(&self) -> u32 {
        self.queues
    }

    /// What a message in an answer is to the judges.
    pub fn shown(run: &str, message: &Message) -> Shown {
        let value = message.value.as_deref().unwrap_or_default();
        let mark = mark(&message.message_id);
        let stored = match Id::of(run, value) {
            Some(id) => Ok(Stored { id, mark }),
            None => Err(value.to_owned()),
        };
        Shown {
            offset: message.offset,
            stored,
        }
    }
}

pub fn mark(message_id: &str) -> u64 {
    xxh3_64(message_id.as_bytes())
}
