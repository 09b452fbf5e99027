//! Processes that are killed at random and come back.

use std::fs::File;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::Settings;

/// One instance of a service.
#[derive(Debug)]
pub struct Service {
    part: &'static str,
    name: String,
    arguments: Vec<String>,
    log: File,
    process: Option<Child>,
}

impl Service {
    pub fn new(
        part: &'static str,
        number: usize,
        settings: &Settings,
        until_ms: u64,
    ) -> Result<Self> {
        let name = format!("{part}-{number}");
        let log = settings.home.join(format!("{name}.log"));
        let log = File::options().create(true).append(true).open(log)?;
        let mut arguments = vec![
            part.to_owned(),
            "--home".to_owned(),
            settings.home.display().to_string(),
            "--urls".to_owned(),
            settings.urls.join(","),
        ];
        if part == "orders" {
            arguments.extend(["--until-ms".to_owned(), until_ms.to_string()]);
        }
        Ok(Self {
            part,
            name,
            arguments,
            log,
            process: None,
        })
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    /// Starts it if it does not run, for whatever reason.
    pub fn ensure(&mut self) -> Result<()> {
        if let Some(process) = &mut self.process {
            match process.try_wait()? {
                None => return Ok(()),
                Some(status) => eprintln!("{} ended by itself: {status}", self.name),
            }
        }
        let process = Command::new(std::env::current_exe()?)
            .args(&self.arguments)
            .stdin(Stdio::null())
            .stdout(self.log.try_clone()?)
            .stderr(self.log.try_clone()?)
            .spawn()
            .with_context(|| format!("cannot start shop {}", self.part))?;
        self.process = Some(process);
        Ok(())
    }

    /// SIGKILL.
    pub fn kill(&mut self) {
        if let Some(mut process) = self.process.take() {
            process.kill().ok();
            process.wait().ok();
        }
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Tells the script to do something with a node.
pub fn node(script: &Path, command: &str, node: usize) -> Result<()> {
    let status = Command::new(script)
        .args([command, &node.to_string()])
        .stdout(Stdio::null())
        .status()
        .with_context(|| format!("cannot run {}", script.display()))?;
    match status.success() {
        true => Ok(()),
        false => bail!("{} {command} {node}: {status}", script.display()),
    }
}

/// A pause between the two, in milliseconds.
pub fn pause(from_ms: u64, to_ms: u64) {
    std::thread::sleep(Duration::from_millis(fastrand::u64(from_ms..to_ms)));
}
