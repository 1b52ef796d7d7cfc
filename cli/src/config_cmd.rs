//! `forebay config`.

use crate::args::ConfigCommand;
use crate::output::{self, Output};
use forebay_common::Result;
use forebay_common::config::Loaded;
use serde_json::json;

/// Loading has checked already: a bad configuration never comes here.
pub fn run(command: &ConfigCommand, loaded: &Loaded, output: Output) -> Result<()> {
    match command {
        ConfigCommand::Show => {
            let shown = loaded.show()?;
            output.show(&json!(shown), || {
                output::table(&["KEY", "VALUE", "FROM"], &[], shown.iter().map(|s| vec![s.key.clone(), s.value.to_string(), s.source.clone()]))
            })
        }
        ConfigCommand::Check => output.show(&json!({ "ok": true }), || output::line("the configuration is good")),
    }
}
