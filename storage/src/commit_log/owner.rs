//! The lifetime of a log: its threads end when the last handle goes.

use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::Instant;

use parking_lot::Mutex;

use super::shared::Shared;
use super::writer::{Step, WriterCore};
use crate::StorageError;

/// Held by every handle.
#[derive(Debug)]
pub(super) struct Owner {
    pub shared: Arc<Shared>,
    threads: Mutex<Threads>,
}

#[derive(Debug, Default)]
struct Threads {
    writer: Option<JoinHandle<()>>,
    background: Option<JoinHandle<()>>,
}

impl Owner {
    /// Without threads: somebody drives the writer and the background by hand.
    pub fn driven(shared: Arc<Shared>) -> Self {
        Self {
            shared,
            threads: Mutex::default(),
        }
    }

    pub fn spawn(shared: Arc<Shared>, core: WriterCore) -> Result<Self, StorageError> {
        let dir = shared.dir.clone();
        let io = |e| StorageError::io("start the threads of", &dir, e);
        let for_writer = shared.clone();
        let writer = thread::Builder::new()
            .name("commit-log".to_owned())
            .spawn(move || run(core, &for_writer))
            .map_err(io)?;
        let for_background = shared.clone();
        let background = thread::Builder::new()
            .name("commit-log-files".to_owned())
            .spawn(move || for_background.background.run(&for_background))
            .map_err(io)?;
        Ok(Self {
            shared,
            threads: Mutex::new(Threads {
                writer: Some(writer),
                background: Some(background),
            }),
        })
    }

    /// Writes what is queued, the closing mark and the missing sidecars, and ends the threads.
    pub fn close(&self) -> Result<(), StorageError> {
        self.shared.queue.close();
        let mut threads = self.threads.lock();
        join(threads.writer.take());
        self.shared.background.close();
        join(threads.background.take());
        self.shared.check_readable()
    }
}

impl Drop for Owner {
    fn drop(&mut self) {
        if let Err(error) = self.close() {
            tracing::warn!(%error, "the commit log did not close well");
        }
    }
}

/// Waits for a thread, unless it is the one that waits: the last handle may die in a callback.
fn join(thread: Option<JoinHandle<()>>) {
    if let Some(thread) = thread
        && thread.thread().id() != thread::current().id()
        && thread.join().is_err()
    {
        tracing::error!("a thread of the commit log panicked");
    }
}

fn run(mut core: WriterCore, shared: &Shared) {
    loop {
        match core.step(Instant::now()) {
            Step::Worked => {}
            Step::Idle { wake_at } => shared.queue.wait(wake_at),
            Step::Stopped => return,
        }
    }
}
