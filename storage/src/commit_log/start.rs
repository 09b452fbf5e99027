//! Where the log begins: a small file that is written before cleaning removes the first segment.
//!
//! Without it nobody could tell a log whose front was cleaned from one whose first segment is
//! missing, and with that segment perhaps a vote.

use std::path::{Path, PathBuf};

use crate::vfs::Vfs;
use crate::{StorageError, files};

const FILE: &str = "start";

pub(super) fn path(dir: &Path) -> PathBuf {
    dir.join(FILE)
}

/// The position that the first segment begins at or before; none if nothing was ever cleaned.
/// The inner error says that the file is bad.
pub(super) fn read(vfs: &dyn Vfs, dir: &Path) -> Result<Result<Option<u64>, ()>, StorageError> {
    let bytes = files::read(vfs, &path(dir))?;
    Ok(bytes.map(|bytes| decode(&bytes)).transpose())
}

/// Segments below `base` are about to be removed.
pub(super) fn write(vfs: &dyn Vfs, dir: &Path, base: u64) -> Result<(), StorageError> {
    files::replace(vfs, &path(dir), encode(base).as_bytes())
}

fn encode(base: u64) -> String {
    let digits = format!("{base:020}");
    format!("{digits} {:08x}\n", crc32c::crc32c(digits.as_bytes()))
}

fn decode(bytes: &[u8]) -> Result<u64, ()> {
    let text = std::str::from_utf8(bytes).map_err(drop)?;
    let base = text.get(..20).ok_or(())?.parse().map_err(drop)?;
    if encode(base) == text {
        Ok(base)
    } else {
        Err(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_changed_byte_is_noticed() {
        let good = encode(81_920);
        assert_eq!(decode(good.as_bytes()), Ok(81_920));
        for at in 0..good.len() {
            let mut bad = good.clone().into_bytes();
            bad[at] ^= 1;
            assert_eq!(decode(&bad), Err(()), "byte {at}");
            assert_eq!(decode(&good.as_bytes()[..at]), Err(()), "cut at {at}");
        }
    }
}
