//! `quorate bench --delayed`: many messages that wait, then how late each became visible.
//!
//! Lateness is the servers' own: the time at which a message became visible, less the time it was due.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use futures_util::future::try_join_all;
use hdrhistogram::Histogram;
use reqwest::Method;
use serde::Serialize;
use serde_json::{Value, json};
use tokio::time::Instant;

use super::super::client::{Client, Repeat, Request};
use super::super::error::CliError;
use super::super::out::{Output, Table};

/// A minute; what is later counts as this.
const LATE_MS_MAX: u64 = 60_000;
/// Messages asked for at a time.
const PAGE: u64 = 5_000;
/// Without one more message for so long, the rest is given up.
const PATIENCE: Duration = Duration::from_secs(60);

#[derive(Debug)]
pub struct DelayedPlan {
    pub topic: String,
    pub queues: u32,
    pub messages: u64,
    pub batch: u32,
    pub in_flight: u32,
    pub size_bytes: usize,
    /// From the first request to the first due time.
    pub after: Duration,
    /// From the first due time to the last.
    pub over: Duration,
}

#[derive(Debug, Serialize)]
pub struct DelayedReport {
    stored: u64,
    store_ms: u64,
    /// Stored when their time had come already.
    overdue_at_once: u64,
    visible: u64,
    early: u64,
    late_ms: Late,
}

#[derive(Debug, Serialize)]
struct Late {
    p50: u64,
    p99: u64,
    p999: u64,
    max: u64,
}

fn now_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |d| d.as_millis() as u64)
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

pub async fn run(
    client: &Client,
    out: Output,
    plan: &DelayedPlan,
) -> Result<DelayedReport, CliError> {
    let (begun, first_ms) = (Instant::now(), now_ms() + millis(plan.after));
    let per_worker = plan.messages.div_ceil(u64::from(plan.in_flight.max(1)));
    let workers = (0..u64::from(plan.in_flight)).map(|worker| {
        let range = worker * per_worker..((worker + 1) * per_worker).min(plan.messages);
        store(client, plan, range, first_ms)
    });
    let stored: Vec<(Vec<u64>, u64)> = try_join_all(workers).await?;
    let overdue_at_once = stored.iter().map(|(_, overdue)| overdue).sum();
    let mut per_queue = vec![0; plan.queues as usize];
    for (counts, _) in &stored {
        for (sum, count) in per_queue.iter_mut().zip(counts) {
            *sum += count;
        }
    }
    let (all, store_ms) = (per_queue.iter().sum(), millis(begun.elapsed()));
    out.note(&format!("{all} messages wait, stored in {store_ms} ms"));
    let mut late = histogram()?;
    let mut early = 0;
    let wait_until = first_ms.saturating_sub(now_ms());
    tokio::time::sleep(Duration::from_millis(wait_until)).await;
    let readers = (0..plan.queues).zip(&per_queue);
    let readers = readers.map(|(queue, count)| read(client, plan, queue, *count));
    for (found, too_early) in try_join_all(readers).await? {
        early += too_early;
        // Both have the same bounds.
        late.add(found).ok();
    }
    Ok(DelayedReport {
        stored: all,
        store_ms,
        overdue_at_once,
        visible: late.len(),
        early,
        late_ms: Late {
            p50: late.value_at_quantile(0.5),
            p99: late.value_at_quantile(0.99),
            p999: late.value_at_quantile(0.999),
            max: late.max(),
        },
    })
}

fn histogram() -> Result<Histogram<u64>, CliError> {
    Histogram::new_with_max(LATE_MS_MAX, 3).map_err(|e| CliError::Usage(e.to_string()))
}

/// Stores a worker's share; how many went to each queue, and how many of them were due by then.
async fn store(
    client: &Client,
    plan: &DelayedPlan,
    range: std::ops::Range<u64>,
    first_ms: u64,
) -> Result<(Vec<u64>, u64), CliError> {
    let mut counts = vec![0; plan.queues as usize];
    let mut overdue = 0;
    let (mut next, path) = (range.start, ["v1", "topics", &plan.topic, "messages"]);
    while next < range.end {
        let end = (next + u64::from(plan.batch)).min(range.end);
        let queue = (next / u64::from(plan.batch)) % u64::from(plan.queues.max(1));
        let due = |n: u64| {
            // Spread out, so that neighbours in the log are not neighbours in time.
            let place = n.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32;
            first_ms + ((place * millis(plan.over)) >> 32)
        };
        let messages: Vec<Value> = (next..end)
            .map(|n| {
                let value = format!("{:<size$}", due(n), size = plan.size_bytes);
                json!({"value": value, "queue": queue, "deliver_at_ms": due(n)})
            })
            .collect();
        let request = Request::new(Method::POST, &path, Repeat::IfUnsent);
        let answer = client
            .call(request.json(&json!({ "messages": messages }))?)
            .await?;
        let results = answer["results"].as_array().map_or(&[][..], Vec::as_slice);
        overdue += results.iter().filter(|r| r["offset"].is_u64()).count() as u64;
        counts[queue as usize] += end - next;
        next = end;
    }
    Ok((counts, overdue))
}

/// Reads a queue until it has shown `count` messages or shows no more of them.
async fn read(
    client: &Client,
    plan: &DelayedPlan,
    queue: u32,
    count: u64,
) -> Result<(Histogram<u64>, u64), CliError> {
    let (mut late, mut early) = (histogram()?, 0);
    let queue = queue.to_string();
    let path = ["v1", "topics", &plan.topic, "queues", &queue, "messages"];
    let (mut offset, mut last) = (0, Instant::now());
    while late.len() < count && last.elapsed() < PATIENCE + plan.over {
        let request = Request::get(&path)
            .query("offset", offset)
            .query("max_messages", PAGE)
            .query("max_bytes", 8 << 20)
            .query("wait_ms", 1000);
        // A node may be away for a while; the next one is asked then.
        let Ok(page) = client.call(request).await else {
            tokio::time::sleep(Duration::from_millis(100)).await;
            continue;
        };
        offset = page["next_offset"].as_u64().unwrap_or(offset);
        for message in page["messages"].as_array().into_iter().flatten() {
            let due = message["value"].as_str().unwrap_or_default().trim_end();
            let (due, visible) = (due.parse(), message["timestamp_ms"].as_u64());
            let (Ok(due), Some(visible)) = (due, visible) else {
                continue;
            };
            let due: u64 = due;
            early += u64::from(visible < due);
            late.saturating_record(visible.saturating_sub(due));
            last = Instant::now();
        }
    }
    Ok((late, early))
}

impl DelayedReport {
    pub fn print(&self, out: Output) -> Result<(), CliError> {
        let late = &self.late_ms;
        let mut table = Table::new(&["LATE P50 MS", "P99 MS", "P99.9 MS", "MAX MS"]);
        let row = [late.p50, late.p99, late.p999, late.max];
        table.row(row.map(|ms| ms.to_string()).to_vec());
        out.table(&table)?;
        out.line(&format!(
            "{} of {} messages became visible, {} early; {} were due before they were stored",
            self.visible, self.stored, self.early, self.overdue_at_once
        ))
    }
}
