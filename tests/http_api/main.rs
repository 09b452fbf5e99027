//! The HTTP contract against a real node: each endpoint, and each code that can be provoked here.

#[path = "../support/mod.rs"]
mod support;

mod api;
mod cluster;
mod consume;
mod dead_letters;
mod filters;
mod idempotence;
mod leases;
mod live;
mod no_room;
mod offsets;
mod produce;
mod strict;
mod topics;
