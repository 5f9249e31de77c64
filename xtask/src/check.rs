//! `cargo xtask check`: formatting, lints, documentation, licences.

use std::process::Command;

use anyhow::Result;

use crate::command::{self, cargo, cargo_tool, workspace};

/// Fails at the first thing that is not in order.
pub(crate) fn run() -> Result<()> {
    command::run(&mut cargo(&["fmt", "--all", "--check"]))?;
    // A workspace of its own, as it wants instrumented builds of all crates.
    command::run(&mut cargo(&["fmt", "--manifest-path", "fuzz/Cargo.toml", "--check"]))?;
    let lints = ["--workspace", "--all-targets", "--", "-D", "warnings"];
    command::run(cargo(&["clippy", "--quiet"]).args(lints))?;
    let docs = ["doc", "--quiet", "--workspace", "--no-deps", "--document-private-items"];
    command::run(cargo(&docs).env("RUSTDOCFLAGS", "-D warnings"))?;
    let mut deny = Command::new(cargo_tool("cargo-deny")?);
    deny.args(["--log-level", "error", "check", "licenses", "bans", "sources"]);
    command::run(deny.current_dir(workspace()))?;
    println!("check: all in order");
    Ok(())
}
