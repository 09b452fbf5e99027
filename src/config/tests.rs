use clap::Parser;

use super::*;

#[derive(Debug, Parser)]
struct Cli {
    #[command(flatten)]
    args: ServerArgs,
}

fn flags(flags: &[&str]) -> ServerArgs {
    Cli::try_parse_from(std::iter::once("quorate").chain(flags.iter().copied()))
        .unwrap()
        .args
}

fn file(text: &str) -> (tempfile::NamedTempFile, String) {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), text).unwrap();
    let path = file.path().to_str().unwrap().to_owned();
    (file, path)
}

const THREE: &str = r#"
node_id = 2
data_dir = "/tmp/q2"
[cluster]
nodes = [
  { id = 1, peer = "10.0.0.1:7081", url = "http://10.0.0.1:8081" },
  { id = 2, peer = "10.0.0.2:7081", url = "http://10.0.0.2:8081" },
  { id = 3, peer = "10.0.0.3:7081", url = "http://10.0.0.3:8081" },
]
[http]
listen = "0.0.0.0:8081"
max_connections = 7
[raft]
lease_ms = 900
"#;

#[test]
fn flags_beat_the_file_and_the_file_beats_defaults() {
    let (_keep, path) = file(THREE);
    let config = ServerConfig::load(flags(&[
        "--config",
        &path,
        "--http-max-connections=9",
        "--node-id=3",
    ]))
    .unwrap();
    assert_eq!(config.http.max_connections, 9);
    assert_eq!(config.node_id, 3);
    assert_eq!(config.raft.lease_ms, 900);
    assert_eq!(config.http.listen, "0.0.0.0:8081".parse().unwrap());
    assert_eq!(
        config.raft.ping_interval_ms,
        RaftConfig::default().ping_interval_ms
    );
    assert_eq!(config.http.advertise, "http://10.0.0.3:8081");
    assert_eq!(config.default_replicas(), 3);
}

#[test]
fn every_key_has_a_flag_and_an_environment_variable() {
    let command = <Cli as clap::CommandFactory>::command();
    for row in ServerConfig::key_docs() {
        let arg = command
            .get_arguments()
            .find(|arg| arg.get_long() == row.flag.strip_prefix("--"))
            .unwrap_or_else(|| panic!("{} has no flag {}", row.key, row.flag));
        assert_eq!(
            arg.get_env().and_then(|env| env.to_str()),
            Some(row.env),
            "{}",
            row.key
        );
        let expected = row.key.replace(['.', '_'], "-");
        assert_eq!(row.flag, format!("--{expected}"));
        assert_eq!(
            row.env,
            format!("QUORATE_{}", expected.replace('-', "_").to_uppercase())
        );
        assert!(!row.doc.is_empty());
    }
    // And the other way round: no flag outside the reference, but --config.
    let documented: Vec<_> = ServerConfig::key_docs()
        .iter()
        .map(|row| row.flag)
        .collect();
    for arg in command.get_arguments() {
        let long = format!("--{}", arg.get_long().unwrap());
        assert!(
            long == "--config" || documented.contains(&long.as_str()),
            "{long}"
        );
    }
}

#[test]
fn the_environment_is_read_and_loses_to_flags() {
    // The environment of a process is global; clap reads it in a child process instead of here.
    let exe = std::env::current_exe().unwrap();
    let output = std::process::Command::new(exe)
        .args([
            "--exact",
            "config::tests::child_prints_its_connections",
            "--nocapture",
            "--ignored",
        ])
        .env("QUORATE_HTTP_MAX_CONNECTIONS", "11")
        .env("QUORATE_DEV", "true")
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(
        text.contains("connections from the environment: 11"),
        "{text}"
    );
    assert!(text.contains("connections from the flag: 12"), "{text}");
}

#[test]
#[ignore = "run by the_environment_is_read_and_loses_to_flags with an environment of its own"]
fn child_prints_its_connections() {
    let config = ServerConfig::load(flags(&[])).unwrap();
    println!(
        "connections from the environment: {}",
        config.http.max_connections
    );
    let config = ServerConfig::load(flags(&["--http-max-connections", "12"])).unwrap();
    println!("connections from the flag: {}", config.http.max_connections);
}

#[test]
fn unknown_keys_are_named() {
    for (text, named) in [
        ("nonsense = 1\n", "nonsense"),
        ("[http]\nlissen = \"1\"\n", "lissen"),
        (
            "[cluster]\nnodes = [{ id = 1, peer = \"a:1\", url = \"http://a\", zone = 3 }]\n",
            "zone",
        ),
    ] {
        let (_keep, path) = file(text);
        let error = ServerConfig::load(flags(&["--dev", "--config", &path])).unwrap_err();
        assert!(error.to_string().contains(named), "{error}");
    }
}

#[test]
fn dev_needs_nothing() {
    let config = ServerConfig::load(flags(&["--dev"])).unwrap();
    assert_eq!(config.node_id, 1);
    assert_eq!(config.default_replicas(), 1);
    assert_eq!(config.data_dir, PathBuf::from(DEV_DATA_DIR));
    // Several on one machine: nobody connects to any of them.
    assert_eq!(config.peer.listen.port(), 0);
    let given = ["--dev", "--peer-listen", "127.0.0.1:7099"];
    let given = ServerConfig::load(flags(&given)).unwrap();
    assert_eq!(given.peer.listen.port(), 7099);
    ServerConfig::dev(Path::new("/tmp/x")).validate().unwrap();
}

#[test]
fn what_is_missing_is_said_with_the_remedy() {
    let error = ServerConfig::load(flags(&[])).unwrap_err().to_string();
    assert!(
        error.contains("--node-id") && error.contains("--dev"),
        "{error}"
    );
    let error = ServerConfig::load(flags(&["--node-id=1", "--data-dir=/tmp/x"]))
        .unwrap_err()
        .to_string();
    assert!(error.contains("cluster.nodes is empty"), "{error}");
}

#[test]
fn nodes_as_text() {
    let text = "1,a:1,http://a;2,b:2,http://b";
    let nodes: NodeList = text.parse().unwrap();
    assert_eq!(nodes.0.len(), 2);
    assert_eq!(nodes.to_string(), text);
    assert!("1,a:1".parse::<NodeList>().unwrap_err().contains("URL"));
    assert!(
        "x,a:1,http://a"
            .parse::<NodeList>()
            .unwrap_err()
            .contains("whole number")
    );
}

type Breakage = fn(&mut ServerConfig);

#[test]
fn each_broken_relation_is_refused_with_its_keys() {
    let broken: &[(&str, Breakage)] = &[
        ("node_id 9 is not in", |c| c.node_id = 9),
        ("begin at 1", |c| c.node_id = 0),
        ("twice", |c| {
            c.cluster.nodes.0.push(c.cluster.nodes.0[0].clone())
        }),
        ("HOST:PORT", |c| {
            c.cluster.nodes.0[0].peer = "nowhere".to_owned()
        }),
        ("is not a URL", |c| {
            c.cluster.nodes.0[0].url = "10.0.0.1:80".to_owned()
        }),
        ("http.advertise", |c| {
            c.http.advertise = "http://".to_owned()
        }),
        ("cluster.name", |c| c.cluster.name = "a b".to_owned()),
        ("cluster.coordinators", |c| c.cluster.coordinators = 0),
        ("http.max_request_bytes", |c| {
            c.http.max_inflight_bytes = 2 << 20
        }),
        ("limits.max_message_bytes", |c| {
            c.limits.max_message_bytes = 64 << 20
        }),
        ("http.max_request_bytes", |c| {
            c.http.max_request_bytes = 64 << 20
        }),
        ("http.max_connections", |c| c.http.max_connections = 0),
        ("http.header_timeout_ms", |c| c.http.header_timeout_ms = 0),
        ("log.segment_bytes", |c| c.log.segment_bytes = 2 << 20),
        ("log.queue_bytes", |c| c.log.queue_bytes = 1),
        ("raft.lease_ms", |c| c.raft.lease_ms = 1),
        ("raft.silence_timeout_ms", |c| {
            c.raft.silence_timeout_ms = 200
        }),
        ("telemetry.filter", |c| {
            c.telemetry.filter = "quorate=loud=much".to_owned()
        }),
    ];
    for (named, breakage) in broken {
        let mut config = ServerConfig::dev(Path::new("/tmp/x"));
        breakage(&mut config);
        let error = config.validate().expect_err(named).to_string();
        assert!(error.contains(named), "{named}: {error}");
    }
}
