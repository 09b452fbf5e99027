//! The commit log as its users see it.

mod basics;
mod cleaning;
mod concurrent;
mod crash;
mod every_crash;
mod every_fault;

mod durability;
mod fixture;
mod model;
mod recovery;
mod support;
mod workload;
