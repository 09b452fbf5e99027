//! Quorate: a replicated message log over HTTP.
#![forbid(unsafe_code)]

pub mod broker;
pub mod catalog;
pub mod cli;
pub mod config;
pub mod coordinator;
pub mod exchange;
pub mod http;
pub mod metrics;
pub mod names;
pub mod node;
pub mod peer;
pub mod server;
pub mod soundness;
pub mod telemetry;
