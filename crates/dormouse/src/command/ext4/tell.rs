//! `dormouse ext4 ls` and `cat`: what is in an image.

use std::io::Write;

use anyhow::{Context, Result};
use dormouse_ext4::read::{Ext4, FileKind, Inode};
use jiff::Timestamp;
use serde::Serialize;

use crate::app::App;
use crate::cli::ext4::Ext4PathArgs;
use crate::command::ext4::open::open;
use crate::exit::Fault;

/// Printed at once.
const PIECE_BYTES: u64 = 1 << 20;

#[derive(Serialize)]
struct EntryRow {
    name: String,
    kind: char,
    mode: u16,
    uid: u32,
    gid: u32,
    links: u16,
    size_bytes: u64,
    mtime: Timestamp,
    target: Option<String>,
}

#[derive(Serialize)]
struct LsObject {
    image: String,
    path: String,
    entries: Vec<EntryRow>,
}

pub(super) fn ls(app: &mut App, args: &Ext4PathArgs) -> Result<()> {
    let image = open(app, &args.image)?;
    let found = image.lookup(args.path.as_bytes())?;
    let mut entries = Vec::new();
    if found.kind == FileKind::Folder {
        for entry in image.entries(&found)? {
            let inode = image.inode(entry.inode)?;
            entries.push(row(&image, &entry.name, &inode)?);
        }
        entries.sort_by(|a, b| a.name.cmp(&b.name));
    } else {
        let name = args.path.rsplit('/').next().unwrap_or(&args.path);
        entries.push(row(&image, name.as_bytes(), &found)?);
    }
    if app.json {
        let object = LsObject { image: args.image.clone(), path: args.path.clone(), entries };
        app.out.json(&object)?;
        return Ok(());
    }
    for entry in entries {
        let EntryRow { kind, mode, links, uid, gid, size_bytes, name, .. } = &entry;
        write!(app.out, "{kind}{mode:04o} {links:>4} {uid:>5} {gid:>5} {size_bytes:>12} {name}")?;
        match &entry.target {
            Some(target) => writeln!(app.out, " -> {target}")?,
            None => writeln!(app.out)?,
        }
    }
    Ok(())
}

fn row(image: &Ext4, name: &[u8], inode: &Inode) -> Result<EntryRow> {
    let target = match inode.kind {
        FileKind::Symlink => Some(shown(&image.target(inode)?)),
        _ => None,
    };
    Ok(EntryRow {
        name: shown(name),
        kind: inode.kind.letter(),
        mode: inode.attributes.mode,
        uid: inode.attributes.uid,
        gid: inode.attributes.gid,
        links: inode.links,
        size_bytes: inode.bytes,
        mtime: timestamp(inode)?,
        target,
    })
}

fn timestamp(inode: &Inode) -> Result<Timestamp> {
    let mtime = inode.attributes.mtime;
    Ok(Timestamp::new(mtime.seconds, mtime.nanoseconds.try_into()?)?)
}

/// A name from an image, without what would drive a terminal.
fn shown(name: &[u8]) -> String {
    let text = String::from_utf8_lossy(name);
    text.chars()
        .flat_map(|char| {
            let escaped: Vec<char> =
                if char.is_control() { char.escape_default().collect() } else { vec![char] };
            escaped
        })
        .collect()
}

pub(super) fn cat(app: &mut App, args: &Ext4PathArgs) -> Result<()> {
    if app.json {
        return Err(Fault::usage("cat prints the file itself, so --json has no place").into());
    }
    let image = open(app, &args.image)?;
    let inode = image.lookup(args.path.as_bytes())?;
    if inode.kind != FileKind::File {
        return Err(Fault::usage(format!("{} is no regular file", args.path)).into());
    }
    let mut at = 0;
    let mut buffer = vec![0; usize::try_from(PIECE_BYTES)?];
    while at < inode.bytes {
        let len = usize::try_from((inode.bytes - at).min(PIECE_BYTES))?;
        image.read(&inode, &mut buffer[..len], at)?;
        app.out.write_all(&buffer[..len]).context("write to standard output")?;
        at += len as u64;
    }
    app.out.flush()?;
    Ok(())
}
