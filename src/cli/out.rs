//! Printing: aligned tables for people, one JSON value a line for machines.

use std::io::{self, Write};

use serde::Serialize;

use super::error::CliError;

/// Where a command's answer goes. Notes for the person at the terminal go to standard error, so
/// that standard output can always be piped.
#[derive(Debug, Clone, Copy)]
pub struct Output {
    json: bool,
}

impl Output {
    pub fn new(json: bool) -> Self {
        Self { json }
    }

    pub fn is_json(self) -> bool {
        self.json
    }

    pub fn line(self, text: &str) -> Result<(), CliError> {
        write_all(&[text.as_bytes(), b"\n"])
    }

    pub fn json(self, value: &impl Serialize) -> Result<(), CliError> {
        let text = serde_json::to_string(value)
            .map_err(|error| CliError::io("print JSON", io::Error::from(error)))?;
        self.line(&text)
    }

    pub fn table(self, table: &Table) -> Result<(), CliError> {
        write_all(&[table.render().as_bytes()])
    }

    pub fn note(self, text: &str) {
        eprintln!("{text}");
    }
}

/// Written in one go under the lock, so that lines of several tasks never mix.
fn write_all(parts: &[&[u8]]) -> Result<(), CliError> {
    let mut stdout = io::stdout().lock();
    for part in parts {
        if let Err(error) = stdout.write_all(part) {
            return Err(closed_or_failed(error));
        }
    }
    stdout.flush().map_err(closed_or_failed)
}

fn closed_or_failed(error: io::Error) -> CliError {
    match error.kind() {
        io::ErrorKind::BrokenPipe => CliError::OutputClosed,
        _ => CliError::io("write to standard output", error),
    }
}

/// Columns as wide as their widest cell; numbers to the right, everything else to the left.
#[derive(Debug)]
pub struct Table {
    headers: Vec<&'static str>,
    rows: Vec<Vec<String>>,
}

impl Table {
    pub fn new(headers: &[&'static str]) -> Self {
        Self {
            headers: headers.to_vec(),
            rows: Vec::new(),
        }
    }

    /// A row with fewer cells than headers leaves the last columns empty.
    pub fn row(&mut self, cells: Vec<String>) {
        self.rows.push(cells);
    }

    pub fn render(&self) -> String {
        let columns = self.headers.len();
        let cell =
            |row: &'_ Vec<String>, column: usize| row.get(column).cloned().unwrap_or_default();
        let mut widths: Vec<usize> = self.headers.iter().map(|header| header.len()).collect();
        let mut numeric = vec![!self.rows.is_empty(); columns];
        for row in &self.rows {
            for column in 0..columns {
                let text = cell(row, column);
                widths[column] = widths[column].max(text.chars().count());
                numeric[column] &= is_number(&text);
            }
        }
        let mut text = String::new();
        let headers = self
            .headers
            .iter()
            .map(|header| (*header).to_owned())
            .collect();
        for row in std::iter::once(&headers).chain(&self.rows) {
            let mut line = String::new();
            for column in 0..columns {
                let (content, width) = (cell(row, column), widths[column]);
                if numeric[column] {
                    line.push_str(&format!("{content:>width$}  "));
                } else {
                    line.push_str(&format!("{content:<width$}  "));
                }
            }
            text.push_str(line.trim_end());
            text.push('\n');
        }
        text
    }
}

fn is_number(text: &str) -> bool {
    text == "-" || (!text.is_empty() && text.chars().all(|c| c.is_ascii_digit() || c == '.'))
}

/// `-` where there is nothing to show.
pub fn or_dash<T: ToString>(value: Option<T>) -> String {
    value.map_or_else(|| "-".to_owned(), |value| value.to_string())
}

pub fn list<T: ToString>(values: &[T]) -> String {
    let texts: Vec<String> = values.iter().map(ToString::to_string).collect();
    texts.join(",")
}

/// `1 message`, `2 messages`.
pub fn count(number: usize, noun: &str) -> String {
    format!("{number} {noun}{}", if number == 1 { "" } else { "s" })
}

/// The time of day in UTC, `06:15:43.123`, of a Unix time in milliseconds.
pub fn clock_time(time_ms: u64) -> String {
    let (seconds, ms) = (time_ms / 1000, time_ms % 1000);
    let (hour, minute, second) = (seconds / 3600 % 24, seconds / 60 % 60, seconds % 60);
    format!("{hour:02}:{minute:02}:{second:02}.{ms:03}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_aligns_numbers_right_and_words_left() {
        let mut table = Table::new(&["TOPIC", "QUEUES", "FLUSH"]);
        table.row(vec!["orders".into(), "4".into(), "sync".into()]);
        table.row(vec!["a".into(), "16".into(), "async".into()]);
        let expected = "TOPIC   QUEUES  FLUSH\norders       4  sync\na           16  async\n";
        assert_eq!(table.render(), expected);
    }

    #[test]
    fn an_empty_table_is_its_header() {
        assert_eq!(Table::new(&["NODE", "URL"]).render(), "NODE  URL\n");
    }

    #[test]
    fn the_time_of_day_is_utc() {
        assert_eq!(clock_time(1_700_000_000_123), "22:13:20.123");
    }

    #[test]
    fn one_is_singular() {
        assert_eq!(count(1, "message"), "1 message");
        assert_eq!(count(0, "message"), "0 messages");
    }
}
