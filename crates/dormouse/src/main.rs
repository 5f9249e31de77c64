//! The `dormouse` command: parsing, wiring and output over the library; no algorithm.
//!
//! [`cli`] says what can be typed, [`command`] has a file per verb, [`output`] and [`progress`] say
//! how results and long work are shown, and [`exit`] what a failure means to a script.
#![forbid(unsafe_code)]

mod app;
mod background;
mod cli;
mod command;
mod daemon;
mod exit;
mod live;
mod mount;
mod output;
mod progress;
mod reaper;
mod segment;
mod vm;

use std::process::ExitCode;

use clap::Parser;

use crate::app::App;
use crate::cli::Cli;

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return exit::parsing_failed(&error),
    };
    app::log_to_stderr(&cli);
    let mut app = App::new(&cli);
    let result = command::run(&mut app, cli.command).and_then(|code| {
        app.out.finish()?;
        Ok(code)
    });
    match result {
        Ok(code) => code,
        // `dormouse cat … | head` got what it wanted.
        Err(_) if app.out.is_closed() => ExitCode::SUCCESS,
        Err(error) => exit::report(&error, app.json),
    }
}
