//! `dormouse ext4`: images of file systems, made, read and patched without root.

pub(super) mod build;
mod free;
pub(super) mod image;
pub(super) mod open;
mod patch;
mod tell;

use anyhow::Result;

use crate::app::App;
use crate::cli::ext4::Ext4Command;

pub(super) use free::drop_free;

pub(super) fn run(app: &mut App, command: Ext4Command) -> Result<()> {
    match command {
        Ext4Command::Build(args) => build::run(app, &args),
        Ext4Command::Ls(args) => tell::ls(app, &args),
        Ext4Command::Cat(args) => tell::cat(app, &args),
        Ext4Command::Put(args) => patch::put(app, &args),
        Ext4Command::Rm(args) => patch::rm(app, &args),
        Ext4Command::Free(args) => free::run(app, &args),
    }
}
