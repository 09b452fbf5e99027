//! `quorate server`: the line where the command line hands over to the node.

use crate::config::{ServerArgs, ServerConfig};

use super::error::CliError;

pub fn run(args: ServerArgs) -> Result<(), CliError> {
    let config = ServerConfig::load(args).map_err(|error| CliError::Usage(error.to_string()))?;
    crate::server::run(config).map_err(|error| CliError::Failed(format!("{error:#}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The README's table is what the code says; on a difference, paste what this prints.
    #[test]
    fn the_readme_lists_every_key_with_its_default() {
        let mut expected = String::from("\n| key | default | |\n|---|---|---|\n");
        for row in ServerConfig::key_docs() {
            let default = match row.default.as_str() {
                "" => String::new(),
                default => format!("`{default}`"),
            };
            expected.push_str(&format!("| `{}` | {default} | {} |\n", row.key, row.doc));
        }
        let readme = include_str!("../../README.md");
        let table = readme
            .split_once("<!-- configuration: checked against the code by a test -->")
            .and_then(|(_, rest)| rest.split_once("<!-- configuration end -->"))
            .map(|(table, _)| table);
        assert!(
            table == Some(expected.as_str()),
            "the README should say:\n{expected}"
        );
    }
}
