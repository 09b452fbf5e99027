//! Where a published message is to go, as it is stored with the message.
//!
//! Queues are chosen when it is published, too: whatever becomes of the topics meanwhile, every
//! attempt to bring the message to one writes to the same queue, which knows what it has.

use crate::catalog::TopicId;

/// The exchange's name. On the stored message and on what the topics get.
pub const EXCHANGE_HEADER: &str = "quorate.exchange.name";
/// The routing key it was published with. Likewise.
pub const ROUTING_KEY_HEADER: &str = "quorate.exchange.routing_key";
/// The id its publisher was answered with. On what the topics get.
pub const MESSAGE_ID_HEADER: &str = "quorate.exchange.message_id";
/// The routes. On the stored message alone.
pub const ROUTES_HEADER: &str = "quorate.exchange.routes";

/// One queue that is to get the message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Route {
    pub topic: TopicId,
    pub queue: u32,
}

/// `topic id:queue`, separated by commas.
pub fn write(routes: &[Route]) -> String {
    let each = routes.iter().map(|r| format!("{}:{}", r.topic, r.queue));
    each.collect::<Vec<_>>().join(",")
}

/// None: nothing that [`write`] wrote.
pub fn read(text: &[u8]) -> Option<Vec<Route>> {
    let text = std::str::from_utf8(text).ok()?;
    let each = text.split(',').map(|route| {
        let (topic, queue) = route.split_once(':')?;
        Some(Route {
            topic: topic.parse().ok()?,
            queue: queue.parse().ok()?,
        })
    });
    each.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn routes_come_back() {
        let routes = [
            Route { topic: 1, queue: 0 },
            Route {
                topic: u64::MAX,
                queue: u32::MAX,
            },
        ];
        assert_eq!(read(write(&routes).as_bytes()), Some(routes.to_vec()));
        assert_eq!(
            read(write(&routes[..1]).as_bytes()),
            Some(routes[..1].to_vec())
        );
        for text in [&b""[..], b"1", b"1:2,", b"a:1", b"\xff:1"] {
            assert_eq!(read(text), None, "{text:?}");
        }
    }
}
