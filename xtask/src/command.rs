//! Running programs the way a reader would: said first, with their output in place.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

/// The top of the workspace.
pub(crate) fn workspace() -> PathBuf {
    let own = Path::new(env!("CARGO_MANIFEST_DIR"));
    own.parent().unwrap_or(own).to_owned()
}

/// Where cargo puts what it builds, and we what we make.
pub(crate) fn target_dir() -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| workspace().join("target"), PathBuf::from)
}

/// `cargo` at the top of the workspace.
pub(crate) fn cargo(arguments: &[&str]) -> Command {
    let mut command = Command::new("cargo");
    command.args(arguments).current_dir(workspace());
    command
}

/// A program that runs as root: directly, or through `sudo`.
pub(crate) fn privileged(program: &str) -> Command {
    if rustix::process::geteuid().is_root() {
        return Command::new(program);
    }
    let mut command = Command::new("sudo");
    command.arg(program);
    command
}

/// Says what is run, runs it, and fails if it fails.
pub(crate) fn run(command: &mut Command) -> Result<()> {
    let words: Vec<_> = std::iter::once(command.get_program())
        .chain(command.get_args())
        .map(|word| word.to_string_lossy())
        .collect();
    let line = words.join(" ");
    println!("xtask: {line}");
    let status = command.status().with_context(|| format!("cannot start {line}"))?;
    if !status.success() {
        bail!("{line}: {status}");
    }
    Ok(())
}

/// Runs a program silently and returns its stdout.
pub(crate) fn output_of(command: &mut Command) -> Result<String> {
    let shown = format!("{command:?}");
    let output =
        command.stdin(Stdio::null()).output().with_context(|| format!("cannot start {shown}"))?;
    if !output.status.success() {
        bail!("{shown}: {}\n{}", output.status, String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// The program in PATH, or in our own `target/tools/bin`.
pub(crate) fn find_program(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain([target_dir().join("tools/bin")])
        .map(|folder| folder.join(name))
        .find(|candidate| candidate.is_file())
}

/// A cargo subcommand's program, built from source into `target/tools` if the machine has none.
pub(crate) fn cargo_tool(name: &str) -> Result<PathBuf> {
    if let Some(program) = find_program(name) {
        return Ok(program);
    }
    println!("xtask: {name} is not installed, building it once into target/tools (some minutes)");
    let root = target_dir().join("tools");
    run(cargo(&["install", "--quiet", "--locked", name, "--root"]).arg(&root))?;
    find_program(name).with_context(|| format!("cargo installed no {name}"))
}
