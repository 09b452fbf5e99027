//! The HTTP contract against a real node: each endpoint, and each code that can be provoked here.

#[path = "../support/mod.rs"]
mod support;

mod api;
mod backlog;
mod cluster;
mod consume;
mod generator;
mod idempotence;
mod live;
mod no_room;
mod offsets;
mod one_way;
mod overload;
mod overtaking;
mod produce;
mod quotas;
mod strict;
mod topics;
mod ttl;
