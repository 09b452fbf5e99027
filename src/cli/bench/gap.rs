//! The failover measurement: how long each queue goes without an acknowledgement.
//!
//! One client a queue writes one message after the other, numbered, and after any failure sends
//! the same one again to the next node. What it reports is what an application would feel.

use std::rc::Rc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::Serialize;
use tokio::task::LocalSet;
use tokio::time::Instant;

use super::super::error::CliError;
use super::super::out::{Output, Table};
use super::request::Prepared;
use super::target::{Failures, Outcome, Target};

const PAUSE_AFTER_FAILURE: Duration = Duration::from_millis(5);
/// Codes that no repetition will change.
const FINAL: [&str; 6] = [
    "invalid_request",
    "topic_not_found",
    "queue_not_found",
    "fenced_producer",
    "out_of_order_sequence",
    "message_too_large",
];

#[derive(Debug)]
pub struct GapPlan {
    /// One for each queue.
    pub requests: Vec<Prepared>,
    pub addresses: Vec<String>,
    pub duration: Duration,
    pub timeout: Duration,
    /// Between an acknowledgement and the next message.
    pub pause: Duration,
    /// Shorter gaps are not listed.
    pub threshold: Duration,
}

#[derive(Debug, Serialize)]
pub struct GapReport {
    pub duration_ms: u64,
    pub acknowledged: u64,
    pub longest_gap_ms: f64,
    pub queues: Vec<QueueGap>,
    /// Every gap above the threshold, in the order of time.
    pub gaps: Vec<Gap>,
    pub errors: Failures,
}

#[derive(Debug, Clone, Serialize)]
pub struct QueueGap {
    pub queue: u32,
    pub acknowledged: u64,
    pub longest_gap_ms: f64,
}

#[derive(Debug, Clone, Serialize)]
pub struct Gap {
    pub queue: u32,
    /// Unix time of the acknowledgement before the gap.
    pub since_ms: u64,
    pub gap_ms: f64,
    /// False when the run ended before the next acknowledgement came.
    pub ended: bool,
}

pub async fn run(plan: GapPlan) -> GapReport {
    let workers = LocalSet::new();
    let addresses: Rc<[String]> = plan.addresses.into();
    let end = Instant::now() + plan.duration;
    let mut tasks = Vec::new();
    for (queue, request) in plan.requests.into_iter().enumerate() {
        let addresses = Rc::clone(&addresses);
        tasks.push(workers.spawn_local(async move {
            let target = Target::new(&addresses, queue, plan.timeout);
            let mut log = AckLog::new(u32::try_from(queue).unwrap_or(u32::MAX), plan.threshold);
            write_until(target, request, end, plan.pause, &mut log).await;
            log
        }));
    }
    workers.await;
    let mut logs = Vec::new();
    for task in tasks {
        // A worker that panicked would have brought the process down with its message.
        if let Ok(log) = task.await {
            logs.push(log);
        }
    }
    report(logs, plan.duration)
}

async fn write_until(
    mut target: Target<'_>,
    mut request: Prepared,
    end: Instant,
    pause: Duration,
    log: &mut AckLog,
) {
    let mut sequence = 0;
    while Instant::now() < end {
        request.set_sequence(sequence);
        match target.send(request.bytes()).await {
            Outcome::Acknowledged => {
                log.acknowledged(Instant::now());
                sequence += 1;
                if !pause.is_zero() {
                    tokio::time::sleep(pause).await;
                }
            }
            Outcome::Failed(code) => {
                let hopeless = FINAL.contains(&code.as_str());
                log.errors.count(code);
                if hopeless {
                    break;
                }
                tokio::time::sleep(PAUSE_AFTER_FAILURE).await;
            }
        }
    }
    log.finish(Instant::now().max(end));
}

/// One queue's acknowledgements: only what lies between them is kept.
#[derive(Debug)]
struct AckLog {
    queue: u32,
    threshold: Duration,
    begun: Instant,
    begun_unix: Duration,
    last: Instant,
    acknowledged: u64,
    longest: Duration,
    gaps: Vec<Gap>,
    errors: Failures,
}

impl AckLog {
    fn new(queue: u32, threshold: Duration) -> Self {
        let begun = Instant::now();
        Self {
            queue,
            threshold,
            begun,
            begun_unix: unix_now(),
            last: begun,
            acknowledged: 0,
            longest: Duration::ZERO,
            gaps: Vec::new(),
            errors: Failures::default(),
        }
    }

    fn acknowledged(&mut self, now: Instant) {
        self.gap_until(now, true);
        self.acknowledged += 1;
        self.last = now;
    }

    fn finish(&mut self, now: Instant) {
        self.gap_until(now, false);
    }

    fn gap_until(&mut self, now: Instant, ended: bool) {
        let gap = now.duration_since(self.last);
        self.longest = self.longest.max(gap);
        if gap >= self.threshold {
            let since = self.begun_unix + self.last.duration_since(self.begun);
            self.gaps.push(Gap {
                queue: self.queue,
                since_ms: u64::try_from(since.as_millis()).unwrap_or(u64::MAX),
                gap_ms: in_ms(gap),
                ended,
            });
        }
    }
}

fn unix_now() -> Duration {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default()
}

fn in_ms(time: Duration) -> f64 {
    (time.as_secs_f64() * 10_000.0).round() / 10.0
}

fn report(logs: Vec<AckLog>, duration: Duration) -> GapReport {
    let mut report = GapReport {
        duration_ms: u64::try_from(duration.as_millis()).unwrap_or(u64::MAX),
        acknowledged: 0,
        longest_gap_ms: 0.0,
        queues: Vec::new(),
        gaps: Vec::new(),
        errors: Failures::default(),
    };
    for log in logs {
        let longest_gap_ms = in_ms(log.longest);
        report.acknowledged += log.acknowledged;
        report.longest_gap_ms = report.longest_gap_ms.max(longest_gap_ms);
        report.gaps.extend(log.gaps);
        report.errors.add(&log.errors);
        report.queues.push(QueueGap {
            queue: log.queue,
            acknowledged: log.acknowledged,
            longest_gap_ms,
        });
    }
    report.gaps.sort_by_key(|gap| gap.since_ms);
    report
}

impl GapReport {
    pub fn print(&self, out: Output) -> Result<(), CliError> {
        let mut queues = self.queues.clone();
        queues.sort_by(|a, b| b.longest_gap_ms.total_cmp(&a.longest_gap_ms));
        let mut table = Table::new(&["QUEUE", "ACKNOWLEDGED", "LONGEST GAP MS"]);
        for queue in queues.iter().take(10) {
            table.row(vec![
                queue.queue.to_string(),
                queue.acknowledged.to_string(),
                queue.longest_gap_ms.to_string(),
            ]);
        }
        out.table(&table)?;
        if queues.len() > 10 {
            out.line(&format!(
                "… and {} queues with shorter gaps",
                queues.len() - 10
            ))?;
        }
        out.line(&format!(
            "longest gap between two acknowledgements {} ms; {} acknowledged; failed tries: {}",
            self.longest_gap_ms,
            self.acknowledged,
            self.errors.describe(),
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_time_without_an_acknowledgement_counts_to_the_end() {
        let mut log = AckLog::new(0, Duration::from_millis(50));
        let start = log.last;
        let at = |ms| start + Duration::from_millis(ms);
        for ms in [10, 20, 120, 130] {
            log.acknowledged(at(ms));
        }
        log.finish(at(430));
        let report = report(vec![log], Duration::from_millis(430));
        assert_eq!(report.longest_gap_ms, 300.0);
        assert_eq!(report.acknowledged, 4);
        let gaps: Vec<_> = report
            .gaps
            .iter()
            .map(|gap| (gap.gap_ms, gap.ended))
            .collect();
        assert_eq!(gaps, [(100.0, true), (300.0, false)]);
    }
}
