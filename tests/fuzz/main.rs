//! Bytes of a client or of another node that are not what they should be. See [`mutate`] for how
//! they are made and how long that goes on, and `scripts/fuzz.sh` for the long form.

#[path = "../support/mod.rs"]
mod support;

#[path = "../../storage/tests/fuzz/mutate.rs"]
mod mutate;

mod filter;
mod http;
mod machines;
mod peer;
mod request;
