//! The run's own nodes: child processes of this executable, on loopback, with data of their own.
//!
//! Invariant: no child outlives the [`Cluster`] that started it, however the run ends.

use std::fs::{self, File};
use std::io::{self, BufRead, BufReader};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use quorate_raft::link::ReservedPort;
use rustix::process::{Pid, Signal, kill_process};
use tokio::time::{Instant, sleep};

use super::super::super::client::{Client, Request};
use super::super::super::error::CliError;
use super::plan::Plan;

/// How long a node may take to start or to end.
pub const PATIENCE: Duration = Duration::from_secs(60);
const LOOK_AGAIN: Duration = Duration::from_millis(25);
const READY_TIMEOUT: Duration = Duration::from_secs(2);
/// The environment beats a node's file. What tunes nodes may come from there, but not who they are.
const NOT_INHERITED: [&str; 8] = [
    "QUORATE_NODE_ID",
    "QUORATE_DATA_DIR",
    "QUORATE_DEV",
    "QUORATE_CLUSTER_NAME",
    "QUORATE_CLUSTER_NODES",
    "QUORATE_HTTP_LISTEN",
    "QUORATE_HTTP_ADVERTISE",
    "QUORATE_PEER_LISTEN",
];
/// Bytes at the end of a log that are left as they are when it is damaged.
const DAMAGE_BEFORE_END: u64 = 64 << 10;
const SEGMENT_HEADER: u64 = 64;
/// How long filling a node again may take.
const FILL_PATIENCE: Duration = Duration::from_secs(120);
/// Lines of a failed node's log that are shown.
const LAST_LINES: usize = 12;

#[derive(Debug)]
pub struct Cluster {
    pub nodes: Vec<Node>,
    home: Home,
    _ports: Vec<Ports>,
}

/// One process with its ports and its data. Dropping it kills the process.
#[derive(Debug)]
pub struct Node {
    pub id: u64,
    pub url: String,
    home: PathBuf,
    process: Option<Child>,
}

/// The directory of all nodes.
#[derive(Debug)]
struct Home {
    path: PathBuf,
    remove: bool,
}

impl Drop for Home {
    fn drop(&mut self) {
        if self.remove {
            // What can't be removed stays in the temporary directory.
            let _ = fs::remove_dir_all(&self.path);
        }
    }
}

/// Where one node listens.
#[derive(Debug)]
pub struct Ports {
    peer: ReservedPort,
    http: ReservedPort,
}

impl Ports {
    pub fn reserve() -> io::Result<Self> {
        Ok(Self {
            peer: ReservedPort::new()?,
            http: ReservedPort::new()?,
        })
    }

    pub fn peer(&self) -> u16 {
        self.peer.port()
    }
}

impl Cluster {
    /// Writes the configurations. The nodes listen on `ports`, in the order of their ids, and look
    /// for each other where `dial(from, to)` says.
    pub fn prepare(
        plan: &Plan,
        ports: Vec<Ports>,
        dial: impl Fn(u64, u64) -> String,
    ) -> Result<Self, CliError> {
        let path = match &plan.dir {
            Some(dir) => dir.clone(),
            None => std::env::temp_dir().join(format!("quorate-verify-{}", plan.run)),
        };
        let failed = |error| CliError::io(format!("prepare {}", path.display()), error);
        fs::create_dir_all(&path).map_err(failed)?;
        if fs::read_dir(&path).map_err(failed)?.next().is_some() {
            let path = path.display();
            return Err(CliError::Usage(format!("{path} is not empty")));
        }
        let mut nodes = Vec::new();
        for (id, own) in (1..).zip(&ports) {
            let home = path.join(format!("node-{id}"));
            fs::create_dir(&home).map_err(failed)?;
            let text = configuration(id, &home.join("data"), &ports, &dial);
            fs::write(home.join("quorate.toml"), text).map_err(failed)?;
            nodes.push(Node {
                id,
                url: format!("http://127.0.0.1:{}", own.http.port()),
                home,
                process: None,
            });
        }
        let home = Home {
            path,
            remove: false,
        };
        Ok(Self {
            nodes,
            home,
            _ports: ports,
        })
    }

    pub fn start_all(&mut self) -> Result<(), CliError> {
        self.nodes.iter_mut().try_for_each(Node::start)
    }

    /// Starts those that do not run.
    pub fn start_ended(&mut self) -> Result<(), CliError> {
        for node in &mut self.nodes {
            if node.process.is_none() || node.has_ended().is_some() {
                node.start()?;
            }
        }
        Ok(())
    }

    pub fn node(&mut self, id: u64) -> &mut Node {
        // Ids are those of the plan, from 1.
        &mut self.nodes[id as usize - 1]
    }

    pub fn home(&self) -> &Path {
        &self.home.path
    }

    /// The data is of no more use.
    pub fn remove_at_end(&mut self) {
        self.home.remove = true;
    }

    /// Waits until every node says that it is ready.
    pub async fn wait_ready(&mut self, client: &Client) -> Result<(), CliError> {
        for node in &mut self.nodes {
            node.wait_ready(client).await?;
        }
        Ok(())
    }

    /// Waits until no node has a damaged replica that is not filled again.
    pub async fn wait_filled(&self, client: &Client) -> Result<(), CliError> {
        let deadline = Instant::now() + FILL_PATIENCE;
        for node in &self.nodes {
            let asked = client.only(&node.url)?;
            // Damage that nobody has met yet would meet with the next.
            while !has_scrubbed(&asked).await && Instant::now() <= deadline {
                sleep(LOOK_AGAIN).await;
            }
            loop {
                let request = Request::get(&["v1", "cluster"]).timeout(READY_TIMEOUT);
                let cluster = asked
                    .read::<super::super::super::wire::Cluster>(request)
                    .await;
                match cluster {
                    Ok(cluster) if cluster.nodes.iter().all(|n| n.quarantined == 0) => break,
                    answer if Instant::now() > deadline => {
                        return Err(CliError::Failed(format!(
                            "damaged replicas were not filled again after {FILL_PATIENCE:?}: {answer:?}"
                        )));
                    }
                    _ => sleep(LOOK_AGAIN).await,
                }
            }
        }
        Ok(())
    }

    /// Nodes that have ended although nobody told them to, and what they said last.
    pub fn failures(&mut self) -> Vec<String> {
        self.nodes
            .iter_mut()
            .filter_map(|node| Some((node.has_ended()?, node)))
            .map(|(status, node)| {
                format!("node {} ended: {status}\n{}", node.id, node.last_lines())
            })
            .collect()
    }

    /// Lines of the nodes' logs that tell of a panic: some tasks end without the node.
    pub fn panics(&self) -> Vec<String> {
        let mut found = Vec::new();
        for node in &self.nodes {
            let Ok(log) = File::open(node.home.join("log")) else {
                continue;
            };
            let lines = BufReader::new(log).lines().map_while(Result::ok);
            let lines = lines.filter(|line| line.contains("panicked at"));
            found.extend(lines.map(|line| format!("node {}: {line}", node.id)));
        }
        found
    }
}

fn configuration(
    id: u64,
    data: &Path,
    ports: &[Ports],
    dial: &impl Fn(u64, u64) -> String,
) -> String {
    let mut text = format!("node_id = {id}\ndata_dir = {data:?}\n\n");
    text.push_str("[cluster]\nname = \"verify\"\nnodes = [\n");
    for (other, at) in (1..).zip(ports) {
        let peer = match other == id {
            true => format!("127.0.0.1:{}", at.peer.port()),
            false => dial(id, other),
        };
        let http = at.http.port();
        text.push_str(&format!(
            "  {{ id = {other}, peer = \"{peer}\", url = \"http://127.0.0.1:{http}\" }},\n"
        ));
    }
    let own = &ports[id as usize - 1];
    let (peer, http) = (own.peer.port(), own.http.port());
    // Small segments and checkpoints soon: more of their edges in the same time.
    text.push_str(&format!(
        "]\n\n[http]\nlisten = \"127.0.0.1:{http}\"\nmax_request_bytes = 1048576\n\n[peer]\nlisten = \"127.0.0.1:{peer}\"\n\n\
         [log]\nsegment_bytes = 4194304\nreserve_bytes = 67108864\n\n\
         [limits]\nmax_message_bytes = 65536\n\n[raft]\ncheckpoint_every = 500\n"
    ));
    text
}

impl Node {
    pub fn start(&mut self) -> Result<(), CliError> {
        let failed = |error| CliError::io("start a node", error);
        let log = File::options()
            .create(true)
            .append(true)
            .open(self.home.join("log"))
            .map_err(failed)?;
        let program = std::env::current_exe().map_err(failed)?;
        let mut command = Command::new(program);
        for name in NOT_INHERITED {
            command.env_remove(name);
        }
        let process = command
            .args(["server", "--config"])
            .arg(self.home.join("quorate.toml"))
            .stdin(Stdio::null())
            .stdout(log.try_clone().map_err(failed)?)
            .stderr(log)
            // Ctrl-C of a terminal is the run's to handle, not the nodes'.
            .process_group(0)
            .spawn()
            .map_err(failed)?;
        self.process = Some(process);
        Ok(())
    }

    fn signal(&self, signal: Signal) -> Result<(), CliError> {
        let Some(process) = &self.process else {
            return Ok(());
        };
        // A child that was not waited for keeps its id: nobody else is meant.
        let pid = i32::try_from(process.id()).ok().and_then(Pid::from_raw);
        let sent = pid.map_or(Ok(()), |pid| kill_process(pid, signal));
        sent.map_err(|error| CliError::io(format!("signal node {}", self.id), error.into()))
    }

    /// SIGKILL.
    pub fn kill(&mut self) {
        if let Some(mut process) = self.process.take() {
            let _ = process.kill();
            let _ = process.wait();
        }
    }

    pub fn pause(&self) -> Result<(), CliError> {
        self.signal(Signal::STOP)
    }

    pub fn resume(&self) -> Result<(), CliError> {
        self.signal(Signal::CONT)
    }

    /// SIGTERM, and waits for the end. Says what was wrong with it, if anything was.
    pub async fn terminate(&mut self) -> Result<Option<String>, CliError> {
        self.signal(Signal::TERM)?;
        let deadline = Instant::now() + PATIENCE;
        while Instant::now() < deadline {
            if let Some(status) = self.has_ended() {
                self.process = None;
                let clean = status.success();
                return Ok((!clean).then(|| format!("ended with {status} after SIGTERM")));
            }
            sleep(LOOK_AGAIN).await;
        }
        self.kill();
        Ok(Some(format!("did not end within {PATIENCE:?} of SIGTERM")))
    }

    fn has_ended(&mut self) -> Option<ExitStatus> {
        self.process.as_mut()?.try_wait().ok().flatten()
    }

    /// Waits until the node says that it is ready.
    pub async fn wait_ready(&mut self, client: &Client) -> Result<(), CliError> {
        let node = client.only(&self.url)?;
        let deadline = Instant::now() + PATIENCE;
        loop {
            let ready = Request::get(&["health", "ready"]).timeout(READY_TIMEOUT);
            let Err(error) = node.call(ready).await else {
                return Ok(());
            };
            if let Some(status) = self.has_ended() {
                let (id, lines) = (self.id, self.last_lines());
                return Err(CliError::Failed(format!(
                    "node {id} ended: {status}\n{lines}"
                )));
            }
            if Instant::now() > deadline {
                let (id, lines) = (self.id, self.last_lines());
                return Err(CliError::Failed(format!(
                    "node {id} was not ready after {PATIENCE:?}: {error}\n{lines}"
                )));
            }
            sleep(LOOK_AGAIN).await;
        }
    }

    /// Turns bits over in a stopped node's log, in what was written well before its end: the very
    /// end of a log may always be a write that was cut short. None if there is too little of it.
    pub fn damage_log(&self, permille: u16) -> Result<Option<String>, CliError> {
        let dir = self.home.join("data").join("log");
        let failed = |error| CliError::io(format!("damage {}", dir.display()), error);
        let mut segments = Vec::new();
        for entry in fs::read_dir(&dir).map_err(failed)? {
            let path = entry.map_err(failed)?.path();
            if path.extension().is_some_and(|ending| ending == "log") {
                segments.push(path);
            }
        }
        segments.sort();
        let mut written = Vec::new();
        for path in segments {
            let bytes = fs::read(&path).map_err(failed)?;
            let end = bytes.iter().rposition(|byte| *byte != 0).unwrap_or(0) + 1;
            written.push((path, bytes, end as u64));
        }
        let total: u64 = written.iter().map(|(.., end)| end).sum();
        let mut place = total.saturating_sub(DAMAGE_BEFORE_END) * u64::from(permille) / 1000;
        for (path, mut bytes, end) in written {
            if place >= end {
                place -= end;
                continue;
            }
            // Behind the segment's header, so that it is a frame that is hit.
            let at = place.max(SEGMENT_HEADER) as usize;
            let Some(byte) = bytes.get_mut(at).filter(|_| total > DAMAGE_BEFORE_END) else {
                return Ok(None);
            };
            *byte ^= 0x55;
            fs::write(&path, bytes).map_err(failed)?;
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            return Ok(Some(format!("byte {at} of {name}")));
        }
        Ok(None)
    }

    fn last_lines(&self) -> String {
        let text = fs::read(self.home.join("log")).unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(LAST_LINES)..].join("\n")
    }
}

/// Whether a node has read its whole log since it began.
async fn has_scrubbed(node: &Client) -> bool {
    let request = Request::get(&["metrics"]).timeout(READY_TIMEOUT);
    let Ok(answer) = node.send(request).await else {
        return false;
    };
    let text = answer.text().await.unwrap_or_default();
    let passes = text
        .lines()
        .find_map(|line| line.strip_prefix("quorate_log_scrubs_total "));
    passes.is_some_and(|passes| passes != "0")
}

impl Drop for Node {
    fn drop(&mut self) {
        self.kill();
    }
}
