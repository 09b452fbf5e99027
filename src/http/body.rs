//! Request bodies: bounded in size, in time and in their sum over all requests.
//!
//! A sender that is too slow or sends too much is answered, not merely cut off: after a size
//! limit is hit, or the memory for bodies is used up, a bounded rest is read and thrown away, so
//! that the answer reaches a client that is still writing.

use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::{Body, HttpBody};
use axum::extract::{FromRequest, Request};
use axum::http::{HeaderMap, header};
use axum::response::Response;
use bytes::{Bytes, BytesMut};
use futures_util::StreamExt;
use hyper::body::{Frame, SizeHint};
use serde::Deserialize;
use tokio::time::Instant;

use super::HttpState;
use super::error::ApiError;
use super::limits::{BudgetShare, ByteBudget, HttpLimits};
use super::object::Object;
use crate::broker::BrokerError;

/// How much of a refused body is read on, as a multiple of what would have been accepted.
const DRAIN_FACTOR: usize = 4;
const DRAIN_TIME: Duration = Duration::from_secs(3);

/// Reads a body piece by piece within the limits.
#[derive(Debug)]
pub struct BodyReader {
    stream: axum::body::BodyDataStream,
    limits: HttpLimits,
    deadline: Instant,
    read: usize,
    announced: Option<usize>,
    /// The client waits for our word before it sends, so there is nothing to drain.
    expects_continue: bool,
}

impl BodyReader {
    pub fn new(headers: &HeaderMap, body: Body, limits: &HttpLimits) -> Result<Self, ApiError> {
        if let Some(coding) = headers.get(header::CONTENT_ENCODING)
            && !coding.as_bytes().eq_ignore_ascii_case(b"identity")
        {
            return Err(ApiError::invalid(
                "compressed request bodies are not supported; send it without Content-Encoding",
            ));
        }
        let announced = headers
            .get(header::CONTENT_LENGTH)
            .and_then(|value| value.to_str().ok()?.parse().ok());
        Ok(Self {
            stream: body.into_data_stream(),
            limits: limits.clone(),
            deadline: Instant::now() + limits.body_timeout,
            read: 0,
            announced,
            expects_continue: headers.contains_key(header::EXPECT),
        })
    }

    /// The next piece, None at the end.
    pub async fn next(&mut self) -> Result<Option<Bytes>, ApiError> {
        if self
            .announced
            .is_some_and(|bytes| bytes > self.limits.max_request_bytes)
        {
            return Err(self.too_large().await);
        }
        let until = self
            .deadline
            .min(Instant::now() + self.limits.body_idle_timeout);
        let piece = match tokio::time::timeout_at(until, self.stream.next()).await {
            Err(_) => return Err(self.too_slow()),
            Ok(None) => return Ok(None),
            Ok(Some(Err(error))) => {
                return Err(ApiError::invalid(format!("the body broke off: {error}")));
            }
            Ok(Some(Ok(piece))) => piece,
        };
        self.read += piece.len();
        if self.read > self.limits.max_request_bytes {
            return Err(self.too_large().await);
        }
        Ok(Some(piece))
    }

    fn too_slow(&self) -> ApiError {
        let reason = if Instant::now() >= self.deadline {
            format!(
                "the body was not complete after {} ms",
                self.limits.body_timeout.as_millis()
            )
        } else {
            let pause = self.limits.body_idle_timeout.as_millis();
            format!("nothing more of the body came for {pause} ms")
        };
        ApiError::SlowBody { reason }
    }

    /// Throws the rest away. An answer to a client that still writes would be lost with the
    /// connection, which is closed when something on it was not read.
    async fn drain(&mut self) {
        if self.expects_continue {
            return;
        }
        let mut rest = self.limits.max_request_bytes.saturating_mul(DRAIN_FACTOR);
        let drain = async {
            while let Some(Ok(piece)) = self.stream.next().await {
                rest = rest.saturating_sub(piece.len());
                if rest == 0 {
                    break;
                }
            }
        };
        // Whether it ended or the time did: the answer is the same.
        let _ = tokio::time::timeout(DRAIN_TIME, drain).await;
    }

    async fn too_large(&mut self) -> ApiError {
        self.drain().await;
        BrokerError::RequestTooLarge {
            max_bytes: self.limits.max_request_bytes as u64,
        }
        .into()
    }

    /// The whole body, charged to the budget as it arrives.
    pub async fn read_all(mut self, budget: &ByteBudget) -> Result<WholeBody, ApiError> {
        let mut share = BudgetShare::default();
        let Some(first) = self.next_charged(budget, &mut share).await? else {
            return Ok(WholeBody {
                bytes: Bytes::new(),
                share,
            });
        };
        let Some(second) = self.next_charged(budget, &mut share).await? else {
            return Ok(WholeBody {
                bytes: first,
                share,
            });
        };
        let announced = self
            .announced
            .unwrap_or(0)
            .min(self.limits.max_request_bytes);
        // Grows with what really came: an announcement alone reserves no more than 64 KiB.
        let mut whole = BytesMut::with_capacity(announced.min(64 << 10).max(first.len() * 2));
        whole.extend_from_slice(&first);
        whole.extend_from_slice(&second);
        while let Some(piece) = self.next_charged(budget, &mut share).await? {
            whole.extend_from_slice(&piece);
        }
        Ok(WholeBody {
            bytes: whole.freeze(),
            share,
        })
    }

    async fn next_charged(
        &mut self,
        budget: &ByteBudget,
        share: &mut BudgetShare,
    ) -> Result<Option<Bytes>, ApiError> {
        let Some(piece) = self.next().await? else {
            return Ok(None);
        };
        if let Err(refused) = charge(budget, share, piece.len()) {
            // Others can use what this one had at once.
            *share = BudgetShare::default();
            drop(piece);
            self.drain().await;
            return Err(refused);
        }
        Ok(Some(piece))
    }
}

/// Takes `bytes` of the budget, or refuses as overloaded.
pub fn charge(budget: &ByteBudget, share: &mut BudgetShare, bytes: usize) -> Result<(), ApiError> {
    if budget.take(share, bytes) {
        Ok(())
    } else {
        Err(ApiError::overloaded(
            "too many bytes of requests and answers are in memory",
        ))
    }
}

/// A response body that keeps its share of the budget until it is sent or given up.
#[derive(Debug)]
struct Charged {
    body: Body,
    _share: BudgetShare,
}

impl HttpBody for Charged {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        Pin::new(&mut self.body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// Lets `share` live as long as the response's body.
pub fn keep_until_sent(response: Response, share: BudgetShare) -> Response {
    response.map(|body| {
        Body::new(Charged {
            body,
            _share: share,
        })
    })
}

/// A request's body; while it lives it counts against the budget.
#[derive(Debug)]
pub struct WholeBody {
    pub bytes: Bytes,
    pub share: BudgetShare,
}

/// A body that must be JSON, read whole.
#[derive(Debug)]
pub struct JsonBody(pub WholeBody);

/// The media type of a request without its parameters, in lower case; None when there is none.
pub fn media_type(headers: &HeaderMap) -> Result<Option<String>, ApiError> {
    let Some(value) = headers.get(header::CONTENT_TYPE) else {
        return Ok(None);
    };
    let text = value
        .to_str()
        .map_err(|_| ApiError::invalid("the Content-Type header is not readable text"))?;
    let essence = text.split(';').next().unwrap_or_default().trim();
    Ok(Some(essence.to_ascii_lowercase()))
}

/// Whether a media type names JSON; a request without one is taken for JSON.
pub fn is_json(media_type: Option<&str>) -> bool {
    media_type.is_none_or(|essence| {
        essence == "application/json"
            || (essence.starts_with("application/") && essence.ends_with("+json"))
    })
}

pub fn wrong_media_type(found: Option<&str>, wanted: &str) -> ApiError {
    let shown: String = found.unwrap_or("none").chars().take(100).collect();
    ApiError::invalid(format!(
        "the Content-Type {shown:?} is not understood here; send the body as {wanted} \
         (with curl: -H 'Content-Type: …')"
    ))
}

impl FromRequest<HttpState> for JsonBody {
    type Rejection = ApiError;

    async fn from_request(request: Request, state: &HttpState) -> Result<Self, ApiError> {
        let (parts, body) = request.into_parts();
        let media = media_type(&parts.headers)?;
        if !is_json(media.as_deref()) {
            return Err(wrong_media_type(media.as_deref(), "application/json"));
        }
        let reader = BodyReader::new(&parts.headers, body, &state.limits)?;
        Ok(Self(reader.read_all(&state.budget).await?))
    }
}

impl JsonBody {
    pub fn parse<'a, T: Deserialize<'a>>(&'a self) -> Result<T, ApiError> {
        parse_json(&self.0.bytes)
    }

    /// Like `parse`, but no body at all counts as `{}`.
    pub fn parse_or_empty<'a, T: Deserialize<'a>>(&'a self) -> Result<T, ApiError> {
        let empty = self.0.bytes.is_empty();
        parse_json(if empty { b"{}" } else { &self.0.bytes })
    }
}

/// Parses JSON; the error names field, line and column and repeats nothing of the body's values.
pub fn parse_json<'a, T: Deserialize<'a>>(bytes: &'a [u8]) -> Result<T, ApiError> {
    if bytes.is_empty() {
        return Err(ApiError::invalid(
            "the body is empty; a JSON object is expected",
        ));
    }
    serde_json::from_slice::<Object<T>>(bytes)
        .map(|object| object.0)
        .map_err(|error| ApiError::invalid(format!("the body does not fit: {error}")))
}
