//! `dormouse man`: a man page for the command and one for each verb.

use anyhow::{Context, Result};
use clap::CommandFactory;

use crate::app::App;
use crate::cli::{Cli, ManArgs};

pub(super) fn run(app: &mut App, args: &ManArgs) -> Result<()> {
    std::fs::create_dir_all(&args.dir)
        .with_context(|| format!("make folder {}", args.dir.display()))?;
    clap_mangen::generate_to(Cli::command(), &args.dir)
        .with_context(|| format!("write man pages to {}", args.dir.display()))?;
    app.say(&format!("wrote man pages to {}", args.dir.display()));
    Ok(())
}
