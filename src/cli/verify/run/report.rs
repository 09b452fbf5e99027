//! What a run has shown, for people and for machines.

use serde::Serialize;

use super::super::super::error::CliError;
use super::super::super::out::Output;
use super::faults::Done;
use super::findings::{Kind, Violation};
use super::history::{Consumed, History};
use super::judge::{Totals, longest_gap};
use super::model::Shown;
use super::plan::Plan;
use super::proxy::Frames;

#[derive(Debug, Serialize)]
pub struct Report {
    seed: u64,
    nodes: u64,
    faulty: u64,
    topics: u32,
    queues: u32,
    rate: u64,
    duration_ms: u128,
    faults: Done,
    frames: Frames,
    #[serde(flatten)]
    totals: Totals,
    model: Shown,
    consumed: Consumed,
    committed_offsets: u64,
    resumed_from_committed: u64,
    longest_unavailable: Option<Gap>,
    violations: u64,
    /// The first ones of each kind.
    found: Vec<Violation>,
    reproduce: String,
    /// Where the nodes' data and logs are kept.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kept: Option<String>,
}

#[derive(Debug, Serialize)]
struct Gap {
    queue: String,
    from: String,
    ms: u64,
}

impl Report {
    /// Adds what the run as a whole failed to show.
    pub fn new(
        plan: &Plan,
        history: &mut History,
        (totals, model): (Totals, Shown),
        faults: (Done, Frames),
        command: String,
    ) -> Self {
        let consumed = history.consumed;
        let nothing = [
            (totals.acked, "nothing was acknowledged"),
            (totals.stored, "nothing is stored"),
            (consumed.pull, "the reader saw nothing"),
            (consumed.group, "the consumer group saw nothing"),
            (consumed.stream, "the live streams showed nothing"),
            (consumed.stale, "the replicas showed nothing"),
            (history.commits, "no consumer offset was committed"),
        ];
        for (count, text) in nothing {
            if count == 0 {
                history.findings.say(Kind::ProvesNothing, text);
            }
        }
        let gap = longest_gap(history);
        Self {
            seed: plan.seed,
            nodes: plan.nodes,
            faulty: plan.faulty,
            topics: plan.topics,
            queues: plan.queues,
            rate: plan.rate,
            duration_ms: plan.duration.as_millis(),
            faults: faults.0,
            frames: faults.1,
            totals,
            model,
            consumed,
            committed_offsets: history.commits,
            resumed_from_committed: history.resumed,
            longest_unavailable: gap.map(|(queue, from, ms)| Gap { queue, from, ms }),
            violations: history.findings.total(),
            found: history.findings.listed.clone(),
            reproduce: command,
            kept: None,
        }
    }

    pub fn is_clean(&self) -> bool {
        self.violations == 0
    }

    pub fn print(&self, out: Output) -> Result<(), CliError> {
        if out.is_json() {
            return out.json(self);
        }
        for line in self.lines() {
            out.line(&line)?;
        }
        Ok(())
    }

    fn lines(&self) -> Vec<String> {
        let mut lines = Vec::new();
        for violation in &self.found {
            let queue = violation.queue.as_deref().unwrap_or("the run");
            let (kind, what) = (violation.kind, &violation.what);
            lines.push(format!("VIOLATION {kind:?}, {queue}: {what}"));
            let history = violation.history.iter();
            lines.extend(history.map(|line| format!("    {}", line.replace('\n', "\n    "))));
        }
        let kinds = &self.faults.kinds;
        let kinds = kinds.iter().map(|(k, n)| format!("{} {n}", k.name()));
        let shapes = &self.faults.shapes;
        let shapes = shapes.iter().map(|(k, n)| format!("{k} {n}"));
        let (frames, totals, consumed) = (&self.frames, &self.totals, &self.consumed);
        lines.push(format!("seed {}", self.seed));
        lines.push(format!("faults: {}", or_none(kinds.collect())));
        lines.push(format!("partitions: {}", or_none(shapes.collect())));
        lines.push(format!(
            "frames between nodes: {} passed, {} held, {} delayed, {} repeated, {} swapped; {} connections closed",
            frames.passed,
            frames.held,
            frames.delayed,
            frames.duplicated,
            frames.reordered,
            frames.connections_closed
        ));
        lines.push(format!(
            "messages: {} acknowledged, {} unknown ({} of them stored), {} refused, {} stored",
            totals.acked, totals.unknown, totals.unknown_stored, totals.refused, totals.stored
        ));
        lines.push(format!(
            "consumed: {} by fetch, {} by a group ({} commits, {} resumes), {} by streams, {} from single replicas",
            consumed.pull,
            consumed.group,
            self.committed_offsets,
            self.resumed_from_committed,
            consumed.stream,
            consumed.stale
        ));
        lines.extend(self.model.lines());
        if let Some(gap) = &self.longest_unavailable {
            let (ms, queue, from) = (gap.ms, &gap.queue, &gap.from);
            lines.push(format!(
                "longest time without an acknowledgement: {ms} ms, {queue} from {from}"
            ));
        }
        if let Some(kept) = &self.kept {
            lines.push(format!("data and logs of the nodes: {kept}"));
        }
        lines.push(format!("again: {}", self.reproduce));
        lines.push(format!(
            "{} acknowledged messages lost, {} violations",
            totals.lost, self.violations
        ));
        lines
    }
}

fn or_none(parts: Vec<String>) -> String {
    match parts.is_empty() {
        true => "none".into(),
        false => parts.join(", "),
    }
}
