//! Finding places in a stopped node's files, and spoiling them.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

const SEGMENT_HEADER: usize = 64;
const FRAME_HEADER: usize = 48;
const ENTRY: u8 = 1;
const FIRST_QUEUE: u64 = 1024;

/// Where in a file something is spoiled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum At {
    FirstFrame,
    MiddleFrame,
    LastFrame,
    Header,
    Middle,
    Whole,
}

/// What is done there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Spoil {
    FlipBit,
    ZeroPage,
    Truncate,
    Remove,
    /// The content of another file of the same kind.
    Swap,
}

/// The files in `dir` with this ending, by name.
pub fn list(dir: &Path, ending: &str) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).with_context(|| dir.display().to_string())? {
        let path = entry?.path();
        if path.is_dir() {
            found.extend(list(&path, ending)?);
        } else if path.to_string_lossy().ends_with(ending) {
            found.push(path);
        }
    }
    found.sort();
    Ok(found)
}

/// The segments that hold frames, oldest first.
pub fn segments(data: &Path) -> Result<Vec<PathBuf>> {
    let mut segments = list(&data.join("log"), ".log")?;
    segments.retain(|path| entries(path).is_ok_and(|entries| !entries.is_empty()));
    ensure!(!segments.is_empty(), "no segment holds an entry");
    Ok(segments)
}

/// Byte of the body of every frame in a segment that holds messages.
fn entries(segment: &Path) -> Result<Vec<usize>> {
    let bytes = fs::read(segment)?;
    let mut found = Vec::new();
    let mut at = SEGMENT_HEADER;
    while let Some(head) = bytes.get(at..at + FRAME_HEADER) {
        if head.iter().all(|byte| *byte == 0) {
            break;
        }
        let length = u32::from_le_bytes([head[0], head[1], head[2], head[3]]) as usize;
        let group = u64::from_le_bytes(head[24..32].try_into()?);
        if head[9] == ENTRY && group >= FIRST_QUEUE && length > 8 {
            found.push(at + FRAME_HEADER);
        }
        at += (FRAME_HEADER + length).next_multiple_of(8);
    }
    Ok(found)
}

/// Spoils a file at a place.
pub fn spoil(file: &Path, at: At, how: Spoil, other: Option<&Path>) -> Result<()> {
    let mut bytes = fs::read(file).with_context(|| file.display().to_string())?;
    let place = match at {
        At::FirstFrame | At::MiddleFrame | At::LastFrame => {
            let entries = entries(file)?;
            let number = match at {
                At::FirstFrame => 0,
                At::MiddleFrame => entries.len() / 2,
                _ => entries.len() - 1,
            };
            entries[number]
        }
        At::Header | At::Whole => 16,
        At::Middle => bytes.len() / 2,
    };
    match how {
        Spoil::FlipBit => bytes[place + 4] ^= 0x10,
        Spoil::ZeroPage => {
            let end = bytes.len().min(place + 4096);
            bytes[place..end].fill(0);
        }
        Spoil::Truncate => bytes.truncate(place + 4),
        Spoil::Remove => return Ok(fs::remove_file(file)?),
        Spoil::Swap => {
            let other = other.context("there is no other file to swap with")?;
            let theirs = fs::read(other)?;
            fs::write(other, &bytes)?;
            bytes = theirs;
        }
    }
    Ok(fs::write(file, bytes)?)
}
