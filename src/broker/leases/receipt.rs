//! Receipts as consumers carry them: opaque text that names one delivery, and of which group.

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD as BASE64;
use xxhash_rust::xxh3::xxh3_64_with_seed;

use crate::broker::{BrokerError, BrokerResult};
use crate::coordinator::leases::Receipt;

const VERSION: u8 = 1;

/// Tells a receipt of this group from other text, and from one of another group.
fn checksum(group: &str, body: &[u8]) -> [u8; 4] {
    let seed = xxh3_64_with_seed(group.as_bytes(), u64::from(VERSION));
    let sum = xxh3_64_with_seed(body, seed);
    (sum as u32).to_be_bytes()
}

pub fn encode(group: &str, receipt: &Receipt) -> String {
    // Numbers into memory: there is no way to fail.
    let mut bytes = postcard::to_extend(receipt, vec![VERSION]).unwrap_or_default();
    bytes.extend(checksum(group, &bytes));
    BASE64.encode(bytes)
}

pub fn decode(group: &str, text: &str) -> BrokerResult<Receipt> {
    let read = || {
        let bytes = BASE64.decode(text).ok()?;
        let (body, sum) = bytes.split_last_chunk::<4>()?;
        let receipt = body.strip_prefix(&[VERSION])?;
        (*sum == checksum(group, body)).then_some(())?;
        postcard::from_bytes(receipt).ok()
    };
    read().ok_or_else(|| {
        let shown: String = text.chars().take(100).collect();
        BrokerError::InvalidRequest(format!(
            "{shown:?} is not a receipt that group {group:?} got; pass it as receive gave it"
        ))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_receipt_comes_back_and_nothing_else_does() {
        let receipt = Receipt {
            topic: 7,
            queue: 300,
            offset: u64::MAX,
            token: 0x1234_5678_9abc_def0,
            consumer: 1,
        };
        let text = encode("g", &receipt);
        assert_eq!(decode("g", &text), Ok(receipt));
        assert!(decode("h", &text).is_err());
        for wrong in ["", "x", "AAAA", &text[1..], &format!("{text}A")] {
            assert!(decode("g", wrong).is_err(), "{wrong}");
        }
    }
}
