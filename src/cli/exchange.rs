//! `quorate exchange`: exchanges, the topics bound to them, and publishing.

use clap::{Args, Subcommand, ValueEnum};
use reqwest::Method;
use serde_json::{Map, Value, json};

use super::client::{Client, Repeat, Request};
use super::error::CliError;
use super::out::{Output, Table};
use super::produce::name_and_value;
use super::wire::NewMessage;

#[derive(Debug, Subcommand)]
pub enum ExchangeCommand {
    /// All exchanges and what is bound to them.
    List,
    /// Create an exchange; the same one again is fine.
    Put {
        exchange: String,
        #[arg(long)]
        kind: Kind,
    },
    /// Bind a topic to an exchange, or replace the binding it has.
    Bind(BindArgs),
    /// Unbind a topic; what was published before is still brought to it.
    Unbind { exchange: String, topic: String },
    /// Delete an exchange with what is not brought to its topics yet.
    Delete { exchange: String },
    /// Publish values, one message each; a lost answer is asked for again, and stored once.
    Publish(PublishArgs),
}

#[derive(Debug, Clone, Copy, ValueEnum)]
pub enum Kind {
    /// To every bound topic.
    Fanout,
    /// To the topics bound under the routing key.
    Direct,
    /// To the topics bound under a pattern that the routing key matches.
    Topic,
    /// To the topics bound under headers that the message has.
    Headers,
}

#[derive(Debug, Args)]
pub struct BindArgs {
    exchange: String,
    topic: String,
    /// A key, or for a topic exchange a pattern: `*` is one word, `#` any number. May be repeated.
    #[arg(long, value_name = "KEY", conflicts_with = "header")]
    routing_key: Vec<String>,
    /// For a headers exchange. Without `=VALUE` the header has only to be there. May be repeated.
    #[arg(long, value_name = "NAME[=VALUE]")]
    header: Vec<String>,
    /// One of the headers is enough.
    #[arg(long, requires = "header")]
    any: bool,
}

#[derive(Debug, Args)]
pub struct PublishArgs {
    exchange: String,
    #[arg(required = true)]
    values: Vec<String>,
    #[arg(long, default_value = "")]
    routing_key: String,
    #[arg(long)]
    key: Option<String>,
    #[arg(long)]
    tag: Option<String>,
    /// May be repeated.
    #[arg(long, value_name = "NAME=VALUE", value_parser = name_and_value)]
    header: Vec<(String, String)>,
}

pub async fn run(client: &Client, out: Output, command: ExchangeCommand) -> Result<(), CliError> {
    match command {
        ExchangeCommand::List => {
            let answer = client.call(Request::get(&["v1", "exchanges"])).await?;
            match out.is_json() {
                true => out.json(&answer),
                false => out.table(&exchange_table(&answer["exchanges"])),
            }
        }
        ExchangeCommand::Put { exchange, kind } => {
            let path = ["v1", "exchanges", &exchange];
            let kind = kind.to_possible_value();
            let kind = kind.map(|kind| kind.get_name().to_owned());
            let request = Request::new(Method::PUT, &path, Repeat::Always);
            let answer = client.call(request.json(&json!({ "kind": kind }))?).await?;
            show(out, answer)
        }
        ExchangeCommand::Bind(args) => {
            let path = ["v1", "exchanges", &args.exchange, "bindings", &args.topic];
            let request = Request::new(Method::PUT, &path, Repeat::Always);
            let answer = client.call(request.json(&args.body())?).await?;
            if out.is_json() {
                return out.json(&answer);
            }
            let (topic, exchange) = (&args.topic, &args.exchange);
            out.line(&format!(
                "bound {topic} to {exchange}: {}",
                condition(&answer)
            ))
        }
        ExchangeCommand::Unbind { exchange, topic } => {
            let path = ["v1", "exchanges", &exchange, "bindings", &topic];
            delete(client, out, &path, &format!("{topic} from {exchange}")).await
        }
        ExchangeCommand::Delete { exchange } => {
            let path = ["v1", "exchanges", exchange.as_str()];
            delete(client, out, &path, &format!("exchange {exchange}")).await
        }
        ExchangeCommand::Publish(args) => publish(client, out, args).await,
    }
}

impl BindArgs {
    fn body(&self) -> Value {
        let mut body = Map::new();
        match self.routing_key.as_slice() {
            [] => {}
            [key] => drop(body.insert("routing_key".to_owned(), json!(key))),
            keys => drop(body.insert("routing_keys".to_owned(), json!(keys))),
        }
        if !self.header.is_empty() {
            let headers = self.header.iter().map(|text| match text.split_once('=') {
                Some((name, value)) => (name.to_owned(), json!(value)),
                None => (text.clone(), Value::Null),
            });
            let headers: Map<String, Value> = headers.collect();
            body.insert("headers".to_owned(), headers.into());
            let wanted = if self.any { "any" } else { "all" };
            body.insert("match".to_owned(), json!(wanted));
        }
        Value::Object(body)
    }
}

async fn delete(client: &Client, out: Output, path: &[&str], what: &str) -> Result<(), CliError> {
    let request = Request::new(Method::DELETE, path, Repeat::IfUnsent);
    client.call(request).await?;
    match out.is_json() {
        true => Ok(()),
        false => out.line(&format!("removed {what}")),
    }
}

async fn publish(client: &Client, out: Output, args: PublishArgs) -> Result<(), CliError> {
    let messages = args.values.iter().map(|value| {
        let mut message = NewMessage {
            key: args.key.clone(),
            tag: args.tag.clone(),
            headers: args.header.iter().cloned().collect(),
            ..NewMessage::default()
        };
        message.set_value(value.clone().into_bytes());
        let mut message = serde_json::to_value(message).unwrap_or_default();
        message["routing_key"] = json!(args.routing_key);
        message
    });
    let body = json!({ "messages": messages.collect::<Vec<_>>() });
    let path = ["v1", "exchanges", &args.exchange, "messages"];
    // Under a key, so that asking again is safe.
    let request = Request::new(Method::POST, &path, Repeat::Always)
        .header("idempotency-key", uuid::Uuid::new_v4())
        .json(&body)?;
    let answer = client.call(request).await?;
    if out.is_json() {
        return out.json(&answer);
    }
    let mut table = Table::new(&["MESSAGE", "TO"]);
    for result in answer["results"].as_array().into_iter().flatten() {
        let id = result["message_id"].as_str().unwrap_or("?").to_owned();
        table.row(vec![id, texts(&result["routed"])]);
    }
    out.table(&table)
}

fn show(out: Output, answer: Value) -> Result<(), CliError> {
    match out.is_json() {
        true => out.json(&answer),
        false => out.table(&exchange_table(&json!([answer]))),
    }
}

fn exchange_table(exchanges: &Value) -> Table {
    let mut table = Table::new(&["EXCHANGE", "KIND", "TOPIC", "TAKES"]);
    for exchange in exchanges.as_array().into_iter().flatten() {
        let text = |value: &Value| value.as_str().unwrap_or("?").to_owned();
        let (name, kind) = (text(&exchange["name"]), text(&exchange["kind"]));
        let bindings = exchange["bindings"].as_array();
        let bindings = bindings.map(Vec::as_slice).unwrap_or_default();
        if bindings.is_empty() {
            table.row(vec![name, kind, "-".to_owned(), "-".to_owned()]);
            continue;
        }
        for binding in bindings {
            let topic = text(&binding["topic"]);
            table.row(vec![name.clone(), kind.clone(), topic, condition(binding)]);
        }
    }
    table
}

/// What a binding takes, in a few words.
fn condition(binding: &Value) -> String {
    if let Some(headers) = binding["headers"].as_object() {
        let each = headers.iter().map(|(name, value)| match value.as_str() {
            Some(value) => format!("{name}={value}"),
            None => name.clone(),
        });
        let wanted = binding["match"].as_str().unwrap_or("all");
        return format!("{wanted} of {}", each.collect::<Vec<_>>().join(" "));
    }
    match (binding["routing_key"].as_str(), &binding["routing_keys"]) {
        (Some(""), _) => "the empty key".to_owned(),
        (Some(key), _) => key.to_owned(),
        (None, Value::Array(_)) => texts(&binding["routing_keys"]),
        (None, _) => "everything".to_owned(),
    }
}

fn texts(list: &Value) -> String {
    let texts = list.as_array().into_iter().flatten();
    let texts: Vec<_> = texts.filter_map(Value::as_str).collect();
    texts.join(" ")
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Harness {
        #[command(subcommand)]
        command: ExchangeCommand,
    }

    fn bind(arguments: &[&str]) -> Result<Value, clap::Error> {
        let all = ["x", "bind", "shop", "orders"].iter().chain(arguments);
        Harness::try_parse_from(all).map(|harness| match harness.command {
            ExchangeCommand::Bind(args) => args.body(),
            other => panic!("{other:?}"),
        })
    }

    #[test]
    fn the_forms_of_a_binding() {
        assert_eq!(bind(&[]).unwrap(), json!({}));
        let one = bind(&["--routing-key", "order.*"]).unwrap();
        assert_eq!(one, json!({"routing_key": "order.*"}));
        let two = bind(&["--routing-key", "a", "--routing-key", "b"]).unwrap();
        assert_eq!(two, json!({"routing_keys": ["a", "b"]}));
        let headers = bind(&["--header", "format=pdf", "--header", "vip", "--any"]).unwrap();
        let expected = json!({"headers": {"format": "pdf", "vip": null}, "match": "any"});
        assert_eq!(headers, expected);
        assert!(bind(&["--any"]).is_err());
        assert!(bind(&["--routing-key", "a", "--header", "b"]).is_err());
    }

    #[test]
    fn exchanges_and_what_they_take() {
        let exchanges = json!([
            {"name": "all", "kind": "fanout", "bindings": [{"topic": "a"}]},
            {"name": "none", "kind": "direct", "bindings": []},
            {"name": "shop", "kind": "topic", "bindings": [
                {"topic": "audit", "routing_keys": ["a.#", "b.#"]},
                {"topic": "orders", "routing_key": "a.*"}]},
            {"name": "vip", "kind": "headers", "bindings": [
                {"topic": "a", "headers": {"f": "pdf", "v": null}, "match": "any"}]}]);
        let expected = "\
EXCHANGE  KIND     TOPIC   TAKES
all       fanout   a       everything
none      direct   -       -
shop      topic    audit   a.# b.#
shop      topic    orders  a.*
vip       headers  a       any of f=pdf v
";
        assert_eq!(exchange_table(&exchanges).render(), expected);
    }
}
