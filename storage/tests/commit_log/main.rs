//! The commit log as its users see it.

mod basics;
mod cleaning;
mod concurrent;
mod crash;
mod durability;
mod fixture;
mod recovery;
mod support;
