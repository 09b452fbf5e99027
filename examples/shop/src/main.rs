//! The shop: orders in one service's database, points in another's, and between them a topic.
//!
//! `shop orders` and `shop points` are the services, `shop drive` starts them, kills them and the
//! cluster's nodes for a while, and then proves that the books agree. README.md tells the story.
#![forbid(unsafe_code)]

mod api;
mod chaos;
mod drive;
mod orders;
mod points;
mod prove;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail};

pub const TOPIC: &str = "shop-orders";
pub const PRODUCER_GROUP: &str = "shop-orders-svc";
pub const CONSUMER_GROUP: &str = "shop-points-svc";

const USAGE: &str = "\
usage: shop orders --home DIR --urls URL,URL… --until-ms UNIX_MS
       shop points --home DIR --urls URL,URL…
       shop drive  --home DIR --urls URL,URL… --seconds N [--cluster scripts/cluster.sh]";

/// What every part of the shop is told.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Databases and logs.
    pub home: PathBuf,
    pub urls: Vec<String>,
    /// Orders are taken until then; what is open is settled for ever.
    pub until_ms: u64,
    pub seconds: u64,
    /// The script that kills and restarts nodes; without it only services are killed.
    pub cluster: Option<PathBuf>,
}

impl Settings {
    fn parse(mut arguments: impl Iterator<Item = String>) -> Result<Self> {
        let mut settings = Self {
            home: PathBuf::from("shop-data"),
            urls: (1..=3)
                .map(|n| format!("http://127.0.0.1:808{n}"))
                .collect(),
            until_ms: u64::MAX,
            seconds: 60,
            cluster: None,
        };
        while let Some(name) = arguments.next() {
            let value = arguments
                .next()
                .with_context(|| format!("{name} needs a value"))?;
            match name.as_str() {
                "--home" => settings.home = value.into(),
                "--urls" => settings.urls = value.split(',').map(str::to_owned).collect(),
                "--until-ms" => settings.until_ms = value.parse()?,
                "--seconds" => settings.seconds = value.parse()?,
                "--cluster" => settings.cluster = Some(value.into()),
                _ => bail!("{name} is not known\n{USAGE}"),
            }
        }
        Ok(settings)
    }
}

pub fn now_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |since: Duration| since.as_millis() as u64)
}

fn main() -> ExitCode {
    match run() {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("shop: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Whether what was to be proved is proved.
fn run() -> Result<bool> {
    let mut arguments = std::env::args().skip(1);
    let part = arguments.next().context(USAGE)?;
    let settings = Settings::parse(arguments)?;
    std::fs::create_dir_all(&settings.home)?;
    match part.as_str() {
        "orders" => orders::run(&settings).map(|()| true),
        "points" => points::run(&settings).map(|()| true),
        "drive" => drive::run(&settings),
        _ => bail!("{USAGE}"),
    }
}
