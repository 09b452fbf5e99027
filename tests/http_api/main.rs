//! The HTTP contract against a real node: each endpoint, and each code that can be provoked here.

#[path = "../support/mod.rs"]
mod support;

mod api;
mod audit;
mod backlog;
mod backlog_held;
mod cluster;
mod consume;
mod dead_letters;
mod delayed;
mod delayed_faults;
mod exchange_flow;
mod exchanges;
mod filters;
mod generator;
mod groups;
mod idempotence;
mod leases;
mod live;
mod lookup;
mod no_room;
mod offsets;
mod one_way;
mod overload;
mod overtaking;
mod produce;
mod quotas;
mod retention;
mod strict;
mod topics;
mod trace;
mod transactions;
mod ttl;
