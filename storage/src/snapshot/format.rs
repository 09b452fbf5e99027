//! The bytes of a snapshot file; the table is in the parent module.

use bytes::Bytes;

use super::{SnapshotHeader, SnapshotKind};
use crate::mutation::{self, Mutation};
use crate::{LogId, RaftGroupId};

const MAGIC: &[u8; 8] = b"QRTSNAP1";
const HEAD_BYTES: usize = 56;
const CRC_BYTES: usize = 4;

/// Everything before the body.
pub(super) fn encode_head(group: RaftGroupId, header: &SnapshotHeader, body_len: usize) -> Vec<u8> {
    let mut head = Vec::with_capacity(HEAD_BYTES + header.membership.len());
    head.extend_from_slice(MAGIC);
    head.push(match header.kind {
        SnapshotKind::Checkpoint => 1,
        SnapshotKind::Boundary => 2,
    });
    head.extend_from_slice(&[0; 7]);
    for field in [
        group.0,
        header.last.term,
        header.last.index,
        header.membership.len() as u64,
        body_len as u64,
    ] {
        head.extend_from_slice(&field.to_le_bytes());
    }
    head.extend_from_slice(&header.membership);
    head
}

/// Verifies the whole file and that it is the one its name promises. On failure gives the byte
/// where it was noticed and the reason.
pub(super) fn decode(
    bytes: Bytes,
    group: RaftGroupId,
    last: LogId,
) -> Result<(SnapshotHeader, Bytes), (u64, &'static str)> {
    if bytes.len() < HEAD_BYTES + CRC_BYTES {
        return Err((bytes.len() as u64, "the file is cut short"));
    }
    if !bytes.starts_with(MAGIC) {
        return Err((0, "this is no snapshot of a known version"));
    }
    let crc_at = bytes.len() - CRC_BYTES;
    let stored = bytes[crc_at..]
        .first_chunk()
        .copied()
        .map(u32::from_le_bytes);
    let sound = stored == Some(crc32c::crc32c(&bytes[..crc_at]));
    if !sound && !mutation::on(Mutation::ServeBadSnapshot) {
        return Err((crc_at as u64, "the checksum does not match"));
    }
    let kind = match bytes[8] {
        1 => SnapshotKind::Checkpoint,
        2 => SnapshotKind::Boundary,
        _ => return Err((8, "unknown kind")),
    };
    if u64_at(&bytes, 16) != group.0 {
        return Err((16, "the snapshot belongs to another group"));
    }
    if LogId::new(u64_at(&bytes, 24), u64_at(&bytes, 32)) != last {
        return Err((24, "the snapshot is of another log id than its name says"));
    }
    let content = bytes.slice(HEAD_BYTES..crc_at);
    let lengths = (u64_at(&bytes, 40), u64_at(&bytes, 48));
    if lengths.0.checked_add(lengths.1) != Some(content.len() as u64) {
        return Err((40, "the lengths do not fit the file"));
    }
    // Not above content.len(), so it fits.
    let membership = content.slice(..lengths.0 as usize);
    let body = content.slice(lengths.0 as usize..);
    let header = SnapshotHeader {
        last,
        membership,
        kind,
    };
    Ok((header, body))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    let mut field = [0; 8];
    field.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(field)
}
