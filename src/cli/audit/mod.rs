//! `quorate audit`: reads a topic as an operator may at any time, and checks that every producer's
//! messages are there, once, in order, and that offsets have no holes.
//!
//! It asks for the stored batches, so that nothing is filtered out and checksums are verified, and
//! reads each queue up to where it ended when the audit came to it.

mod judge;
mod reader;
mod report;

use clap::Args;

use super::client::{Client, Request};
use super::error::CliError;
use super::out::Output;
use super::wire::GroupOffsets;
use judge::{Finding, Judge, Kind, Limits};
use reader::Reader;
use report::{QueueReport, Report};

#[derive(Debug, Args)]
pub struct AuditCommand {
    #[arg(long)]
    topic: String,
    /// Only these queues; may be repeated. Without it, all of them.
    #[arg(long)]
    queue: Vec<u32>,
    /// Also whether what this consumer group has committed lies within its queues.
    #[arg(long)]
    group: Option<String>,
    /// Begin at this offset of each queue. Without it, with what retention has kept.
    #[arg(long, value_name = "OFFSET")]
    from_offset: Option<u64>,
    /// Begin with the first message at or after this Unix time in milliseconds.
    #[arg(long, value_name = "MS", conflicts_with = "from_offset")]
    from_timestamp_ms: Option<u64>,
    /// End with the last message at or before this Unix time in milliseconds.
    #[arg(long, value_name = "MS")]
    to_timestamp_ms: Option<u64>,
    /// Producers of one queue remembered at a time (about 200 bytes each). With more of them, those
    /// that were silent for longest are forgotten, and count as new when they come again.
    #[arg(long, value_name = "COUNT", default_value_t = 500_000, value_parser = clap::value_parser!(u32).range(2..))]
    max_producers: u32,
    /// Findings that are listed; all are counted.
    #[arg(long, value_name = "COUNT", default_value_t = 1000)]
    max_findings: usize,
}

pub async fn run(client: &Client, out: Output, command: AuditCommand) -> Result<(), CliError> {
    let topic = client.topic(&command.topic).await?;
    if let Some(group) = &command.group {
        // Of a group that isn't there, no offset is wrong.
        let path = ["v1", "groups", group];
        client
            .read::<serde_json::Value>(Request::get(&path))
            .await?;
    }
    let queues = topic.queues.iter().map(|queue| queue.queue);
    let queues: Vec<u32> = match command.queue.is_empty() {
        true => queues.collect(),
        false => command.queue.clone(),
    };
    let mut report = Report::new(&command.topic);
    for queue in queues {
        let room = command.max_findings.saturating_sub(report.findings.len());
        let (of_queue, findings) = audit(client, &command, queue, room).await?;
        report.add(of_queue, findings);
    }
    if let Some(group) = &command.group {
        check_group(client, &command.topic, group, &mut report).await?;
    }
    report.print(out)?;
    match report.findings_total() {
        0 => Ok(()),
        n => Err(CliError::Failed(format!("{n} findings; see the table"))),
    }
}

async fn audit(
    client: &Client,
    command: &AuditCommand,
    queue: u32,
    findings: usize,
) -> Result<(QueueReport, Vec<Finding>), CliError> {
    let mut reader = Reader::new(client, &command.topic, queue);
    let end = match command.to_timestamp_ms.map(|ms| ms.checked_add(1)) {
        Some(Some(after)) => reader.offset_at(after).await?,
        _ => reader.end().await?,
    };
    let from = match (command.from_offset, command.from_timestamp_ms) {
        (Some(offset), _) => offset.max(reader.earliest),
        (None, Some(ms)) => reader.offset_at(ms).await?,
        (None, None) => reader.earliest,
    };
    let limits = Limits {
        producers: command.max_producers as usize,
        findings,
    };
    let mut judge = Judge::new(queue, from == 0, limits);
    let mut offset = from;
    while offset < end {
        let piece = reader.read(offset).await?;
        if piece.from > offset {
            judge.cut(piece.from);
        }
        let within = piece.batches.iter().filter(|batch| batch.base_offset < end);
        within.for_each(|batch| judge.batch(*batch));
        if piece.next_offset <= offset {
            break;
        }
        offset = piece.next_offset;
    }
    for doubt in std::mem::take(&mut judge.doubts) {
        let stored = reader.entry_of(doubt.offset).await?;
        let next_epoch = reader.entry_of(doubt.next_epoch_at).await?;
        // Where one of them is gone, it can't be told; a held message is the more likely.
        let is_known = stored.zip(next_epoch);
        judge.settle(&doubt, is_known.is_none_or(|(stored, next)| stored < next));
    }
    judge.finish();
    let report = QueueReport {
        queue,
        from_offset: from,
        end_offset: end,
        totals: judge.totals.clone(),
    };
    Ok((report, judge.findings))
}

/// Whether a group's committed offsets name messages that are there, or the end.
async fn check_group(
    client: &Client,
    topic: &str,
    group: &str,
    report: &mut Report,
) -> Result<(), CliError> {
    let path = ["v1", "groups", group, "offsets"];
    let request = Request::get(&path).query("topic", topic);
    let offsets: GroupOffsets = client.read(request).await?;
    for entry in &offsets.offsets {
        let Some(offset) = entry.offset.filter(|_| report.has(entry.queue)) else {
            continue;
        };
        let mut reader = Reader::new(client, topic, entry.queue);
        let end = reader.end().await?;
        let earliest = reader.earliest;
        let (kind, detail) = if offset > end {
            let detail = format!("{group} has committed {offset}, the queue ends at {end}");
            (Kind::CommittedBeyondEnd, detail)
        } else if offset < earliest {
            let detail = format!(
                "{group} has committed {offset}, retention left what is from {earliest} on"
            );
            (Kind::RemovedUnread, detail)
        } else {
            continue;
        };
        report.of_group(Finding {
            queue: entry.queue,
            kind,
            offset,
            producer: None,
            epoch: None,
            detail,
        });
    }
    Ok(())
}
