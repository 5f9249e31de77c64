//! `dormouse ext4 put` and `rm`: any ext4 image is changed by one run of debugfs, and checked after.
//!
//! Nothing is changed before it is clear that all of it can be: the image is in use by nobody that
//! can be seen, sources can be read, names can be said to debugfs, and there is room.

mod batch;
mod in_use;
mod room;

use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result};
use dormouse_ext4::error::ErrorKind;
use dormouse_ext4::read::{Ext4, FileKind, Inode};
use serde::Serialize;

use crate::app::App;
use crate::cli::ext4::{Ext4RmArgs, PutArgs};
use crate::command::ext4::build::pair;
use crate::command::ext4::open::is_stored;
use crate::command::ext4::patch::batch::Batch;
use crate::exit::{Fault, Kind};

#[derive(Serialize)]
struct PatchObject {
    image: String,
    put: Vec<String>,
    removed: Vec<String>,
}

/// Links followed in one path, as the kernel counts them.
const SYMLINKS_MAX: u32 = 40;

pub(super) fn put(app: &mut App, args: &PutArgs) -> Result<()> {
    let files: Vec<(PathBuf, String)> =
        args.files.iter().map(|text| pair(text)).collect::<Result<_>>()?;
    let image = ready(&args.image)?;
    let mut batch = Batch::new(&image);
    for (from, to) in &files {
        let to = real(&image, &absolute(to.as_bytes())?)?;
        batch.parents(&to)?;
        batch.put(from, &to, args)?;
    }
    batch.check_room(&args.image)?;
    let done = batch.run(&args.image)?;
    show(app, &args.image, done.put, Vec::new())
}

pub(super) fn rm(app: &mut App, args: &Ext4RmArgs) -> Result<()> {
    let image = ready(&args.image)?;
    let mut batch = Batch::new(&image);
    for path in &args.paths {
        let path = real(&image, &absolute(path.as_bytes())?)?;
        let found = find(&image, &path)?.ok_or_else(|| {
            let what = format!("{} is not in {}", shown(&path), args.image.display());
            Fault::new(Kind::NotFound, what)
        })?;
        batch.remove(&path, &found)?;
    }
    let done = batch.run(&args.image)?;
    show(app, &args.image, Vec::new(), done.removed)
}

fn show(app: &mut App, image: &Path, put: Vec<Vec<u8>>, removed: Vec<Vec<u8>>) -> Result<()> {
    let [put, removed] =
        [put, removed].map(|paths| paths.iter().map(|path| shown(path)).collect::<Vec<_>>());
    let image = image.display().to_string();
    if app.json {
        app.out.json(&PatchObject { image, put, removed })?;
    } else {
        let (put, removed) = (put.len(), removed.len());
        app.say(&format!("{image}: {put} put, {removed} removed; e2fsck is content"));
    }
    Ok(())
}

/// Opens an image that can be changed: its journal is replayed by e2fsck first.
fn ready(path: &Path) -> Result<Ext4> {
    if path.to_str().is_some_and(is_stored) {
        let shown = path.display();
        let what = format!(
            "{shown} is in a snapshot, and snapshots never change; `dormouse export {shown} FILE` \
             makes a file that can be patched"
        );
        return Err(Fault::new(Kind::Refused, what).into());
    }
    let open = || -> Result<Ext4> {
        let file = fs::File::open(path).with_context(|| format!("open {}", path.display()))?;
        Ext4::open_file(file).with_context(|| format!("open {}", path.display()))
    };
    let image = open()?;
    if let Some(device) = in_use::loop_device(path)? {
        let what = format!(
            "{} is behind {device}, and whoever uses that would not see the change, or undo it; \
             unmount it and `losetup -d {device}` first",
            path.display()
        );
        return Err(Fault::new(Kind::Busy, what).into());
    }
    if !image.was_replayed() {
        return Ok(image);
    }
    check(path, "-p")?;
    open()
}

fn find(image: &Ext4, path: &[u8]) -> Result<Option<Inode>> {
    match image.lookup(path) {
        Ok(inode) => Ok(Some(inode)),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// A path as messages have it.
fn shown(path: &[u8]) -> String {
    String::from_utf8_lossy(path).into_owned()
}

/// The path with one slash before each component.
fn absolute(path: &[u8]) -> Result<Vec<u8>> {
    let parts: Vec<&[u8]> =
        path.split(|&byte| byte == b'/').filter(|part| !part.is_empty()).collect();
    if parts.is_empty() || parts.iter().any(|part| *part == b"." || *part == b"..") {
        let what = format!("{:?} does not name a file in an image", shown(path));
        return Err(Fault::usage(what).into());
    }
    Ok(parts.into_iter().fold(Vec::new(), |path, part| joined(&path, part)))
}

fn joined(folder: &[u8], name: &[u8]) -> Vec<u8> {
    [folder, b"/", name].concat()
}

/// The path without links on the way: `/bin/agent` is `/usr/bin/agent` in most images. What is not
/// there yet stays as it is.
fn real(image: &Ext4, path: &[u8]) -> Result<Vec<u8>> {
    let mut rest: Vec<Vec<u8>> = components(path).rev().map(<[u8]>::to_vec).collect();
    let mut at = Vec::new();
    let mut links = 0;
    while let Some(part) = rest.pop() {
        if part == b".." {
            at.truncate(at.iter().rposition(|&byte| byte == b'/').unwrap_or(0));
            continue;
        }
        let next = joined(&at, &part);
        let is_last = rest.is_empty();
        let link = match find(image, &next)? {
            Some(found) if found.kind == FileKind::Symlink && !is_last => image.target(&found)?,
            _ => {
                at = next;
                continue;
            }
        };
        links += 1;
        if links > SYMLINKS_MAX {
            let what = format!("{}: links that lead in a circle", shown(path));
            return Err(Fault::usage(what).into());
        }
        if link.starts_with(b"/") {
            at.clear();
        }
        rest.extend(components(&link).rev().map(<[u8]>::to_vec));
    }
    Ok(at)
}

fn components(path: &[u8]) -> impl DoubleEndedIterator<Item = &[u8]> {
    path.split(|&byte| byte == b'/').filter(|part| !part.is_empty() && *part != b".")
}

/// Runs e2fsck; the file system must be whole, or have been mended without questions.
fn check(path: &Path, option: &str) -> Result<()> {
    let output = Command::new("e2fsck")
        .arg(option)
        .arg(path)
        .stdin(Stdio::null())
        .output()
        .context("start e2fsck, which is part of e2fsprogs")?;
    // 1 says that it mended, which `-n` never does.
    let mended = option != "-fn" && output.status.code() == Some(1);
    if output.status.success() || mended {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stdout);
    let said: Vec<&str> = said.lines().collect();
    Err(Fault::new(Kind::Corrupt, format!("e2fsck: {}", said.join("; "))).into())
}
