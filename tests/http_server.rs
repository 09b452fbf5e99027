//! The accept loop and the body reader keep their bounds: on time, size, number and memory.
//!
//! A small application stands in for the API, so that only the layer under it is tested.

use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::Router;
use axum::extract::{Request, State};
use axum::middleware::from_fn;
use axum::response::IntoResponse;
use axum::routing::{get, post};
use quorate::config::HttpConfig;
use quorate::http::body::BodyReader;
use quorate::http::error::{ApiError, render};
use quorate::http::limits::{ByteBudget, HttpLimits};
use quorate::http::serve;
use quorate::metrics::Metrics;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Notify;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

/// Far more than anything here should take; a test that hits it has failed.
const PATIENCE: Duration = Duration::from_secs(20);

#[derive(Clone)]
struct App {
    limits: HttpLimits,
    budget: ByteBudget,
    entered: Arc<Notify>,
    release: Arc<Notify>,
}

struct Server {
    address: std::net::SocketAddr,
    app: App,
    metrics: Arc<Metrics>,
    shutdown: CancellationToken,
    task: JoinHandle<()>,
}

async fn length(State(app): State<App>, request: Request) -> Result<String, ApiError> {
    let (parts, body) = request.into_parts();
    let reader = BodyReader::new(&parts.headers, body, &app.limits)?;
    let whole = reader.read_all(&app.budget).await?;
    Ok(whole.bytes.len().to_string())
}

async fn held(State(app): State<App>) -> &'static str {
    app.entered.notify_one();
    app.release.notified().await;
    "released"
}

async fn large() -> impl IntoResponse {
    vec![b'x'; 64 << 20]
}

fn limits() -> HttpLimits {
    HttpLimits {
        max_request_bytes: 100_000,
        max_inflight_bytes: 150_000,
        ..HttpLimits::from(&HttpConfig::default())
    }
}

async fn start(limits: HttpLimits) -> Server {
    let app = App {
        budget: ByteBudget::new(limits.max_inflight_bytes),
        limits: limits.clone(),
        entered: Arc::default(),
        release: Arc::default(),
    };
    let router = Router::new()
        .route("/length", post(length))
        .route("/held", get(held))
        .route("/large", get(large))
        .layer(from_fn(render))
        .with_state(app.clone());
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (metrics, shutdown) = (Arc::new(Metrics::new()), CancellationToken::new());
    let serving = serve(
        listener,
        router,
        limits,
        Arc::clone(&metrics),
        shutdown.clone(),
    );
    Server {
        address,
        app,
        metrics,
        shutdown,
        task: tokio::spawn(serving),
    }
}

impl Server {
    async fn connect(&self) -> TcpStream {
        TcpStream::connect(self.address).await.unwrap()
    }

    async fn send(&self, text: &str) -> TcpStream {
        let mut stream = self.connect().await;
        stream.write_all(text.as_bytes()).await.unwrap();
        stream
    }
}

/// Everything until the server closes the connection.
async fn read_to_end(stream: &mut TcpStream) -> String {
    let mut all = Vec::new();
    let read = tokio::time::timeout(PATIENCE, stream.read_to_end(&mut all)).await;
    // A reset after the answer is the end, too.
    let _ = read.expect("the server keeps the connection open");
    String::from_utf8_lossy(&all).into_owned()
}

fn post_head(length: usize) -> String {
    format!(
        "POST /length HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {length}\r\n\r\n"
    )
}

#[tokio::test]
async fn a_body_within_the_limits_is_read() {
    let server = start(limits()).await;
    let body = "x".repeat(100_000);
    let mut stream = server.send(&(post_head(body.len()) + &body)).await;
    let answer = read_to_end(&mut stream).await;
    assert!(
        answer.starts_with("HTTP/1.1 200") && answer.ends_with("100000"),
        "{answer}"
    );
    assert_eq!(server.app.budget.used(), 0);
}

#[tokio::test]
async fn a_request_head_that_does_not_come_costs_the_connection() {
    let limits = HttpLimits {
        header_timeout: Duration::from_millis(200),
        ..limits()
    };
    let server = start(limits).await;
    for begun in ["", "GET /held HTTP/1.1\r\nhost: x\r\nx-slow: "] {
        let since = Instant::now();
        let mut stream = server.send(begun).await;
        read_to_end(&mut stream).await;
        assert!(since.elapsed() >= Duration::from_millis(200), "{begun:?}");
    }
}

#[tokio::test]
async fn an_idle_connection_is_closed() {
    let limits = HttpLimits {
        header_timeout: Duration::from_millis(200),
        ..limits()
    };
    let server = start(limits).await;
    let request = "POST /length HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\n\r\nab";
    let mut stream = server.send(request).await;
    let answer = read_to_end(&mut stream).await;
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
}

#[tokio::test]
async fn a_body_that_stops_coming_is_answered_and_cut_off() {
    let limits = HttpLimits {
        body_idle_timeout: Duration::from_millis(200),
        ..limits()
    };
    let server = start(limits).await;
    let mut stream = server.send(&(post_head(1_000) + "abc")).await;
    let answer = read_to_end(&mut stream).await;
    assert!(answer.starts_with("HTTP/1.1 408"), "{answer}");
    assert!(
        answer.contains("request_timeout") && answer.contains("200 ms"),
        "{answer}"
    );
    assert!(answer.contains("\"outcome\":\"not_committed\""), "{answer}");
    assert!(answer.contains("connection: close"), "{answer}");
}

#[tokio::test]
async fn a_body_that_drips_for_ever_hits_the_total_bound() {
    let limits = HttpLimits {
        body_idle_timeout: Duration::from_secs(5),
        body_timeout: Duration::from_millis(400),
        ..limits()
    };
    let server = start(limits).await;
    let (mut reader, mut writer) = server.send(&post_head(100_000)).await.into_split();
    let dripping = tokio::spawn(async move {
        let mut pause = tokio::time::interval(Duration::from_millis(50));
        while writer.write_all(b"x").await.is_ok() {
            pause.tick().await;
        }
    });
    let mut answer = String::new();
    let read = reader.read_to_string(&mut answer);
    let _ = tokio::time::timeout(PATIENCE, read)
        .await
        .expect("dripping held the connection");
    assert!(answer.starts_with("HTTP/1.1 408"), "{answer}");
    assert!(answer.contains("not complete after 400 ms"), "{answer}");
    dripping.abort();
}

#[tokio::test]
async fn too_large_is_said_to_a_client_that_is_still_sending() {
    let server = start(limits()).await;
    for head in [
        post_head(300_000),
        "POST /length HTTP/1.1\r\nhost: x\r\nconnection: close\r\ntransfer-encoding: chunked\r\n\r\n493e0\r\n"
            .to_owned(),
    ] {
        let mut stream = server.send(&head).await;
        stream.write_all(&vec![b'x'; 300_000]).await.unwrap();
        if head.contains("chunked") {
            stream.write_all(b"\r\n0\r\n\r\n").await.unwrap();
        }
        let answer = read_to_end(&mut stream).await;
        assert!(answer.starts_with("HTTP/1.1 413"), "{answer}");
        assert!(answer.contains("request_too_large") && answer.contains("100000"), "{answer}");
    }
    assert_eq!(server.app.budget.used(), 0);
}

#[tokio::test]
async fn a_client_that_asks_first_is_told_at_once() {
    let server = start(limits()).await;
    let head = post_head(300_000).replace("\r\n\r\n", "\r\nexpect: 100-continue\r\n\r\n");
    let mut stream = server.send(&head).await;
    let answer = read_to_end(&mut stream).await;
    assert!(answer.starts_with("HTTP/1.1 413"), "{answer}");
}

#[tokio::test]
async fn compressed_bodies_are_refused() {
    let server = start(limits()).await;
    let head = post_head(3).replace("\r\n\r\n", "\r\ncontent-encoding: gzip\r\n\r\n");
    let mut stream = server.send(&(head + "abc")).await;
    let answer = read_to_end(&mut stream).await;
    assert!(answer.starts_with("HTTP/1.1 400"), "{answer}");
}

#[tokio::test]
async fn bodies_in_memory_are_bounded_together() {
    let server = start(limits()).await;
    // Announced but not sent: costs nothing.
    let _announced = server.send(&post_head(100_000)).await;
    let mut holding = server
        .send(&(post_head(100_000) + &"x".repeat(90_000)))
        .await;
    let waited = Instant::now();
    while server.app.budget.used() < 90_000 {
        assert!(waited.elapsed() < PATIENCE, "the body is not charged");
        tokio::task::yield_now().await;
    }
    let mut refused = server
        .send(&(post_head(80_000) + &"x".repeat(80_000)))
        .await;
    let answer = read_to_end(&mut refused).await;
    assert!(answer.starts_with("HTTP/1.1 503"), "{answer}");
    assert!(
        answer.contains("overloaded") && answer.contains("retry-after: 1"),
        "{answer}"
    );
    // The one that was there first is not disturbed.
    holding
        .write_all("x".repeat(10_000).as_bytes())
        .await
        .unwrap();
    let answer = read_to_end(&mut holding).await;
    assert!(answer.ends_with("100000"), "{answer}");
}

#[tokio::test]
async fn one_connection_too_many_is_told_so() {
    let server = start(HttpLimits {
        max_connections: 2,
        ..limits()
    })
    .await;
    let mut open = Vec::new();
    for _ in 0..2 {
        open.push(
            server
                .send("GET /held HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
                .await,
        );
        server.app.entered.notified().await;
    }
    let mut third = server.connect().await;
    let answer = read_to_end(&mut third).await;
    assert!(
        answer.starts_with("HTTP/1.1 503") && answer.contains("retry-after"),
        "{answer}"
    );
    let text = server.metrics.render().unwrap();
    assert!(
        text.contains("quorate_http_connections_refused_total 1"),
        "{text}"
    );
    // A place that becomes free is given again.
    server.app.release.notify_waiters();
    for stream in &mut open {
        assert!(read_to_end(stream).await.ends_with("released"));
    }
    let waited = Instant::now();
    loop {
        let mut again = server.send(&(post_head(2) + "ab")).await;
        if read_to_end(&mut again).await.starts_with("HTTP/1.1 200") {
            break;
        }
        assert!(
            waited.elapsed() < PATIENCE,
            "the place was never given back"
        );
    }
}

#[tokio::test]
async fn a_client_that_takes_nothing_is_cut_off() {
    let limits = HttpLimits {
        write_timeout: Duration::from_millis(300),
        ..limits()
    };
    let server = start(limits).await;
    let _stalled = server.send("GET /large HTTP/1.1\r\nhost: x\r\n\r\n").await;
    let waited = Instant::now();
    let mut seen = false;
    loop {
        let text = server.metrics.render().unwrap();
        let open = text.contains("quorate_http_connections 1\n");
        seen |= open;
        if seen && !open {
            break;
        }
        assert!(
            waited.elapsed() < PATIENCE,
            "the stalled client keeps its connection"
        );
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn shutdown_lets_requests_finish_and_accepts_no_more() {
    let server = start(limits()).await;
    let mut idle = server
        .send("POST /length HTTP/1.1\r\nhost: x\r\ncontent-length: 0\r\n\r\n")
        .await;
    let mut flying = server.send("GET /held HTTP/1.1\r\nhost: x\r\n\r\n").await;
    server.app.entered.notified().await;
    server.shutdown.cancel();
    read_to_end(&mut idle).await;
    assert!(!server.task.is_finished());
    server.app.release.notify_waiters();
    assert!(read_to_end(&mut flying).await.ends_with("released"));
    tokio::time::timeout(PATIENCE, server.task)
        .await
        .unwrap()
        .unwrap();
    assert!(TcpStream::connect(server.address).await.is_err());
}

#[tokio::test]
async fn shutdown_has_a_deadline() {
    let limits = HttpLimits {
        shutdown_timeout: Duration::from_millis(200),
        ..limits()
    };
    let server = start(limits).await;
    let mut stuck = server.send("GET /held HTTP/1.1\r\nhost: x\r\n\r\n").await;
    server.app.entered.notified().await;
    server.shutdown.cancel();
    tokio::time::timeout(PATIENCE, server.task)
        .await
        .expect("no deadline")
        .unwrap();
    assert_eq!(read_to_end(&mut stuck).await, "");
}
