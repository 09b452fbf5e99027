//! Requests as files of a corpus, and the sending of what was made of them.
//!
//! A file is a request without framing: method and target, header lines, an empty line, a body.
//! What would only make the two sides disagree about where the body ends is left out here;
//! `tests/http_server.rs` is about that.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use serde_json::Value;

/// Headers that frame a message, or turn the connection into another thing.
const FRAMING: [&[u8]; 6] = [
    b"content-length",
    b"transfer-encoding",
    b"connection",
    b"expect",
    b"upgrade",
    b"host",
];
const METHODS: [&[u8]; 6] = [b"GET", b"HEAD", b"POST", b"PUT", b"PATCH", b"DELETE"];
/// No request needs longer, even on a busy machine.
const PATIENCE: Duration = Duration::from_secs(60);
/// What a request that asked to wait gets, or an open stream.
const PATIENCE_TO_WAIT: Duration = Duration::from_millis(200);

#[derive(Debug)]
pub struct Request {
    pub method: Vec<u8>,
    pub target: Vec<u8>,
    headers: Vec<Vec<u8>>,
    pub body: Vec<u8>,
}

#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    pub content_type: String,
    pub body: Vec<u8>,
}

impl Answer {
    pub fn json(&self) -> Option<Value> {
        serde_json::from_slice(&self.body).ok()
    }
}

/// The bytes up to `separator`, and those behind it.
fn cut<'a>(bytes: &'a [u8], separator: &[u8]) -> (&'a [u8], &'a [u8]) {
    let at = bytes.windows(separator.len()).position(|w| w == separator);
    match at {
        Some(at) => (&bytes[..at], &bytes[at + separator.len()..]),
        None => (bytes, b""),
    }
}

fn is_of_a_target(byte: &u8) -> bool {
    byte.is_ascii_alphanumeric() || b"-._~!$&'()*+,;=:@/?%".contains(byte)
}

fn is_header(line: &[u8]) -> bool {
    let (name, value) = cut(line, b":");
    let token = |byte: &u8| byte.is_ascii_alphanumeric() || *byte == b'-';
    let text = |byte: &u8| byte.is_ascii_graphic() || *byte == b' ';
    line.contains(&b':') && !name.is_empty() && name.iter().all(token) && value.iter().all(text)
}

impl Request {
    pub fn parse(bytes: &[u8]) -> Self {
        let (head, body) = cut(bytes, b"\n\n");
        let (first, headers) = cut(head, b"\n");
        let (method, target) = cut(first, b" ");
        let framing = |line: &[u8]| {
            let name = cut(line, b":").0.to_ascii_lowercase();
            FRAMING.contains(&name.trim_ascii())
        };
        let lines = headers.split(|byte| *byte == b'\n');
        let lines = lines.filter(|line| !line.is_empty() && !framing(line));
        Self {
            method: method.to_vec(),
            target: target.to_vec(),
            headers: lines.map(<[u8]>::to_vec).collect(),
            body: body.to_vec(),
        }
    }

    /// Makes sound HTTP of it, so that what stands in it reaches the API.
    pub fn repair_head(&mut self) {
        if !METHODS.contains(&&self.method[..]) {
            self.method = b"POST".to_vec();
        }
        if !self.target.starts_with(b"/") {
            self.target.insert(0, b'/');
        }
        let escaped = self.target.iter().map(|byte| match is_of_a_target(byte) {
            true => char::from(*byte).to_string(),
            false => format!("%{byte:02x}"),
        });
        self.target = escaped.collect::<String>().into_bytes();
        self.headers.retain(|line| is_header(line));
    }

    /// Whether this is sound HTTP, so that the API and not the layer below it has to answer.
    pub fn is_sound(&self) -> bool {
        let method = !self.method.is_empty() && self.method.iter().all(u8::is_ascii_uppercase);
        method
            && self.method != b"CONNECT"
            && self.target.starts_with(b"/")
            && self.target.iter().all(is_of_a_target)
            && self.headers.iter().all(|line| is_header(line))
    }

    /// Whether no answer, or only the beginning of one, is an answer too.
    fn may_wait(&self) -> bool {
        let everything = [&self.target[..], &self.headers.concat(), &self.body].concat();
        let says = |word: &[u8]| everything.windows(word.len()).any(|w| w == word);
        says(b"wait") || says(b"event")
    }

    /// The answer; none if the server closed the connection without one, or goes on waiting.
    pub fn send(&self, address: &str) -> Option<Answer> {
        let mut stream = TcpStream::connect(address).expect("the node listens");
        let patience = if self.may_wait() {
            PATIENCE_TO_WAIT
        } else {
            PATIENCE
        };
        stream.set_read_timeout(Some(patience)).expect("a timeout");
        let mut bytes = [&self.method[..], b" ", &self.target, b" HTTP/1.1\r\n"].concat();
        bytes.extend_from_slice(b"host: localhost\r\nconnection: close\r\n");
        for line in &self.headers {
            bytes.extend_from_slice(line);
            bytes.extend_from_slice(b"\r\n");
        }
        let length = self.body.len();
        bytes.extend_from_slice(format!("content-length: {length}\r\n\r\n").as_bytes());
        bytes.extend_from_slice(&self.body);
        // The server may have refused the head already.
        let _ = stream.write_all(&bytes);
        let mut answer = Vec::new();
        let read = stream.read_to_end(&mut answer);
        if let Err(error) = &read
            && matches!(error.kind(), std::io::ErrorKind::WouldBlock)
        {
            assert!(self.may_wait(), "no answer to {self:?}");
        }
        parse_answer(&answer)
    }
}

fn parse_answer(bytes: &[u8]) -> Option<Answer> {
    let (head, body) = cut(bytes, b"\r\n\r\n");
    let head = String::from_utf8_lossy(head).to_ascii_lowercase();
    let mut lines = head.split("\r\n");
    let status = lines.next()?.split(' ').nth(1)?.parse().ok()?;
    let header = |name: &str| {
        let line = head.split("\r\n").find_map(|line| line.strip_prefix(name));
        line.map(str::trim).unwrap_or_default().to_owned()
    };
    let content_type = header("content-type:");
    Some(Answer {
        status,
        content_type,
        body: body.to_vec(),
    })
}
