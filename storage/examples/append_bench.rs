//! Measures what a segment's preparation costs and brings, and the log on top of it.
//!
//! ```text
//! cargo run --release -p quorate-storage --example append_bench -- DIR
//! ```
//!
//! First the bare disk: one write and one fdatasync at a time into a file that is empty, reserved
//! (fallocate), filled with zeroes, or used before. Then the log: one append in flight, and many from
//! several groups. Run it alone.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use quorate_storage::commit_log::{
    CommitLog, CommitLogConfig, CommitLogStats, Entry, EntryKind, Flush,
};
use quorate_storage::vfs::Vfs;
use quorate_storage::vfs::os::OsVfs;
use quorate_storage::{LogId, RaftGroupId};

const FILE_BYTES: u64 = 256 << 20;
const SMALL: usize = 1536;
const LARGE: usize = 64 << 10;
const ROUNDS: usize = 3000;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let dir = std::env::args_os().nth(1).map(PathBuf::from);
    let dir = dir.ok_or("name a directory on the disk to measure")?;
    std::fs::create_dir_all(&dir)?;
    println!("one write and one fdatasync at a time, microseconds:");
    println!("{:<24}{:>8}{:>8}{:>8}{:>8}", "", "p10", "p50", "p90", "p99");
    for size in [SMALL, LARGE] {
        bare_disk(&dir, size)?;
    }
    println!("filling 256 MiB with zeroes in the background of 1.5 KiB appends:");
    beside_a_fill(&dir)?;
    println!("the log:");
    log_one_at_a_time(&dir.join("log-1"))?;
    log_many(&dir.join("log-n"))?;
    Ok(())
}

type Prepare = fn(&Path) -> io::Result<File>;

fn strategies() -> [(&'static str, Prepare); 4] {
    [
        ("growing", create),
        ("reserved", |path| {
            let vfs = OsVfs;
            vfs.create(path)?.allocate(FILE_BYTES)?;
            let file = OpenOptions::new().read(true).write(true).open(path)?;
            file.sync_all()?;
            Ok(file)
        }),
        ("zero-filled", |path| {
            let file = create(path)?;
            fill(&file, 0, 8 << 20)?;
            Ok(file)
        }),
        ("written before", |path| {
            let file = create(path)?;
            fill(&file, 0xa5, 8 << 20)?;
            Ok(file)
        }),
    ]
}

fn create(path: &Path) -> io::Result<File> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(true).truncate(true);
    options.open(path)
}

/// Reserves the file, then writes it full, with a sync every `step` bytes.
fn fill(file: &File, byte: u8, step: usize) -> io::Result<()> {
    let piece = vec![byte; step];
    let mut at = 0;
    while at < FILE_BYTES {
        file.write_all_at(&piece, at)?;
        file.sync_data()?;
        at += step as u64;
    }
    file.sync_all()
}

/// Takes turns between the strategies, so that whatever else the disk does hits all alike.
fn bare_disk(dir: &Path, size: usize) -> io::Result<()> {
    let mut files = Vec::new();
    for (name, prepare) in strategies() {
        let path = dir.join(name);
        files.push((name, prepare(&path)?, Vec::with_capacity(ROUNDS)));
        std::fs::remove_file(&path)?;
    }
    let body = vec![0x5a; size];
    for round in 0..ROUNDS {
        for (_, file, times) in &mut files {
            let at = (round * size) as u64 % (FILE_BYTES - size as u64);
            let start = Instant::now();
            file.write_all_at(&body, at)?;
            file.sync_data()?;
            times.push(start.elapsed());
        }
    }
    for (name, _, times) in files {
        line(&format!("{name}, {size} B"), times);
    }
    Ok(())
}

fn line(label: &str, mut times: Vec<Duration>) {
    times.sort();
    let us = |per_mille: usize| times[(times.len() - 1) * per_mille / 1000].as_secs_f64() * 1e6;
    let (p10, p50, p90, p99) = (us(100), us(500), us(900), us(990));
    println!("{label:<24}{p10:>8.0}{p50:>8.0}{p90:>8.0}{p99:>8.0}");
}

fn beside_a_fill(dir: &Path) -> io::Result<()> {
    for step in [1_usize << 20, 4 << 20, 16 << 20] {
        let active = strategies()[2].1(&dir.join("active.bin"))?;
        let next = create(&dir.join("next.bin"))?;
        let filler = std::thread::spawn(move || {
            let start = Instant::now();
            fill(&next, 0, step).map(|()| start.elapsed())
        });
        let mut times = Vec::new();
        let body = vec![0x5a; SMALL];
        while !filler.is_finished() {
            let at = (times.len() * SMALL) as u64;
            let start = Instant::now();
            active.write_all_at(&body, at)?;
            active.sync_data()?;
            times.push(start.elapsed());
        }
        let took = filler.join().map_err(|_| io::Error::other("filler"))??;
        line(&format!("steps of {} MiB, {took:.1?}", step >> 20), times);
    }
    std::fs::remove_file(dir.join("active.bin"))?;
    std::fs::remove_file(dir.join("next.bin"))
}

fn open(dir: &Path) -> Result<CommitLog, Box<dyn std::error::Error>> {
    if dir.exists() {
        std::fs::remove_dir_all(dir)?;
    }
    Ok(CommitLog::open(
        Arc::new(OsVfs),
        dir,
        CommitLogConfig::default(),
    )?)
}

fn entry(index: u64, body: &Bytes) -> Entry {
    Entry {
        log_id: LogId::new(1, index),
        kind: EntryKind::Command,
        body: body.clone(),
    }
}

fn log_one_at_a_time(dir: &Path) -> Result<(), Box<dyn std::error::Error>> {
    let log = open(dir)?;
    let group = log.group(RaftGroupId(1));
    let body = Bytes::from(vec![1; SMALL]);
    let mut times = Vec::new();
    for index in 0..ROUNDS as u64 {
        let (sender, receiver) = mpsc::channel();
        let start = Instant::now();
        let done = Box::new(move |result| drop(sender.send(result)));
        group.append(vec![entry(index, &body)], Flush::Sync, done)?;
        receiver.recv()??;
        times.push(start.elapsed());
    }
    line("1 in flight, 1536 B", times);
    log.close()?;
    std::fs::remove_dir_all(dir)?;
    Ok(())
}

fn log_many(dir: &Path) -> Result<(), Box<dyn std::error::Error>> {
    const THREADS: u64 = 16;
    const EACH: u64 = 40_000;
    const IN_FLIGHT: u64 = 16;
    let log = open(dir)?;
    let body = Bytes::from(vec![1; 1024]);
    let start = Instant::now();
    std::thread::scope(|scope| {
        for id in 0..THREADS {
            let group = log.group(RaftGroupId(id));
            let body = &body;
            scope.spawn(move || {
                let (sender, receiver) = mpsc::channel();
                let mut waiting = 0;
                for index in 0..EACH {
                    while waiting >= IN_FLIGHT {
                        let result: Result<(), _> = receiver.recv().expect("answer");
                        result.expect("durable");
                        waiting -= 1;
                    }
                    let sender = sender.clone();
                    let done = Box::new(move |result| drop(sender.send(result)));
                    let appended = group.append(vec![entry(index, body)], Flush::Sync, done);
                    appended.expect("append");
                    waiting += 1;
                }
                for _ in 0..waiting {
                    receiver.recv().expect("answer").expect("durable");
                }
            });
        }
    });
    let took = start.elapsed().as_secs_f64();
    let CommitLogStats {
        entries,
        fsyncs,
        written_bytes,
        fsync_max_ns,
        ..
    } = log.stats();
    println!(
        "{THREADS} groups, {IN_FLIGHT} in flight each, 1 KiB: {:.0} entries/s, {:.0} MiB/s, \
         {:.0} entries an fsync, slowest fsync {:.1} ms",
        entries as f64 / took,
        written_bytes as f64 / took / f64::from(1 << 20),
        entries as f64 / fsyncs as f64,
        fsync_max_ns as f64 / 1e6,
    );
    log.close()?;
    std::fs::remove_dir_all(dir)?;
    Ok(())
}
