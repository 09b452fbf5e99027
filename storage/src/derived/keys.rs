//! Keys of typed fields whose byte order is the order of the fields.
//!
//! | field | bytes |
//! |---|---|
//! | `u8`, `u32`, `u64` | big-endian |
//! | `i64` | big-endian with the sign bit flipped |
//! | bytes, text | each 0x00 as 0x00 0xFF, then 0x00 0x01 |
//!
//! So no key of a shorter first field is a prefix of another's by accident, and `"a" < "a\0" <
//! "aa"`. A key does not say what its fields are: whoever reads it knows.

/// Builds a key from fields, in order.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct KeyBuilder(Vec<u8>);

impl KeyBuilder {
    pub fn new() -> Self {
        Self::default()
    }

    pub fn u8(mut self, field: u8) -> Self {
        self.0.push(field);
        self
    }

    pub fn u32(mut self, field: u32) -> Self {
        self.0.extend_from_slice(&field.to_be_bytes());
        self
    }

    pub fn u64(mut self, field: u64) -> Self {
        self.0.extend_from_slice(&field.to_be_bytes());
        self
    }

    pub fn i64(self, field: i64) -> Self {
        self.u64((field as u64) ^ (1 << 63))
    }

    pub fn bytes(mut self, field: &[u8]) -> Self {
        for &byte in field {
            self.0.push(byte);
            if byte == 0 {
                self.0.push(0xff);
            }
        }
        self.0.extend_from_slice(&[0, 1]);
        self
    }

    pub fn text(self, field: &str) -> Self {
        self.bytes(field.as_bytes())
    }

    pub fn build(self) -> Vec<u8> {
        self.0
    }
}

/// Takes a key apart again. Every method gives `None` when the key has no such field there.
#[derive(Debug, Clone)]
pub struct KeyReader<'a>(&'a [u8]);

impl<'a> KeyReader<'a> {
    pub fn new(key: &'a [u8]) -> Self {
        Self(key)
    }

    pub fn u8(&mut self) -> Option<u8> {
        self.fixed::<1>().map(|[byte]| byte)
    }

    pub fn u32(&mut self) -> Option<u32> {
        self.fixed().map(u32::from_be_bytes)
    }

    pub fn u64(&mut self) -> Option<u64> {
        self.fixed().map(u64::from_be_bytes)
    }

    pub fn i64(&mut self) -> Option<i64> {
        self.u64().map(|field| (field ^ (1 << 63)) as i64)
    }

    pub fn bytes(&mut self) -> Option<Vec<u8>> {
        let mut field = Vec::new();
        let mut rest = self.0;
        loop {
            let (&byte, after) = rest.split_first()?;
            rest = after;
            if byte == 0 {
                let (&mark, after) = rest.split_first()?;
                rest = after;
                match mark {
                    0xff => {}
                    1 => break,
                    _ => return None,
                }
            }
            field.push(byte);
        }
        self.0 = rest;
        Some(field)
    }

    pub fn text(&mut self) -> Option<String> {
        String::from_utf8(self.bytes()?).ok()
    }

    /// Whether all fields have been taken.
    pub fn is_done(&self) -> bool {
        self.0.is_empty()
    }

    fn fixed<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (field, rest) = self.0.split_first_chunk::<N>()?;
        self.0 = rest;
        Some(*field)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    type Fields = (Vec<u8>, u64, i64, String, u32, u8);

    fn encode(f: &Fields) -> Vec<u8> {
        KeyBuilder::new()
            .bytes(&f.0)
            .u64(f.1)
            .i64(f.2)
            .text(&f.3)
            .u32(f.4)
            .u8(f.5)
            .build()
    }

    fn fields() -> impl Strategy<Value = Fields> {
        // Few distinct bytes, so that equal prefixes and zeros are common.
        let bytes = proptest::collection::vec(prop_oneof![Just(0), Just(1), Just(255)], 0..4);
        let text = "[\u{0}ab]{0,3}";
        let small = prop_oneof![0u64..3, any::<u64>()];
        let signed = prop_oneof![-2i64..3, any::<i64>()];
        (bytes, small, signed, text, any::<u32>(), any::<u8>())
    }

    proptest! {
        #[test]
        fn keys_read_back_and_keep_the_order(a in fields(), b in fields()) {
            let (key_a, key_b) = (encode(&a), encode(&b));
            prop_assert_eq!(key_a.cmp(&key_b), a.cmp(&b));
            let mut reader = KeyReader::new(&key_a);
            let back = (reader.bytes(), reader.u64(), reader.i64(), reader.text(), reader.u32(), reader.u8());
            prop_assert!(reader.is_done());
            prop_assert_eq!(back, (Some(a.0), Some(a.1), Some(a.2), Some(a.3), Some(a.4), Some(a.5)));
        }
    }

    #[test]
    fn a_key_that_is_cut_short_gives_no_field() {
        let key = KeyBuilder::new().text("ab").u64(7).build();
        for len in 0..key.len() {
            let mut reader = KeyReader::new(&key[..len]);
            let fields = (reader.text(), reader.u64());
            assert!(fields.0.is_none() || fields.1.is_none(), "{len}");
        }
        assert_eq!(KeyReader::new(&[0, 7]).bytes(), None);
    }
}
