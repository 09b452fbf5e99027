//! Zigzag varints as Kafka's records use them: at most 5 bytes for 32 bits, 10 for 64.

use bytes::{BufMut, BytesMut};

/// Reads one varint at `*position` and moves it on. `None` when cut short or too large.
pub(super) fn read_i64(bytes: &[u8], position: &mut usize) -> Option<i64> {
    let mut value: u64 = 0;
    for shift in (0..64).step_by(7) {
        let byte = *bytes.get(*position)?;
        *position += 1;
        let part = u64::from(byte & 0x7f);
        if shift == 63 && part > 1 {
            return None;
        }
        value |= part << shift;
        if byte & 0x80 == 0 {
            return Some((value >> 1) as i64 ^ -((value & 1) as i64));
        }
    }
    None
}

pub(super) fn read_i32(bytes: &[u8], position: &mut usize) -> Option<i32> {
    let start = *position;
    let value = i32::try_from(read_i64(bytes, position)?).ok()?;
    (*position - start <= 5).then_some(value)
}

pub(super) fn write_i64(out: &mut BytesMut, value: i64) {
    let mut rest = zigzag(value);
    while rest >= 0x80 {
        out.put_u8(rest as u8 | 0x80);
        rest >>= 7;
    }
    out.put_u8(rest as u8);
}

/// Bytes that [`write_i64`] takes for `value`.
pub(super) fn len(value: i64) -> usize {
    let bits = 64 - zigzag(value).leading_zeros() as usize;
    bits.div_ceil(7).max(1)
}

fn zigzag(value: i64) -> u64 {
    ((value << 1) ^ (value >> 63)) as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn edges_round_trip_and_len_agrees() {
        for value in [
            0,
            1,
            -1,
            63,
            64,
            -64,
            -65,
            i64::from(i32::MAX),
            i64::MAX,
            i64::MIN,
        ] {
            let mut out = BytesMut::new();
            write_i64(&mut out, value);
            assert_eq!(out.len(), len(value), "{value}");
            let mut position = 0;
            assert_eq!(read_i64(&out, &mut position), Some(value));
            assert_eq!(position, out.len());
        }
    }

    #[test]
    fn refuses_what_does_not_fit_or_end() {
        assert_eq!(read_i64(&[0x80; 9], &mut 0), None);
        assert_eq!(read_i64(&[0xff; 11], &mut 0), None);
        assert_eq!(
            read_i64(
                &[0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 2],
                &mut 0
            ),
            None
        );
        assert_eq!(read_i32(&[0xff, 0xff, 0xff, 0xff, 0x1f], &mut 0), None);
        assert_eq!(
            read_i32(&[0x80, 0x80, 0x80, 0x80, 0x80, 0x00], &mut 0),
            None
        );
        assert_eq!(
            read_i32(&[0xff, 0xff, 0xff, 0xff, 0x0f], &mut 0),
            Some(i32::MIN)
        );
    }
}
