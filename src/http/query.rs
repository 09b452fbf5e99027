//! Query parameters, strictly: unknown ones, repeated ones and ones out of bounds are errors.

use std::fmt::Display;
use std::ops::RangeInclusive;
use std::str::FromStr;

use axum::extract::{FromRequestParts, Query};
use axum::http::request::Parts;

use super::error::ApiError;

/// The parameters of a request as they came, to be asked for by name.
#[derive(Debug, Default)]
pub struct Params(Vec<(String, String)>);

impl<S: Sync> FromRequestParts<S> for Params {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, ApiError> {
        let Query(pairs) = Query::<Vec<(String, String)>>::try_from_uri(&parts.uri)
            .map_err(|error| ApiError::invalid(format!("the query cannot be read: {error}")))?;
        // Where a piece is no text, it was read as if it had other bytes. Pieces without anything
        // in them make no pair.
        let pieces = parts.uri.query().unwrap_or_default().split('&');
        let pieces = pieces.filter(|piece| !piece.is_empty());
        match pieces.zip(&pairs).find(|(piece, _)| !is_text(piece)) {
            Some((_, (name, _))) => {
                let shown: String = name.chars().take(100).collect();
                Err(ApiError::invalid(format!(
                    "query parameter {shown:?} is not UTF-8 where its %XX are decoded"
                )))
            }
            None => Ok(Self(pairs)),
        }
    }
}

/// Whether a part of a query is UTF-8 when what is encoded in it is decoded.
fn is_text(piece: &str) -> bool {
    let mut decoded = Vec::with_capacity(piece.len());
    let mut rest = piece.as_bytes();
    while let Some((&byte, behind)) = rest.split_first() {
        let digits = (byte == b'%').then(|| behind.get(..2)).flatten();
        let digits = digits.filter(|two| two.iter().all(u8::is_ascii_hexdigit));
        let code = digits.and_then(|two| std::str::from_utf8(two).ok());
        match code.and_then(|code| u8::from_str_radix(code, 16).ok()) {
            Some(code) => {
                decoded.push(code);
                rest = behind.get(2..).unwrap_or_default();
            }
            None => {
                decoded.push(byte);
                rest = behind;
            }
        }
    }
    std::str::from_utf8(&decoded).is_ok()
}

impl Params {
    /// Fails for a parameter that is not in `allowed`, or comes twice.
    pub fn only(self, allowed: &[&str]) -> Result<Self, ApiError> {
        for (i, (name, _)) in self.0.iter().enumerate() {
            if !allowed.contains(&name.as_str()) {
                let shown: String = name.chars().take(100).collect();
                let allowed = match allowed {
                    [] => "none".to_owned(),
                    some => some.join(", "),
                };
                return Err(ApiError::invalid(format!(
                    "unknown query parameter {shown:?}; allowed here: {allowed}"
                )));
            }
            if self.0[..i].iter().any(|(earlier, _)| earlier == name) {
                return Err(ApiError::invalid(format!(
                    "query parameter {name:?} is given twice"
                )));
            }
        }
        Ok(self)
    }

    pub fn none(self) -> Result<(), ApiError> {
        self.only(&[]).map(drop)
    }

    pub fn get(&self, name: &str) -> Option<&str> {
        self.0
            .iter()
            .find(|(key, _)| key == name)
            .map(|(_, value)| value.as_str())
    }

    /// A whole number; `what` the caller expects is derived from the type.
    pub fn number<T: FromStr>(&self, name: &str) -> Result<Option<T>, ApiError> {
        self.get(name)
            .map(|text| {
                text.parse().map_err(|_| {
                    let shown: String = text.chars().take(100).collect();
                    ApiError::invalid(format!("{name}={shown:?} is not a whole number in range"))
                })
            })
            .transpose()
    }
}

/// `value` where given and within `bounds`, else `default`; the error names the field.
pub fn bounded<T: PartialOrd + Display + Copy>(
    name: &str,
    value: Option<T>,
    bounds: RangeInclusive<T>,
    default: T,
) -> Result<T, ApiError> {
    let value = value.unwrap_or(default);
    if bounds.contains(&value) {
        return Ok(value);
    }
    let (min, max) = bounds.into_inner();
    Err(ApiError::invalid(format!(
        "{name} is {value}; it must be {min} to {max}"
    )))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn params(query: &str) -> Params {
        let uri = format!("/x?{query}").parse().unwrap();
        let Query(pairs) = Query::<Vec<(String, String)>>::try_from_uri(&uri).unwrap();
        Params(pairs)
    }

    fn detail(error: ApiError) -> String {
        match error {
            ApiError::Broker(error) => error.to_string(),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn unknown_and_repeated_parameters_are_named() {
        let error = detail(
            params("offset=1&offest=2")
                .only(&["offset", "wait_ms"])
                .unwrap_err(),
        );
        assert!(
            error.contains("offest") && error.contains("offset, wait_ms"),
            "{error}"
        );
        let error = detail(params("a=1&a=2").only(&["a"]).unwrap_err());
        assert!(error.contains("twice"), "{error}");
        let error = detail(params("a").none().unwrap_err());
        assert!(error.contains("allowed here: none"), "{error}");
    }

    #[tokio::test]
    async fn what_is_no_text_is_refused_by_name() {
        let read = async |query: &str| {
            let request = axum::http::Request::get(format!("/x?{query}"));
            let (mut parts, ()) = request.body(()).unwrap().into_parts();
            Params::from_request_parts(&mut parts, &()).await
        };
        for fine in ["", "a=%C3%A4&b=%", "a=%zz+b&&c", "a=%EF%BF%BD"] {
            assert!(read(fine).await.is_ok(), "{fine}");
        }
        for wrong in ["a=1&&key=%FF", "key=x%C3", "a&key=%c3%28&b"] {
            let error = detail(read(wrong).await.unwrap_err());
            assert!(error.contains("\"key\""), "{wrong}: {error}");
        }
        assert!(read("%FF=1").await.is_err());
    }

    #[test]
    fn numbers_are_checked() {
        let given = params("n=7&bad=x&neg=-1&big=99999999999&text=a%20b")
            .only(&["n", "bad", "neg", "big", "text"]);
        let given = given.unwrap();
        assert_eq!(given.number::<u32>("n"), Ok(Some(7)));
        assert_eq!(given.number::<u32>("absent"), Ok(None));
        for name in ["bad", "neg", "big"] {
            assert!(detail(given.number::<u32>(name).unwrap_err()).contains(name));
        }
        assert_eq!(given.get("text"), Some("a b"));
        assert_eq!(bounded("n", Some(5), 1..=10, 3), Ok(5));
        assert_eq!(bounded("n", None, 1..=10, 3), Ok(3));
        assert!(detail(bounded("n", Some(11), 1..=10, 3).unwrap_err()).contains("1 to 10"));
    }
}
