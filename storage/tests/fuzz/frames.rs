//! The commit log's bytes, read by `docs/format.md` alone: what is a good frame, and making one so.

/// Bytes of a segment in the logs of these tests; an input is cut into files of this size.
pub const SEGMENT: usize = 4096;
const SEGMENT_HEADER: usize = 64;
const FRAME_HEADER: usize = 48;

/// An entry as its frame says it: group, term, index, kind, body.
pub type Found = (u64, u64, u64, u8, Vec<u8>);

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    bytes[at..]
        .first_chunk()
        .copied()
        .map_or(0, u32::from_le_bytes)
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    bytes[at..]
        .first_chunk()
        .copied()
        .map_or(0, u64::from_le_bytes)
}

/// Every place of a log where a frame could begin.
fn places(log: &[u8]) -> impl Iterator<Item = (usize, &[u8])> {
    log.chunks(SEGMENT).enumerate().flat_map(|(number, file)| {
        let last = file.len().saturating_sub(FRAME_HEADER - 1);
        let places = (SEGMENT_HEADER..last.max(SEGMENT_HEADER)).step_by(8);
        places.map(move |at| (number * SEGMENT + at, &file[at..]))
    })
}

/// The frame at the front of `bytes` without its padding, if it says that this is its place.
fn of_this_place(position: usize, bytes: &[u8]) -> Option<&[u8]> {
    let length = FRAME_HEADER.checked_add(u32_at(bytes, 0) as usize)?;
    (u64_at(bytes, 16) == position as u64).then(|| bytes.get(..length))?
}

/// The entries of all good frames in a log, wherever they are.
pub fn entries(log: &[u8]) -> Vec<Found> {
    let frames = places(log).filter_map(|(position, bytes)| of_this_place(position, bytes));
    let good = frames.filter(|frame| u32_at(frame, 4) == crc32c::crc32c(&frame[8..]));
    let entries = good.filter(|frame| frame[9] == 1);
    let found = |frame: &[u8]| {
        let (group, term, index) = (u64_at(frame, 24), u64_at(frame, 32), u64_at(frame, 40));
        (
            group,
            term,
            index,
            frame[10],
            frame[FRAME_HEADER..].to_vec(),
        )
    };
    entries.map(found).collect()
}

/// Gives every segment header and every frame that is in its place a right checksum.
pub fn seal(log: &mut [u8]) {
    for header in log.chunks_mut(SEGMENT) {
        if let Some(header) = header.first_chunk_mut::<SEGMENT_HEADER>() {
            let crc = crc32c::crc32c(&header[12..]);
            header[8..12].copy_from_slice(&crc.to_le_bytes());
        }
    }
    let frames = places(log)
        .filter_map(|(position, bytes)| {
            let frame = of_this_place(position, bytes)?;
            Some((position, crc32c::crc32c(&frame[8..])))
        })
        .collect::<Vec<_>>();
    for (position, crc) in frames {
        log[position + 4..position + 8].copy_from_slice(&crc.to_le_bytes());
    }
}
