//! What the server may be asked to call, and the secret under which.

use std::fmt;
use std::str::FromStr;

use serde::Deserialize;

/// URLs; as text with commas between them.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(transparent)]
pub struct UrlList(pub Vec<String>);

impl fmt::Display for UrlList {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.join(","))
    }
}

impl FromStr for UrlList {
    type Err = std::convert::Infallible;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let urls = text.split(',').map(str::trim).filter(|url| !url.is_empty());
        Ok(Self(urls.map(str::to_owned).collect()))
    }
}

/// A text that is never shown.
#[derive(Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(transparent)]
pub struct Secret(pub String);

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(…)")
    }
}

/// For the reference of keys, where the default is empty.
impl fmt::Display for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.0.is_empty() { "" } else { "…" })
    }
}

impl FromStr for Secret {
    type Err = std::convert::Infallible;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Ok(Self(text.to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_come_back() {
        let list: UrlList = "http://a/, http://b:1/x,".parse().unwrap();
        assert_eq!(list.0, ["http://a/", "http://b:1/x"]);
        assert_eq!(list.to_string().parse::<UrlList>().unwrap(), list);
    }

    #[test]
    fn a_secret_is_never_shown() {
        let secret = Secret("abc".to_owned());
        assert!(!format!("{secret:?} {secret}").contains("abc"));
    }
}
