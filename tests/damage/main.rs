//! Damage to the files of a node: it is noticed, never obeyed, and made good by the others.

#[path = "../support/mod.rs"]
mod support;

mod files;
mod matrix;
mod quorum;
