//! What an audit found, as tables or as one JSON value.

use serde::Serialize;

use super::judge::{Finding, Totals};
use crate::cli::error::CliError;
use crate::cli::out::{Output, Table, or_dash};

#[derive(Debug, Clone, Serialize)]
pub struct QueueReport {
    pub queue: u32,
    pub from_offset: u64,
    pub end_offset: u64,
    #[serde(flatten)]
    pub totals: Totals,
}

#[derive(Debug, Serialize)]
pub struct Report {
    topic: String,
    queues: Vec<QueueReport>,
    pub findings: Vec<Finding>,
    group_findings: u64,
}

/// The report with what follows from it.
#[derive(Serialize)]
struct Whole<'a> {
    #[serde(flatten)]
    report: &'a Report,
    findings_total: u64,
}

impl QueueReport {
    fn findings(&self) -> u64 {
        let totals = &self.totals;
        totals.gaps + totals.duplicates + totals.old_epoch + totals.offset_faults
    }
}

impl Report {
    pub fn new(topic: &str) -> Self {
        Self {
            topic: topic.to_owned(),
            queues: Vec::new(),
            findings: Vec::new(),
            group_findings: 0,
        }
    }

    pub fn has(&self, queue: u32) -> bool {
        self.queues.iter().any(|report| report.queue == queue)
    }

    pub fn add(&mut self, queue: QueueReport, findings: Vec<Finding>) {
        self.queues.push(queue);
        self.findings.extend(findings);
    }

    pub fn of_group(&mut self, finding: Finding) {
        self.group_findings += 1;
        self.findings.push(finding);
    }

    /// Those that are not listed included.
    pub fn findings_total(&self) -> u64 {
        let of_queues = self.queues.iter().map(QueueReport::findings);
        of_queues.sum::<u64>() + self.group_findings
    }

    pub fn print(&self, out: Output) -> Result<(), CliError> {
        let findings_total = self.findings_total();
        if out.is_json() {
            return out.json(&Whole {
                report: self,
                findings_total,
            });
        }
        let mut table = Table::new(&[
            "QUEUE",
            "FROM",
            "END",
            "MESSAGES",
            "NUMBERED",
            "PRODUCERS",
            "MISSING",
            "DUPLICATES",
            "LATE",
            "OLD EPOCH",
            "OFFSET FAULTS",
        ]);
        for report in &self.queues {
            let totals = &report.totals;
            let numbers = [
                u64::from(report.queue),
                report.from_offset,
                report.end_offset,
                totals.messages,
                totals.numbered,
                totals.producers,
                totals.missing,
                totals.duplicates,
                totals.late,
                totals.old_epoch,
                totals.offset_faults,
            ];
            table.row(numbers.iter().map(u64::to_string).collect());
        }
        out.table(&table)?;
        if self.findings.is_empty() {
            return out.line("no findings");
        }
        let mut table = Table::new(&["QUEUE", "OFFSET", "PRODUCER", "EPOCH", "FINDING"]);
        for finding in &self.findings {
            table.row(vec![
                finding.queue.to_string(),
                finding.offset.to_string(),
                or_dash(finding.producer.as_ref()),
                or_dash(finding.epoch),
                finding.detail.clone(),
            ]);
        }
        out.line("")?;
        out.table(&table)
    }
}
