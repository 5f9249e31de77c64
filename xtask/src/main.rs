//! The tasks behind the Makefile: `cargo xtask TASK`.
#![forbid(unsafe_code)]
#![expect(clippy::print_stdout, reason = "telling what is going on is half of what tasks do")]

mod check;
mod command;
mod demo;
mod experiment;
mod fuzz;
mod packages;
mod pauses;
mod test;

use std::process::ExitCode;

use anyhow::{Result, bail};

const USAGE: &str = "\
cargo xtask TASK

  packages    install the Debian packages that guests and tests need
  demo        a real guest, three pauses, and a wake from the third
  test        all tests, with real guests
  test-host   the tests that need what only some hosts have
  check       formatting, lints, documentation, licences
  bench       the benchmarks that hold our numbers
  fuzz        every fuzz target for a minute; --seconds N, --target NAME
  experiment  ext4-diff-size: what a pause costs by mount options and mkfs; --quick, --draw
  pauses      record the five pauses that benches read, and show them";

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // Not `Debug`: a backtrace helps nobody whose compiler found a fault.
            println!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match arguments[..] {
        ["packages"] => packages::install(),
        ["demo"] => demo::run(),
        ["test"] => test::all(),
        ["test-host"] => test::host(),
        ["check"] => check::run(),
        ["bench"] => test::bench(),
        ["fuzz", ref options @ ..] => fuzz::run(&fuzz::Options::parse(options)?),
        ["experiment", ref options @ ..] => experiment::run(experiment::Mode::parse(options)?),
        ["pauses"] => packages::install().and_then(|()| pauses::record()),
        [] | ["help" | "--help" | "-h"] => {
            println!("{USAGE}");
            Ok(())
        }
        _ => bail!("no task {:?}\n{USAGE}", arguments.join(" ")),
    }
}
