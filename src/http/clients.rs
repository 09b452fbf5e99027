//! How fast one client address may produce through this node.
//!
//! Clients have no credentials to be told apart by, so their address has to do: those behind one
//! proxy count as one, and one that spreads over several nodes has the quota of each.

use std::net::{IpAddr, SocketAddr};

use axum::extract::FromRequestParts;
use axum::http::request::Parts;
use parking_lot::Mutex;
use tokio::time::Instant;

use crate::broker::quota::{BucketTable, over_quota};
use crate::broker::{BrokerError, NewMessage, Quota};
use crate::config::LimitsConfig;

/// Addresses known at once; those beyond share one quota.
const MAX_ADDRESSES: usize = 16 << 10;

/// Where a request comes from, as the listener saw it; absent where there was none.
#[derive(Debug, Clone, Copy, Default)]
pub struct ClientAddress(pub Option<IpAddr>);

impl From<SocketAddr> for ClientAddress {
    fn from(address: SocketAddr) -> Self {
        Self(Some(address.ip().to_canonical()))
    }
}

impl<S: Sync> FromRequestParts<S> for ClientAddress {
    type Rejection = std::convert::Infallible;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Self::Rejection> {
        Ok(parts.extensions.get::<Self>().copied().unwrap_or_default())
    }
}

#[derive(Debug)]
pub struct ClientQuotas {
    quota: Quota,
    table: Mutex<BucketTable<IpAddr>>,
}

impl ClientQuotas {
    pub fn new(limits: &LimitsConfig) -> Self {
        let limit = |value: u64| (value > 0).then_some(value);
        Self {
            quota: Quota {
                messages_per_s: limit(limits.client_messages_per_s),
                bytes_per_s: limit(limits.client_bytes_per_s),
            },
            table: Mutex::new(BucketTable::new(MAX_ADDRESSES)),
        }
    }

    /// Takes for what a client is about to produce.
    pub fn take(
        &self,
        client: ClientAddress,
        messages: u64,
        bytes: u64,
    ) -> Result<(), BrokerError> {
        let Some(address) = client.0.filter(|_| self.quota.is_set()) else {
            return Ok(());
        };
        let now = Instant::now();
        let mut table = self.table.lock();
        let buckets = table.of(address, now);
        let taken = buckets.take(self.quota, 1.0, messages, bytes, now);
        taken.map_err(|wait| over_quota(&format!("client {address}"), wait))
    }

    /// The same for messages that are not batches yet.
    pub fn take_messages(
        &self,
        client: ClientAddress,
        messages: &[NewMessage],
    ) -> Result<(), BrokerError> {
        if !self.quota.is_set() {
            return Ok(());
        }
        let bytes = messages.iter().map(NewMessage::size_bytes).sum();
        self.take(client, messages.len() as u64, bytes)
    }
}
