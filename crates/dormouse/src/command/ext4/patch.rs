//! `dormouse ext4 put` and `rm`: any ext4 image is changed by one run of debugfs, and checked after.

use std::fs;
use std::io::Write;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result};
use dormouse_ext4::error::ErrorKind;
use dormouse_ext4::read::{Ext4, FileKind, Inode};
use dormouse_ext4::tree::owner::Owner;
use serde::Serialize;

use crate::app::App;
use crate::cli::ext4::{Ext4RmArgs, PutArgs};
use crate::command::ext4::build::pair;
use crate::command::ext4::open::is_stored;
use crate::exit::{Fault, Kind};

#[derive(Serialize)]
struct PatchObject {
    image: String,
    put: Vec<String>,
    removed: Vec<String>,
}

/// Links followed in one path, as the kernel counts them.
const SYMLINKS_MAX: u32 = 40;

/// What is to be where when debugfs is done.
struct Expected {
    path: String,
    kind: FileKind,
    bytes: u64,
    mode: u16,
    owner: Owner,
}

/// One run of debugfs.
#[derive(Default)]
struct Batch {
    commands: String,
    expected: Vec<Expected>,
    gone: Vec<String>,
    /// Folders that will be there.
    made: Vec<String>,
}

pub(super) fn put(app: &mut App, args: &PutArgs) -> Result<()> {
    let files: Vec<(PathBuf, String)> =
        args.files.iter().map(|text| pair(text)).collect::<Result<_>>()?;
    let image = ready(&args.image)?;
    let mut batch = Batch::default();
    for (from, to) in &files {
        let to = real(&image, &absolute(to)?)?;
        batch.parents(&image, &to)?;
        batch.put(&image, from, &to, args)?;
    }
    batch.run(&args.image)?;
    let put = batch.expected.into_iter().map(|expected| expected.path).collect();
    show(app, PatchObject { image: args.image.display().to_string(), put, removed: Vec::new() })
}

pub(super) fn rm(app: &mut App, args: &Ext4RmArgs) -> Result<()> {
    let image = ready(&args.image)?;
    let mut batch = Batch::default();
    for path in &args.paths {
        let path = real(&image, &absolute(path)?)?;
        let found = find(&image, &path)?.ok_or_else(|| {
            Fault::new(Kind::NotFound, format!("{path} is not in {}", args.image.display()))
        })?;
        batch.remove(&image, &path, &found)?;
    }
    batch.run(&args.image)?;
    let removed = batch.gone;
    show(app, PatchObject { image: args.image.display().to_string(), put: Vec::new(), removed })
}

fn show(app: &mut App, object: PatchObject) -> Result<()> {
    if app.json {
        app.out.json(&object)?;
    } else {
        let (put, removed) = (object.put.len(), object.removed.len());
        app.say(&format!("{}: {put} put, {removed} removed; e2fsck is content", object.image));
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
    if !image.was_replayed() {
        return Ok(image);
    }
    check(path, "-p")?;
    open()
}

fn find(image: &Ext4, path: &str) -> Result<Option<Inode>> {
    match image.lookup(path.as_bytes()) {
        Ok(inode) => Ok(Some(inode)),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// The path with one slash before each component.
fn absolute(path: &str) -> Result<String> {
    let parts: Vec<&str> = path.split('/').filter(|part| !part.is_empty()).collect();
    if parts.is_empty() || parts.iter().any(|part| *part == "." || *part == "..") {
        return Err(Fault::usage(format!("{path:?} does not name a file in an image")).into());
    }
    Ok(format!("/{}", parts.join("/")))
}

/// The path without links on the way: `/bin/agent` is `/usr/bin/agent` in most images. What is not
/// there yet stays as it is.
fn real(image: &Ext4, path: &str) -> Result<String> {
    let mut rest: Vec<String> = components(path).rev().map(str::to_owned).collect();
    let mut at = String::new();
    let mut links = 0;
    while let Some(part) = rest.pop() {
        if part == ".." {
            at.truncate(at.rfind('/').unwrap_or(0));
            continue;
        }
        let next = format!("{at}/{part}");
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
            return Err(Fault::usage(format!("{path}: links that lead in a circle")).into());
        }
        let link = String::from_utf8(link)
            .with_context(|| format!("{next} leads to a name that debugfs cannot take"))?;
        if link.starts_with('/') {
            at.clear();
        }
        rest.extend(components(&link).rev().map(str::to_owned));
    }
    Ok(at)
}

fn components(path: &str) -> impl DoubleEndedIterator<Item = &str> {
    path.split('/').filter(|part| !part.is_empty() && *part != ".")
}

/// A path as debugfs reads it. It knows no escapes.
fn quoted(path: &str) -> Result<String> {
    if path.contains(['"', '\n', '\r']) {
        let what = format!("{path:?} has a quote or a line end, which debugfs cannot take");
        return Err(Fault::new(Kind::Unsupported, what).into());
    }
    Ok(format!("\"{path}\""))
}

impl Batch {
    fn add(&mut self, command: &str) {
        self.commands.push_str(command);
        self.commands.push('\n');
    }

    /// Makes the folders that lead to a path and are not there.
    fn parents(&mut self, image: &Ext4, path: &str) -> Result<()> {
        let ends = path.match_indices('/').map(|(at, _)| at).filter(|&at| at > 0);
        for end in ends.collect::<Vec<_>>() {
            let folder = &path[..end];
            if self.made.iter().any(|made| made == folder) {
                continue;
            }
            match find(image, folder)? {
                None => self.folder(folder, 0o755, Owner { uid: 0, gid: 0 })?,
                Some(found) if found.kind == FileKind::Folder => {}
                Some(_) => {
                    let what = format!("{folder} is no folder in the image");
                    return Err(Fault::new(Kind::Refused, what).into());
                }
            }
        }
        Ok(())
    }

    fn folder(&mut self, path: &str, mode: u16, owner: Owner) -> Result<()> {
        self.add(&format!("mkdir {}", quoted(path)?));
        self.attributes(path, FileKind::Folder, 0o040_000, mode, owner, 0)?;
        self.made.push(path.to_owned());
        Ok(())
    }

    fn attributes(
        &mut self,
        path: &str,
        kind: FileKind,
        type_bits: u16,
        mode: u16,
        owner: Owner,
        bytes: u64,
    ) -> Result<()> {
        let name = quoted(path)?;
        self.add(&format!("sif {name} mode 0{:o}", type_bits | mode));
        for (field, id) in [("uid", owner.uid), ("gid", owner.gid)] {
            self.add(&format!("sif {name} {field} {id}"));
        }
        self.expected.push(Expected { path: path.to_owned(), kind, bytes, mode, owner });
        Ok(())
    }

    fn put(&mut self, image: &Ext4, from: &Path, to: &str, args: &PutArgs) -> Result<()> {
        let what = || format!("put {}", from.display());
        let metadata = fs::symlink_metadata(from).with_context(what)?;
        let found = find(image, to)?;
        let mode = u16::try_from(metadata.mode() & 0o7777)?;
        let kind = metadata.file_type();
        if kind.is_dir() {
            match found {
                Some(found) if found.kind == FileKind::Folder => {}
                Some(found) => {
                    self.remove(image, to, &found)?;
                    self.folder(to, mode, args.owner)?;
                }
                None if self.made.iter().any(|made| made == to) => {}
                None => self.folder(to, mode, args.owner)?,
            }
            let mut names: Vec<_> = fs::read_dir(from)
                .with_context(what)?
                .map(|entry| entry.map(|entry| entry.file_name()))
                .collect::<std::io::Result<_>>()
                .with_context(what)?;
            names.sort();
            for name in names {
                let shown = std::str::from_utf8(name.as_bytes()).with_context(what)?;
                self.put(image, &from.join(&name), &format!("{to}/{shown}"), args)?;
            }
            return Ok(());
        }
        if let Some(found) = found {
            if found.kind == FileKind::Folder {
                let what = format!(
                    "{to} is a folder in the image, and {} none; say the name in it, too",
                    from.display()
                );
                return Err(Fault::new(Kind::Refused, what).into());
            }
            self.remove(image, to, &found)?;
            self.gone.retain(|gone| gone != to);
        }
        if kind.is_symlink() {
            let target = fs::read_link(from).with_context(what)?;
            let target = target.to_str().with_context(what)?;
            self.add(&format!("symlink {} {}", quoted(to)?, quoted(target)?));
            let bytes = target.len() as u64;
            self.attributes(to, FileKind::Symlink, 0o120_000, 0o777, args.owner, bytes)
        } else if kind.is_file() {
            let path = fs::canonicalize(from).with_context(what)?;
            let path = path.to_str().with_context(what)?;
            self.add(&format!("write {} {}", quoted(path)?, quoted(to)?));
            let mode = args.mode.unwrap_or(mode);
            self.attributes(to, FileKind::File, 0o100_000, mode, args.owner, metadata.len())
        } else {
            let is_device = kind.is_block_device() || kind.is_char_device();
            let what = if is_device { "a device" } else { "a pipe or socket" };
            let what = format!("{} is {what}; files, folders and links can be put", from.display());
            Err(Fault::new(Kind::Unsupported, what).into())
        }
    }

    fn remove(&mut self, image: &Ext4, path: &str, found: &Inode) -> Result<()> {
        if found.kind != FileKind::Folder {
            self.add(&format!("rm {}", quoted(path)?));
        } else {
            for entry in image.entries(found)? {
                let name = String::from_utf8(entry.name)
                    .with_context(|| format!("a name in {path} that debugfs cannot take"))?;
                let below = image.inode(entry.inode)?;
                self.remove(image, &format!("{path}/{name}"), &below)?;
            }
            self.add(&format!("rmdir {}", quoted(path)?));
        }
        self.gone.push(path.to_owned());
        Ok(())
    }

    /// Runs debugfs, and believes its work only after looking.
    fn run(&self, path: &Path) -> Result<()> {
        let mut child = Command::new("debugfs")
            .args(["-w", "-f", "-"])
            .arg(path)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .context("start debugfs, which is part of e2fsprogs")?;
        let mut stdin = child.stdin.take().context("debugfs has no input")?;
        let commands = self.commands.clone();
        // It may write errors before it has read all.
        let writer = std::thread::spawn(move || stdin.write_all(commands.as_bytes()));
        let output = child.wait_with_output().context("wait for debugfs")?;
        let written = writer.join();
        let said = String::from_utf8_lossy(&output.stderr);
        // The first line is its version.
        let said: Vec<&str> = said.lines().skip(1).collect();
        if !output.status.success() || !said.is_empty() || !matches!(written, Ok(Ok(()))) {
            let what = format!("debugfs failed: {}", said.join("; "));
            return Err(Fault::new(Kind::Other, what).into());
        }
        check(path, "-fn")?;
        self.look(path)
    }

    fn look(&self, path: &Path) -> Result<()> {
        let image = Ext4::open_file(fs::File::open(path)?)?;
        for expected in &self.expected {
            let found = find(&image, &expected.path)?;
            let is_there = found.is_some_and(|found| {
                let owner = Owner { uid: found.attributes.uid, gid: found.attributes.gid };
                found.kind == expected.kind
                    && found.attributes.mode == expected.mode
                    && owner == expected.owner
                    && (found.kind == FileKind::Folder || found.bytes == expected.bytes)
            });
            if !is_there {
                let what = format!("debugfs did not put {} as it should be", expected.path);
                return Err(Fault::new(Kind::Other, what).into());
            }
        }
        for gone in &self.gone {
            if find(&image, gone)?.is_some() {
                let what = format!("debugfs did not remove {gone}");
                return Err(Fault::new(Kind::Other, what).into());
            }
        }
        Ok(())
    }
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
