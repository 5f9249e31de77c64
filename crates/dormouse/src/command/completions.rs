//! `dormouse completions`: what a shell needs to complete a command line.

use std::io::Write;

use anyhow::Result;
use clap::CommandFactory;

use crate::app::App;
use crate::cli::{Cli, CompletionsArgs};

pub(super) fn run(app: &mut App, args: &CompletionsArgs) -> Result<()> {
    // The generator panics when its sink fails, so it gets one that does not.
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut Cli::command(), "dormouse", &mut script);
    app.out.write_all(&script)?;
    Ok(())
}
