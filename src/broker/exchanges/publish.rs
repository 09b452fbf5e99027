//! Publishing: find the routes, store the message with them once, say where it goes.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use bytes::Bytes;
use futures_util::future::join_all;
use quorate_storage::batch::{BatchBuilder, BatchView, MessageRecord};

use super::super::encode::{Part, encode, producer_stamp, record_of};
use super::super::message_id::MAX_MESSAGE_ID_LEN;
use super::super::partition::queue_of_key;
use super::super::produce::{check_key, explain};
use super::super::queue::{BatchOutcome, Place};
use super::super::route::UNKNOWN;
use super::routes::{
    self, EXCHANGE_HEADER, MESSAGE_ID_HEADER, ROUTES_HEADER, ROUTING_KEY_HEADER, Route,
};
use crate::broker::{
    Broker, BrokerError, BrokerResult, Durability, NewMessage, OnFull, Outcome, ProduceRequest,
    ProducerMark, StartAt,
};
use crate::catalog::{CatalogState, Topic, TopicId};
use crate::exchange::{Exchange, check_routing_key};
use crate::peer::{Proof, ReadRequest};

/// A publish request: one exchange, any number of messages with their routing keys.
#[derive(Debug, Clone)]
pub struct PublishRequest {
    pub exchange: String,
    pub messages: Vec<(NewMessage, String)>,
    pub producer: Option<ProducerMark>,
    pub idempotency_key: Option<String>,
}

/// A stored message, and the topics that it is brought to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Published {
    pub message_id: String,
    pub routed: Vec<String>,
}

/// One result per message, in request order.
#[derive(Debug)]
pub struct PublishAnswer {
    pub results: Vec<BrokerResult<Published>>,
    pub durability: Durability,
}

impl Broker {
    /// Stores messages with their routes.
    pub async fn publish_messages(&self, request: PublishRequest) -> BrokerResult<PublishAnswer> {
        check_key(request.idempotency_key.as_deref())?;
        if request.messages.is_empty() {
            let text = "messages must have at least one message".to_owned();
            return Err(BrokerError::InvalidRequest(text));
        }
        for (_, routing_key) in &request.messages {
            check_routing_key(routing_key).map_err(BrokerError::InvalidRequest)?;
        }
        let (catalog, exchange, targets) = self.targets(&request).await?;
        let store = catalog.topics.get(&exchange.store);
        let store = store
            .cloned()
            .ok_or_else(|| super::not_found(&exchange.name))?;
        let marked = request.producer.is_some() || request.idempotency_key.is_some();
        let mut plan = Plan::new(request.messages.len());
        let turn = self.round_robin.fetch_add(
            request.messages.len() as u32, // wraps, as the counter does
            Ordering::Relaxed,
        );
        let choice = QueueChoice::new(&request, turn);
        let mut plain = ProduceRequest {
            topic: store.name.clone(),
            messages: Vec::with_capacity(request.messages.len()),
            producer: request.producer,
            idempotency_key: request.idempotency_key,
        };
        let messages = request.messages.into_iter().zip(targets).enumerate();
        for (place, ((mut message, routing_key), targets)) in messages {
            let topics: Vec<_> = targets
                .iter()
                .filter_map(|id| catalog.topics.get(id))
                .collect();
            let refused = match topics.as_slice() {
                [] => Some(unroutable(&exchange, &routing_key, marked)),
                topics => too_large(&message, topics)
                    .or_else(|| never_fits(&message, &exchange.name, &routing_key, topics)),
            };
            match refused {
                // Taken or refused as a whole, so that a retry is the same request.
                Some(error) if marked => return Err(error),
                Some(error) => plan.refuse(place, error),
                None => {
                    let routes = topics.iter().map(|topic| Route {
                        topic: topic.id,
                        queue: choice.queue(place, &message, topic),
                    });
                    plan.store(place, routes.collect());
                    let headers = &mut message.headers;
                    headers.insert(EXCHANGE_HEADER.to_owned(), exchange.name.clone());
                    headers.insert(ROUTING_KEY_HEADER.to_owned(), routing_key);
                    plain.messages.push(message);
                }
            }
        }
        if !plain.messages.is_empty() {
            self.store_published(&store, plain, turn, &mut plan).await?;
        }
        let results = plan.results(&catalog);
        let routed = results.iter().flatten().map(|p| p.routed.len() as u64);
        let (messages, routes) = routed.fold((0, 0), |(m, r), routed| (m + 1, r + routed));
        self.metrics.count_published(messages, routes);
        Ok(PublishAnswer {
            results,
            durability: Durability::MajorityFsync,
        })
    }

    /// The topics of each message. That there are none is proved before it is told.
    async fn targets(
        &self,
        request: &PublishRequest,
    ) -> BrokerResult<(Arc<CatalogState>, Arc<Exchange>, Vec<Vec<TopicId>>)> {
        // Without a binding that was acknowledged a message would miss its topic for ever.
        self.trusted_catalog().await?;
        let mut exchange = self.find_exchange(&request.exchange).await?;
        let find = |exchange: &Exchange| -> Vec<Vec<TopicId>> {
            let messages = request.messages.iter();
            let routes = messages.map(|(m, key)| exchange.routes(key, &m.headers));
            routes.collect()
        };
        let mut targets = find(&exchange);
        if targets.iter().any(Vec::is_empty) {
            self.catalog_barrier().await?;
            exchange = self.find_exchange(&request.exchange).await?;
            targets = find(&exchange);
        }
        // Not older than the exchange: every topic it leads to is in it, or gone.
        Ok((self.catalog(), exchange, targets))
    }

    /// Stores the messages that have routes, a batch for each queue of the internal topic.
    async fn store_published(
        &self,
        store: &Topic,
        plain: ProduceRequest,
        turn: u32,
        plan: &mut Plan,
    ) -> BrokerResult<()> {
        let coordinators = self.catalog().coordinators.len();
        let producer = plain.producer.as_ref();
        let producer = producer
            .map(|mark| producer_stamp(mark, coordinators))
            .transpose()?;
        let max_bytes = self.config.max_batch_bytes;
        // A retry is known by what the client sent, and bindings may have changed meanwhile.
        let marks = match plain.idempotency_key {
            Some(_) => encode(store, &plain, producer, turn, max_bytes)?,
            None => Vec::new(),
        };
        let mut routed = plain;
        for (message, routes) in routed.messages.iter_mut().zip(plan.routes()) {
            let headers = &mut message.headers;
            headers.insert(ROUTES_HEADER.to_owned(), routes::write(routes));
        }
        let mut parts = encode(store, &routed, producer, turn, max_bytes)?;
        drop(routed);
        for (part, mark) in parts.iter_mut().zip(marks) {
            if let (Ok(new), Ok(known)) = (&mut part.batch, mark.batch) {
                new.mark = known.mark;
            }
        }
        let stored = parts.into_iter().map(|part| async move {
            let Part {
                queue,
                places,
                batch,
            } = part;
            let group = store.queues.get(queue as usize).map_or(0, |q| q.group);
            let outcome = async {
                let outcomes = self.store(store, queue, vec![batch?], &[producer]).await?;
                outcomes.into_iter().next().ok_or(UNKNOWN)
            };
            let outcome = outcome.await;
            let first = match &outcome {
                Ok(BatchOutcome::Duplicate(place)) => self.stored_routes(group, *place).await,
                _ => None,
            };
            let results = match outcome {
                Ok(outcome) => explain(group, queue, outcome, places.len(), producer),
                Err(error) => vec![Err(error); places.len()],
            };
            (places, results, first)
        });
        for (places, results, first) in join_all(stored).await {
            for (ordinal, (place, result)) in places.into_iter().zip(results).enumerate() {
                let first = first.as_ref().and_then(|routes| routes.get(ordinal));
                plan.stored(place, result.map(|stored| stored.message_id), first);
            }
        }
        Ok(())
    }

    /// The routes that the first of several same requests got; none when they are no more there.
    async fn stored_routes(&self, group: u64, place: Place) -> Option<Vec<Vec<Route>>> {
        let request = ReadRequest {
            group,
            start: StartAt::Offset(place.base_offset),
            max_messages: place.count.into(),
            max_bytes: 1,
            wait_ms: 0,
            proof: Proof::End,
        };
        let slice = self.read(group, &request).await.ok()?;
        let batch = slice.batches.into_iter().find(|b| b.place == place)?;
        let view = BatchView::parse_trusted(batch.batch).ok()?;
        let records = view.records().map(|record| {
            let message = MessageRecord::decode(&record.ok()?).ok()?;
            let mut headers = message.headers.iter();
            let (_, text) = headers.find(|(name, _)| name == ROUTES_HEADER)?;
            routes::read(text)
        });
        records.collect()
    }
}

/// A stored message: its id and its routes.
type Kept = (String, Vec<Route>);

/// What becomes of each message of a request.
#[derive(Debug)]
struct Plan {
    results: Vec<Option<BrokerResult<Kept>>>,
    /// Of the messages that are stored: their places in the request and their routes.
    kept: Vec<(usize, Vec<Route>)>,
}

impl Plan {
    fn new(messages: usize) -> Self {
        Self {
            results: vec![None; messages],
            kept: Vec::new(),
        }
    }

    fn refuse(&mut self, place: usize, error: BrokerError) {
        if let Some(slot) = self.results.get_mut(place) {
            *slot = Some(Err(error));
        }
    }

    fn store(&mut self, place: usize, routes: Vec<Route>) {
        self.kept.push((place, routes));
    }

    /// In the order in which they were to be stored.
    fn routes(&self) -> impl Iterator<Item = &[Route]> {
        self.kept.iter().map(|(_, routes)| routes.as_slice())
    }

    /// The result of one message by its place among the stored ones. A repetition has the routes
    /// of the `first` one.
    fn stored(&mut self, kept: usize, id: BrokerResult<String>, first: Option<&Vec<Route>>) {
        let Some((place, routes)) = self.kept.get(kept) else {
            return;
        };
        let routes = first.unwrap_or(routes).clone();
        if let Some(slot) = self.results.get_mut(*place) {
            *slot = Some(id.map(|id| (id, routes)));
        }
    }

    fn results(self, catalog: &CatalogState) -> Vec<BrokerResult<Published>> {
        let name = |route: &Route| Some(catalog.topics.get(&route.topic)?.name.clone());
        let each = self.results.into_iter().map(|result| match result {
            Some(Ok((message_id, routes))) => Ok(Published {
                message_id,
                routed: routes.iter().filter_map(name).collect(),
            }),
            Some(Err(error)) => Err(error),
            // Every message is refused or in exactly one part.
            None => Err(BrokerError::Internal(
                "a message without a result".to_owned(),
            )),
        });
        each.collect()
    }
}

/// Which queue of each topic gets a message: as when it is produced to the topic.
struct QueueChoice {
    whole: Option<String>,
    turn: u32,
}

impl QueueChoice {
    fn new(request: &PublishRequest, turn: u32) -> Self {
        let producer = request.producer.as_ref().map(|p| p.id.clone());
        Self {
            whole: producer.or_else(|| request.idempotency_key.clone()),
            turn,
        }
    }

    fn queue(&self, place: usize, message: &NewMessage, topic: &Topic) -> u32 {
        let config = &topic.config;
        match message.key.as_ref().or(self.whole.as_ref()) {
            Some(key) => queue_of_key(key.as_bytes(), config.hash_queues),
            None => self.turn.wrapping_add(place as u32) % config.queues.max(1),
        }
    }
}

fn too_large(message: &NewMessage, topics: &[&Arc<Topic>]) -> Option<BrokerError> {
    let bytes = message.size_bytes();
    let limits = topics.iter().map(|topic| topic.config.max_message_bytes);
    let max_bytes = limits.min().unwrap_or(u64::MAX);
    (bytes > max_bytes).then_some(BrokerError::MessageTooLarge { bytes, max_bytes })
}

/// What a topic could never hold would be brought to it for ever. One that drops the newest drops
/// it, too.
fn never_fits(
    message: &NewMessage,
    exchange: &str,
    routing_key: &str,
    topics: &[&Arc<Topic>],
) -> Option<BrokerError> {
    let bounded = topics.iter().filter_map(|topic| {
        let backlog = &topic.config.backlog;
        let max_bytes = backlog
            .max_bytes
            .filter(|_| backlog.on_full == OnFull::Reject);
        Some((max_bytes?, topic))
    });
    let (max_bytes, topic) = bounded.min_by_key(|(max_bytes, _)| *max_bytes)?;
    let id = "i".repeat(MAX_MESSAGE_ID_LEN);
    let mut record = record_of(message);
    let more = [
        (EXCHANGE_HEADER, exchange),
        (ROUTING_KEY_HEADER, routing_key),
        (MESSAGE_ID_HEADER, &id),
    ];
    let more = more.map(|(name, text)| (name.to_owned(), Bytes::copy_from_slice(text.as_bytes())));
    record.headers.extend(more);
    let mut batch = BatchBuilder::new();
    // What can't be encoded is refused where it is to be stored.
    record.encode(&mut batch).ok()?;
    let bytes = batch.size_bytes() as u64;
    let text = || {
        format!(
            "topic {:?} can never hold the message: it takes up to {bytes} bytes there, and the \
             topic's backlog is bounded to {max_bytes}",
            topic.name
        )
    };
    (bytes > max_bytes).then(|| BrokerError::InvalidRequest(text()))
}

/// Where bindings were taken away, the first of several same requests may have had routes.
fn unroutable(exchange: &Exchange, routing_key: &str, marked: bool) -> BrokerError {
    BrokerError::Unroutable {
        exchange: exchange.name.clone(),
        routing_key: routing_key.to_owned(),
        outcome: match marked && exchange.narrowed {
            true => Outcome::Unknown,
            false => Outcome::NotCommitted,
        },
    }
}
