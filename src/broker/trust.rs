//! How old this node's copy of the catalog may be when names are looked up in it.
//!
//! A node that was stopped for a while, or cut off, does not know which topics were deleted and made
//! anew meanwhile, and its replicas of the old ones are still there. So the copy is trusted only for
//! a moment after a proof that it was the newest. Requests ask for the next proof before the last
//! one has run out, beside their work: only the first one after a pause waits for it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::watch;
use tokio::time::{Instant, timeout};

use super::{Broker, BrokerResult};
use crate::catalog::CATALOG_GROUP;

/// So long a proof is trusted: longer than an election of the catalog takes as a rule, since
/// nobody need wait for it.
const TRUSTED: Duration = Duration::from_millis(1500);
/// So old a proof is renewed.
const RENEWED: Duration = Duration::from_millis(500);
/// So long a request waits. Without a proof it goes on with what is known here: whatever it wants
/// of a queue or a coordinator needs a majority of its own.
const PATIENCE: Duration = Duration::from_secs(1);
/// The same while the last question was in vain.
const LITTLE_PATIENCE: Duration = Duration::from_millis(20);

#[derive(Debug)]
pub(super) struct CatalogTrust {
    /// When the last question began that was answered.
    proved: watch::Sender<Option<Instant>>,
    /// When the last one began.
    asked: Mutex<Option<Instant>>,
    /// The last question found nobody to answer it.
    in_vain: AtomicBool,
}

impl Default for CatalogTrust {
    fn default() -> Self {
        Self {
            proved: watch::Sender::new(None),
            asked: Mutex::default(),
            in_vain: AtomicBool::new(false),
        }
    }
}

impl CatalogTrust {
    fn is_proved_within(&self, age: Duration, now: Instant) -> bool {
        is_within(*self.proved.borrow(), age, now)
    }

    fn note_proof(&self, began: Instant) {
        self.in_vain.store(false, Ordering::Relaxed);
        self.proved.send_if_modified(|proved| {
            let newer = proved.is_none_or(|at| at < began);
            if newer {
                *proved = Some(began);
            }
            newer
        });
    }

    /// Whether the caller is to ask: one does at a time.
    fn asks(&self, now: Instant) -> bool {
        let mut asked = self.asked.lock();
        let asks = !is_within(*asked, RENEWED, now);
        if asks {
            *asked = Some(now);
        }
        asks
    }
}

fn is_within(at: Option<Instant>, age: Duration, now: Instant) -> bool {
    at.is_some_and(|at| now.duration_since(at) < age)
}

impl Broker {
    /// When this returns, the local copy of the catalog is not older than [`TRUSTED`], if that can
    /// be known.
    pub(super) async fn trust_catalog(&self) {
        let now = Instant::now();
        if self.trust.is_proved_within(RENEWED, now) {
            return;
        }
        if self.trust.asks(now)
            && let Some(catalog) = self.local_group(CATALOG_GROUP.0)
        {
            let trust: Arc<CatalogTrust> = self.trust.clone();
            tokio::spawn(async move {
                match catalog.read_barrier(PATIENCE).await {
                    Ok(()) => trust.note_proof(now),
                    Err(error) => {
                        trust.in_vain.store(true, Ordering::Relaxed);
                        tracing::debug!(%error, "the catalog may be an old one");
                    }
                }
            });
        }
        if self.trust.is_proved_within(TRUSTED, now) {
            return;
        }
        let patience = match self.trust.in_vain.load(Ordering::Relaxed) {
            true => LITTLE_PATIENCE,
            false => PATIENCE,
        };
        let mut proved = self.trust.proved.subscribe();
        let proof = proved.wait_for(|at| is_within(*at, TRUSTED, now));
        timeout(patience, proof).await.ok();
    }

    /// For what would go wrong for ever with an old copy: the same, or an error.
    pub(super) async fn trusted_catalog(&self) -> BrokerResult<()> {
        self.trust_catalog().await;
        let now = Instant::now();
        if !self.trust.is_proved_within(TRUSTED, now) {
            self.catalog_barrier().await?;
            self.trust.note_proof(now);
        }
        Ok(())
    }
}
