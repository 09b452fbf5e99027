//! The list of nodes that form the cluster, as text, as TOML and in memory.

use std::fmt;
use std::str::FromStr;

use quorate_raft::NodeId;
use serde::Deserialize;

/// One node as every other node knows it.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NodeSpec {
    pub id: NodeId,
    /// `host:port` of its peer listener.
    pub peer: String,
    /// The base URL clients reach it under.
    pub url: String,
}

/// All nodes of the cluster. As text: `1,10.0.0.1:7081,http://10.0.0.1:8081;2,…`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(transparent)]
pub struct NodeList(pub Vec<NodeSpec>);

impl NodeList {
    pub fn get(&self, id: NodeId) -> Option<&NodeSpec> {
        self.0.iter().find(|node| node.id == id)
    }
}

impl fmt::Display for NodeList {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, node) in self.0.iter().enumerate() {
            let separator = if i == 0 { "" } else { ";" };
            write!(f, "{separator}{},{},{}", node.id, node.peer, node.url)?;
        }
        Ok(())
    }
}

impl FromStr for NodeList {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        text.split(';')
            .map(str::trim)
            .filter(|node| !node.is_empty())
            .map(|node| {
                let parts: Vec<&str> = node.split(',').map(str::trim).collect();
                let [id, peer, url] = parts[..] else {
                    return Err(format!(
                        "{node:?} is not ID,PEER_HOST:PORT,URL; example: 1,10.0.0.1:7081,http://10.0.0.1:8081"
                    ));
                };
                let id = id.parse().map_err(|_| format!("node id {id:?} is not a whole number"))?;
                Ok(NodeSpec { id, peer: peer.to_owned(), url: url.to_owned() })
            })
            .collect::<Result<Vec<_>, _>>()
            .map(Self)
    }
}
