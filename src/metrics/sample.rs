//! Values read at scrape time by closures, in a form that needs no knowledge of the encoder.

use std::fmt;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric, NoLabelSet};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;

/// One value a collector found at scrape time.
#[derive(Debug, Clone, PartialEq)]
pub enum Sample {
    Gauge(f64),
    Counter(u64),
    /// `buckets` are upper bounds with the count of each alone, the last bound being `f64::INFINITY`.
    Histogram {
        sum: f64,
        count: u64,
        buckets: Vec<(f64, u64)>,
    },
}

/// A value with its name and help, without the prefix `quorate_` and, for counters, without `_total`.
pub type NamedSample = (&'static str, &'static str, Sample);

/// A closure as a collector.
pub(super) struct Closure<F>(pub(super) F);

impl<F> fmt::Debug for Closure<F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Closure")
    }
}

impl<F: Fn() -> Vec<NamedSample> + Send + Sync + 'static> Collector for Closure<F> {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        for (name, help, sample) in (self.0)() {
            encode_sample(&mut encoder, name, help, sample)?;
        }
        Ok(())
    }
}

fn encode_sample(
    encoder: &mut DescriptorEncoder<'_>,
    name: &str,
    help: &str,
    sample: Sample,
) -> Result<(), fmt::Error> {
    match sample {
        Sample::Gauge(value) => {
            let gauge = ConstGauge::new(value);
            gauge.encode(encoder.encode_descriptor(name, help, None, gauge.metric_type())?)
        }
        Sample::Counter(value) => {
            let counter = ConstCounter::new(value);
            counter.encode(encoder.encode_descriptor(name, help, None, counter.metric_type())?)
        }
        Sample::Histogram {
            sum,
            count,
            buckets,
        } => encoder
            .encode_descriptor(name, help, None, MetricType::Histogram)?
            .encode_histogram::<NoLabelSet>(sum, count, &buckets, None),
    }
}

pub(super) fn process_memory() -> Vec<NamedSample> {
    // Fields of statm are in pages: total, resident, …
    let resident = std::fs::read_to_string("/proc/self/statm")
        .ok()
        .and_then(|statm| statm.split_ascii_whitespace().nth(1)?.parse::<u64>().ok());
    let page = rustix::param::page_size() as u64;
    resident
        .map(|pages| {
            let bytes = (pages * page) as f64;
            (
                "process_resident_memory_bytes",
                "Memory of this process in RAM",
                Sample::Gauge(bytes),
            )
        })
        .into_iter()
        .collect()
}
