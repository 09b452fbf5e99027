//! Where a reader goes on whose offset is gone, or was never there. Nowhere, unless it says so: what
//! retention took from a reader is not to go unnoticed.

use crate::broker::{BrokerError, BrokerResult, FetchRequest, StartAt};
use crate::http::error::ApiError;

/// The query parameter `on_out_of_range`; None: an error.
pub fn parse(text: Option<&str>) -> Result<Option<StartAt>, ApiError> {
    match text {
        None | Some("error") => Ok(None),
        Some("earliest") => Ok(Some(StartAt::Earliest)),
        Some("latest") => Ok(Some(StartAt::Latest)),
        Some(_) => Err(ApiError::invalid(
            "on_out_of_range must be error, earliest or latest",
        )),
    }
}

/// Asks, and once more from the fallback if the offset asked for is out of range.
pub async fn fetch<T, F>(
    request: FetchRequest,
    fallback: Option<StartAt>,
    ask: impl Fn(FetchRequest) -> F,
) -> BrokerResult<T>
where
    F: Future<Output = BrokerResult<T>>,
{
    let Some(start) = fallback else {
        return ask(request).await;
    };
    match ask(request.clone()).await {
        Err(BrokerError::OffsetOutOfRange { .. }) => ask(FetchRequest { start, ..request }).await,
        answer => answer,
    }
}
