//! A live stream of one queue: broken off now and then, by faults and on purpose, and resumed with
//! the last offset seen.

use std::time::Duration;

use rand::Rng;
use tokio::time::timeout;

use super::super::super::super::client::Request;
use super::super::super::super::error::CliError;
use super::super::super::super::sse::SseParser;
use super::super::super::super::wire::Message;
use super::super::history::{History, Source};
use super::super::stage::Stage;
use super::super::watch::{Read, Shown};
use super::{Actor, node};

/// A stream that shows nothing for so long is asked for anew, of another node.
const SILENCE: Duration = Duration::from_secs(3);
const RETRY_AFTER: Duration = Duration::from_millis(200);

pub async fn follow(mut actor: Actor, lane: u16) {
    let name = {
        let history = actor.stage.history.lock();
        format!("a live stream of {}", history.lane(lane).name())
    };
    let witness = actor.stage.history.lock().add_witness(name);
    let mut stream = Stream {
        lane,
        witness,
        next: 0,
    };
    while !actor.stop.is_cancelled() {
        let place = actor.pick();
        let most = actor.rng.random_range(50..2000);
        let stop = actor.stop.clone();
        tokio::select! {
            () = stop.cancelled() => return,
            _ = stream.once(&actor, place, most) => {}
        }
        actor.pause(RETRY_AFTER).await;
    }
}

struct Stream {
    lane: u16,
    witness: u16,
    next: u64,
}

impl Stream {
    /// Follows one stream until it ends, falls silent, or has shown `most` messages.
    async fn once(&mut self, actor: &Actor, place: usize, most: u64) -> Result<(), CliError> {
        let stage = &actor.stage;
        let (topic, queue) = stage.place(self.lane);
        let queue = queue.to_string();
        let path = ["v1", "topics", &topic, "queues", &queue, "messages"];
        let mut request = Request::get(&path).event_stream();
        if let Some(last) = self.next.checked_sub(1) {
            request = request.header("last-event-id", last);
        }
        let (began_us, id) = (stage.now_us(), node(stage, place).id);
        let answer = timeout(SILENCE, node(stage, place).client.send(request)).await;
        let Ok(answer) = answer else { return Ok(()) };
        let mut answer = answer?;
        let mut parser = SseParser::default();
        let until = self.next + most;
        while self.next < until {
            let Ok(Ok(Some(bytes))) = timeout(SILENCE, answer.chunk()).await else {
                return Ok(());
            };
            let events = parser.push(&bytes);
            let messages = events.iter().filter(|event| event.event.is_empty());
            let shown: Vec<Shown> = messages
                .filter_map(|event| serde_json::from_str::<Message>(&event.data).ok())
                .map(|message| Stage::shown(&actor.run, &message))
                .collect();
            if !shown.is_empty() {
                let by = Source {
                    witness: self.witness,
                    node: id,
                    at_us: stage.now_us(),
                };
                self.take(&mut stage.history.lock(), &shown, (began_us, by));
            }
        }
        Ok(())
    }

    fn take(&mut self, history: &mut History, shown: &[Shown], (began_us, by): (u64, Source)) {
        let read = Read {
            lane: self.lane,
            by,
            from: self.next,
            // A stream promises an order, not a time.
            floor: 0,
            began_us,
        };
        history.consumed.stream += shown.len() as u64;
        self.next = history.read(&read, shown);
    }
}
