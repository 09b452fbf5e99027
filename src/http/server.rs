//! The accept loop. `axum::serve` sets no timer and no bounds, so this one is ours: connections are
//! counted, request heads and idle connections have a time limit, clients that take nothing of
//! their answer are cut off, and at shutdown requests in flight finish within a deadline.

use std::io::Write as _;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::Request;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tower::ServiceExt as _;

use super::clients::ClientAddress;
use super::error::{ApiError, Problem};
use super::limits::HttpLimits;
use super::write_timeout::WriteTimeout;
use crate::metrics::Metrics;

/// Pause after a failed accept, which mostly means that the process is out of file descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
/// Bytes of request line and headers; hyper's least is 8 KiB.
const MAX_HEAD_BYTES: usize = 64 << 10;

struct Server {
    app: Router,
    limits: HttpLimits,
    metrics: Arc<Metrics>,
    shutdown: CancellationToken,
    /// Ends what is still open after the time for finishing is over.
    cut: CancellationToken,
}

/// Serves until `shutdown`, then until every request in flight is done or the time for it is over.
pub async fn serve(
    listener: TcpListener,
    app: Router,
    limits: HttpLimits,
    metrics: Arc<Metrics>,
    shutdown: CancellationToken,
) {
    let slots = Arc::new(Semaphore::new(limits.max_connections));
    let tracker = TaskTracker::new();
    let deadline = limits.shutdown_timeout;
    let cut = CancellationToken::new();
    let server = Arc::new(Server {
        app,
        limits,
        metrics,
        shutdown: shutdown.clone(),
        cut: cut.clone(),
    });
    loop {
        let accepted = tokio::select! {
            () = shutdown.cancelled() => break,
            accepted = listener.accept() => accepted,
        };
        let (stream, _) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::warn!(%error, "accepting a connection failed");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        match Arc::clone(&slots).try_acquire_owned() {
            Ok(slot) => {
                tracker.spawn(Arc::clone(&server).connection(stream, slot));
            }
            Err(_) => {
                server.metrics.connection_refused();
                refuse(stream);
            }
        }
    }
    drop(listener);
    tracker.close();
    if tokio::time::timeout(deadline, tracker.wait())
        .await
        .is_err()
    {
        tracing::warn!(
            connections = tracker.len(),
            "requests are cut off at shutdown"
        );
        cut.cancel();
        tracker.wait().await;
    }
}

/// Tells one client too many so, without waiting for it.
fn refuse(stream: TcpStream) {
    let problem = Problem::new(
        &ApiError::overloaded("too many connections are open"),
        false,
    );
    let body = serde_json::to_vec(&problem).unwrap_or_default();
    let mut answer = Vec::with_capacity(512);
    // Writing to a Vec cannot fail.
    let _ = write!(
        answer,
        "HTTP/1.1 503 Service Unavailable\r\ncontent-type: application/problem+json\r\n\
         content-length: {}\r\nretry-after: 1\r\nconnection: close\r\n\r\n",
        body.len()
    );
    answer.extend_from_slice(&body);
    // A fresh socket has room for this; where not, the client sees a closed connection.
    let _ = stream.try_write(&answer);
}

impl Server {
    async fn connection(self: Arc<Self>, stream: TcpStream, slot: OwnedSemaphorePermit) {
        self.metrics.connection_opened();
        if let Err(error) = stream.set_nodelay(true) {
            tracing::debug!(%error, "setting TCP_NODELAY failed");
        }
        let client = stream.peer_addr().map(ClientAddress::from);
        let client = client.unwrap_or_default();
        let service = TowerToHyperService::new(self.app.clone().map_request(
            move |request: Request<hyper::body::Incoming>| {
                let mut request = request.map(axum::body::Body::new);
                request.extensions_mut().insert(client);
                request
            },
        ));
        let io = TokioIo::new(WriteTimeout::new(stream, self.limits.write_timeout));
        let connection = http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(self.limits.header_timeout)
            .max_buf_size(MAX_HEAD_BYTES.max(512 << 10))
            .serve_connection(io, service);
        let mut connection = std::pin::pin!(connection);
        let result = tokio::select! {
            result = connection.as_mut() => result,
            () = self.shutdown.cancelled() => {
                connection.as_mut().graceful_shutdown();
                tokio::select! {
                    result = connection => result,
                    () = self.cut.cancelled() => Ok(()),
                }
            }
        };
        if let Err(error) = result {
            tracing::debug!(%error, "a connection ended early");
        }
        self.metrics.connection_closed();
        drop(slot);
    }
}
