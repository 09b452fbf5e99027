//! A node on a simulated machine, and the way in for clients.

use std::future::Future;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::BoxFuture;
use parking_lot::Mutex;
use quorate::broker::queue::QueueLimits;
use quorate::broker::{Broker, BrokerConfig};
use quorate::metrics::Metrics;
use quorate::node::{Node, NodeConfig};
use quorate_raft::{HostConfig, NodeId, RaftHost};
use quorate_storage::commit_log::CommitLogConfig;
use tokio::sync::{Notify, mpsc, oneshot};

use crate::machine::Machine;
use crate::wires::{address, host_name};

const COORDINATORS: u32 = 2;
const HAND_OVER: Duration = Duration::from_secs(2);
/// For the log's driver to write what is left.
const DRAIN: Duration = Duration::from_millis(200);

type Job = Box<dyn FnOnce(Handles) -> BoxFuture<'static, ()> + Send>;

/// A running node as the simulation sees it.
#[derive(Debug, Clone)]
pub struct Handles {
    pub broker: Arc<Broker>,
    pub host: Arc<RaftHost>,
}

#[derive(Debug)]
pub enum Life {
    Down,
    Starting,
    Up(Handles),
    /// It has stopped by itself, or as it was told; the process is to be ended.
    Ended {
        reason: String,
        asked: bool,
    },
}

/// One node of the cluster over all its lives.
#[derive(Debug)]
pub struct NodeSlot {
    pub machine: Arc<Machine>,
    life: Mutex<Life>,
    front: Mutex<Option<mpsc::UnboundedSender<Job>>>,
    stop: Notify,
    addresses: Vec<(NodeId, String)>,
    shape: Shape,
}

/// What differs from seed to seed in how nodes are configured.
#[derive(Debug, Clone, Copy)]
pub struct Shape {
    pub segment_bytes: u64,
    pub checkpoint_every: u64,
    pub tail_cache_bytes: usize,
}

/// The node was not there, or went away before it answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NoAnswer {
    /// It never got the request.
    NotSent,
    Lost,
}

impl NodeSlot {
    pub fn new(machine: Arc<Machine>, nodes: u64, shape: Shape) -> Self {
        Self {
            machine,
            life: Mutex::new(Life::Down),
            front: Mutex::default(),
            stop: Notify::new(),
            addresses: (1..=nodes).map(|id| (id, address(id))).collect(),
            shape,
        }
    }

    pub fn id(&self) -> NodeId {
        self.machine.node
    }

    pub fn handles(&self) -> Option<Handles> {
        match &*self.life.lock() {
            Life::Up(handles) => Some(handles.clone()),
            _ => None,
        }
    }

    /// Why it has ended, and whether it was asked to.
    pub fn ended(&self) -> Option<(String, bool)> {
        match &*self.life.lock() {
            Life::Ended { reason, asked } => Some((reason.clone(), *asked)),
            _ => None,
        }
    }

    pub fn is_down(&self) -> bool {
        matches!(*self.life.lock(), Life::Down)
    }

    pub fn went_down(&self) {
        *self.front.lock() = None;
        // Dropped behind the lock: it may be the last handle.
        let _before = std::mem::replace(&mut *self.life.lock(), Life::Down);
    }

    /// Asks the node to stop as an operator would.
    pub fn ask_to_stop(&self) {
        self.stop.notify_one();
    }

    /// Has the node do something, on its own runtime, and waits for the answer.
    pub async fn ask<T, F>(
        &self,
        work: impl FnOnce(Handles) -> F + Send + 'static,
    ) -> Result<T, NoAnswer>
    where
        T: Send + 'static,
        F: Future<Output = T> + Send + 'static,
    {
        let (reply, answer) = oneshot::channel();
        let job: Job = Box::new(move |handles| {
            Box::pin(async move {
                reply.send(work(handles).await).ok();
            })
        });
        let front = self.front.lock().clone();
        let sent = front.is_some_and(|front| front.send(job).is_ok());
        match sent {
            true => answer.await.map_err(|_| NoAnswer::Lost),
            false => Err(NoAnswer::NotSent),
        }
    }

    /// The node's process. It never returns: the simulation ends it.
    pub async fn run(self: Arc<Self>) -> turmoil::Result {
        *self.life.lock() = Life::Starting;
        let (reason, asked) = match self.live().await {
            Ok(()) => ("asked to stop".to_owned(), true),
            Err(error) => (format!("{error:#}"), false),
        };
        *self.front.lock() = None;
        *self.life.lock() = Life::Ended { reason, asked };
        std::future::pending().await
    }

    async fn live(&self) -> anyhow::Result<()> {
        let environment = self.machine.environment().await?;
        let metrics = Arc::new(Metrics::new());
        let mut node = Node::start_in(environment, self.config(), metrics).await?;
        let handles = Handles {
            broker: node.broker().clone(),
            host: node.host().clone(),
        };
        let (front, mut jobs) = mpsc::unbounded_channel::<Job>();
        *self.front.lock() = Some(front);
        *self.life.lock() = Life::Up(handles.clone());
        loop {
            tokio::select! {
                biased;
                reason = node.fatal() => anyhow::bail!(reason),
                () = self.stop.notified() => break,
                Some(job) = jobs.recv() => drop(tokio::spawn(job(handles.clone()))),
            }
        }
        *self.front.lock() = None;
        node.shutdown(HAND_OVER).await?;
        tokio::time::sleep(DRAIN).await;
        Ok(())
    }

    fn config(&self) -> NodeConfig {
        let node_id = self.id();
        let mut host = HostConfig::new("sim", node_id, self.addresses.clone());
        host.rebalance_after = Duration::from_secs(3);
        NodeConfig {
            cluster_name: "sim".to_owned(),
            node_id,
            nodes: self.addresses.clone(),
            url: format!("http://{}", host_name(node_id)),
            data_dir: PathBuf::from("/data"),
            coordinators: COORDINATORS,
            log: CommitLogConfig {
                segment_bytes: self.shape.segment_bytes,
                tail_cache_bytes: self.shape.tail_cache_bytes,
                ..CommitLogConfig::default()
            },
            host,
            queue_limits: QueueLimits::default(),
            checkpoint_every: self.shape.checkpoint_every,
            broker: BrokerConfig {
                max_batch_bytes: 4 << 10,
                max_entry_bytes: 8 << 10,
                pipeline_bytes: 2 << 10,
                transaction_prepare: Duration::from_secs(6),
                ..BrokerConfig::default()
            },
        }
    }
}
