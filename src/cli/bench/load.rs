//! The closed loop: each worker sends its next request when the last one was answered.

use std::cell::RefCell;
use std::rc::Rc;
use std::time::Duration;

use hdrhistogram::Histogram;
use serde::Serialize;
use tokio::task::LocalSet;
use tokio::time::Instant;

use super::super::error::CliError;
use super::super::out::{Output, Table};
use super::request::Prepared;
use super::target::{Failures, Outcome, Target};

/// A minute in microseconds; slower answers count as this.
const LATENCY_US_MAX: u64 = 60_000_000;
/// After a failure, so that a dead cluster does not make the client spin.
const PAUSE_AFTER_FAILURE: Duration = Duration::from_millis(10);

#[derive(Debug)]
pub struct LoadPlan {
    /// One for each worker.
    pub requests: Vec<Prepared>,
    pub addresses: Vec<String>,
    pub messages_per_request: usize,
    pub size_bytes: usize,
    pub warmup: Duration,
    pub duration: Duration,
    pub timeout: Duration,
}

/// What one run measured. Latencies in microseconds, from sending a request to its answer.
#[derive(Debug, Serialize)]
pub struct LoadReport {
    pub duration_ms: u64,
    pub requests: u64,
    pub messages: u64,
    pub requests_per_s: f64,
    pub messages_per_s: f64,
    pub mib_per_s: f64,
    pub latency_us: Latencies,
    pub errors: Failures,
}

#[derive(Debug, Serialize)]
pub struct Latencies {
    pub mean: u64,
    pub p50: u64,
    pub p95: u64,
    pub p99: u64,
    pub p999: u64,
    pub max: u64,
}

struct Measured {
    latencies: Histogram<u64>,
    errors: Failures,
}

/// Runs all workers on this one thread. Only answers that came inside the measured time count.
pub async fn run(plan: LoadPlan) -> Result<LoadReport, CliError> {
    let latencies = Histogram::new_with_max(LATENCY_US_MAX, 3)
        .map_err(|error| CliError::Usage(format!("the histogram: {error}")))?;
    let measured = Rc::new(RefCell::new(Measured {
        latencies,
        errors: Failures::default(),
    }));
    let begin = Instant::now() + plan.warmup;
    let end = begin + plan.duration;
    let addresses: Rc<[String]> = plan.addresses.into();
    let workers = LocalSet::new();
    for (number, request) in plan.requests.into_iter().enumerate() {
        let (measured, addresses) = (Rc::clone(&measured), Rc::clone(&addresses));
        workers.spawn_local(async move {
            let target = Target::new(&addresses, number, plan.timeout);
            worker(target, &request, begin, end, &measured).await;
        });
    }
    workers.await;
    let measured = measured.borrow();
    Ok(report(
        &measured,
        plan.messages_per_request,
        plan.size_bytes,
        plan.duration,
    ))
}

async fn worker(
    mut target: Target<'_>,
    request: &Prepared,
    begin: Instant,
    end: Instant,
    measured: &RefCell<Measured>,
) {
    let mut sent = Instant::now();
    while sent < end {
        let outcome = target.send(request.bytes()).await;
        let answered = Instant::now();
        let counts = (begin..end).contains(&answered);
        match outcome {
            Outcome::Acknowledged if counts => {
                let latency_us = u64::try_from((answered - sent).as_micros()).unwrap_or(u64::MAX);
                measured
                    .borrow_mut()
                    .latencies
                    .saturating_record(latency_us);
            }
            Outcome::Acknowledged => {}
            Outcome::Failed(code) => {
                if counts {
                    measured.borrow_mut().errors.count(code);
                }
                tokio::time::sleep(PAUSE_AFTER_FAILURE).await;
            }
        }
        sent = Instant::now();
    }
}

fn report(measured: &Measured, batch: usize, size_bytes: usize, time: Duration) -> LoadReport {
    let latencies = &measured.latencies;
    let (requests, seconds) = (latencies.len(), time.as_secs_f64());
    let messages = requests * batch as u64;
    LoadReport {
        duration_ms: u64::try_from(time.as_millis()).unwrap_or(u64::MAX),
        requests,
        messages,
        requests_per_s: round(requests as f64 / seconds),
        messages_per_s: round(messages as f64 / seconds),
        mib_per_s: round(messages as f64 * size_bytes as f64 / seconds / f64::from(1 << 20)),
        latency_us: Latencies {
            mean: latencies.mean() as u64,
            p50: latencies.value_at_quantile(0.5),
            p95: latencies.value_at_quantile(0.95),
            p99: latencies.value_at_quantile(0.99),
            p999: latencies.value_at_quantile(0.999),
            max: latencies.max(),
        },
        errors: measured.errors.clone(),
    }
}

fn round(value: f64) -> f64 {
    (value * 10.0).round() / 10.0
}

impl LoadReport {
    pub fn print(&self, out: Output) -> Result<(), CliError> {
        let latency = &self.latency_us;
        let mut table = Table::new(&[
            "MESSAGES/S",
            "REQUESTS/S",
            "MIB/S",
            "P50 MS",
            "P95 MS",
            "P99 MS",
            "P99.9 MS",
            "MAX MS",
        ]);
        let mut row = vec![
            format!("{:.0}", self.messages_per_s),
            format!("{:.0}", self.requests_per_s),
            format!("{:.1}", self.mib_per_s),
        ];
        let quantiles = [
            latency.p50,
            latency.p95,
            latency.p99,
            latency.p999,
            latency.max,
        ];
        row.extend(quantiles.map(milliseconds));
        table.row(row);
        out.table(&table)?;
        out.line(&format!(
            "{} messages acknowledged in {:.1} s; errors: {}",
            self.messages,
            self.duration_ms as f64 / 1000.0,
            self.errors.describe(),
        ))
    }
}

/// `1.234`: three digits after the point, since loopback is fast.
fn milliseconds(us: u64) -> String {
    format!("{}.{:03}", us / 1000, us % 1000)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_counts_messages_and_requests() {
        let mut measured = Measured {
            latencies: Histogram::new_with_max(LATENCY_US_MAX, 3).unwrap(),
            errors: Failures::default(),
        };
        for latency in 1..=1000 {
            measured.latencies.saturating_record(latency);
        }
        let report = report(&measured, 100, 1024, Duration::from_secs(2));
        assert_eq!((report.requests, report.messages), (1000, 100_000));
        assert_eq!(report.messages_per_s, 50_000.0);
        assert_eq!((report.latency_us.p50, report.latency_us.max), (500, 1000));
        assert_eq!(milliseconds(report.latency_us.p999), "0.999");
    }
}
