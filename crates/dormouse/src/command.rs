//! A file per verb: takes the parsed arguments, calls the library, shows what came of it.

mod cat;
mod clone;
mod commit;
mod compact;
mod completions;
mod daemon;
mod diff;
pub(crate) mod disk;
mod du;
mod export;
mod export_as;
mod ext4;
pub(crate) mod gc;
mod hold;
mod import;
mod init;
mod log;
pub(crate) mod ls;
mod man;
mod map;
mod mount;
mod prune;
mod punch;
pub(crate) mod rm;
pub(crate) mod serve;
pub(crate) mod show;
mod trace;
mod verify;
pub(crate) mod vm;
mod work_disk;

use std::process::ExitCode;

use anyhow::Result;

use crate::app::App;
use crate::cli::{Command, TraceCommand};
use crate::live::memory::Successor;

/// Runs a verb. What it printed may still be in the buffer of `app.out`.
pub(crate) fn run(app: &mut App, command: Command) -> Result<ExitCode> {
    match command {
        Command::Init => init::run(app),
        Command::Commit(args) => commit::run(app, *args),
        Command::Ls(args) => ls::run(app, &args),
        Command::Show(args) => show::run(app, &args),
        Command::Log(args) => log::run(app, &args),
        Command::Diff(args) => diff::run(app, &args),
        Command::Du(args) => du::run(app, &args),
        Command::Map(args) => map::run(app, &args),
        Command::Export(args) => export::run(app, &args),
        Command::Import(args) => import::run(app, *args),
        Command::Detect(args) => return import::detect(app, &args),
        Command::Have => import::have(app),
        Command::Cat(args) => cat::run(app, &args),
        Command::Verify(args) => return verify::run(app, args),
        Command::Rm(args) => rm::run(app, &args),
        Command::Prune(args) => prune::run(app, &args),
        Command::Gc(args) => gc::run(app, &args),
        Command::Compact(args) => compact::run(app, &args),
        Command::Punch(args) => return punch::run(app, &args),
        Command::Disk(command) => disk::run(app, command),
        Command::Serve(command) => return serve::run(app, command),
        Command::Trace(TraceCommand::Show(args)) => trace::show(app, &args),
        Command::Ext4(command) => ext4::run(app, command),
        Command::WorkDisk(command) => work_disk::run(app, &command),
        Command::Clone(args) => clone::run(app, &args),
        Command::Mount(args) => return mount::run(app, &args),
        Command::Hold { socket, log, successor } => {
            hold::run(&socket, Successor { arguments: successor, log })
        }
        Command::Recover => vm::recover(app),
        Command::Run(args) => vm::run(app, &args),
        Command::Sleep(args) => return vm::sleep(app, &args),
        Command::Wake(args) => vm::wake(app, &args),
        Command::Fork(args) => vm::fork(app, &args),
        Command::Ps => vm::ps(app),
        Command::Inspect(args) => vm::inspect(app, &args),
        Command::Kill(args) => vm::kill(app, &args),
        Command::Logs(args) => vm::logs(app, &args),
        Command::Daemon(args) => daemon::run(app, &args),
        Command::Completions(args) => completions::run(app, &args),
        Command::Man(args) => man::run(app, &args),
    }
    .map(|()| ExitCode::SUCCESS)
}
