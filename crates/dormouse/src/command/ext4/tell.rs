//! `dormouse ext4 ls` and `cat`: what is in an image.

use std::io::Write;
use std::os::unix::ffi::OsStrExt;

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
    /// The name's bytes, where they are no UTF-8.
    #[serde(skip_serializing_if = "Option::is_none")]
    name_hex: Option<String>,
    kind: char,
    mode: u16,
    uid: u32,
    gid: u32,
    links: u16,
    size_bytes: u64,
    mtime: Timestamp,
    target: Option<String>,
    /// The target's bytes, where they are no UTF-8.
    #[serde(skip_serializing_if = "Option::is_none")]
    target_hex: Option<String>,
}

#[derive(Serialize)]
struct LsObject {
    image: String,
    path: String,
    entries: Vec<EntryRow>,
}

/// What is listed, by its real name.
struct Entry {
    name: Vec<u8>,
    target: Option<Vec<u8>>,
    inode: Inode,
}

pub(super) fn ls(app: &mut App, args: &Ext4PathArgs) -> Result<()> {
    let image = open(app, &args.image)?;
    let path = args.path.as_bytes();
    let found = image.lookup(path)?;
    let mut entries = Vec::new();
    if found.kind == FileKind::Folder {
        for entry in image.entries(&found)? {
            let inode = image.inode(entry.inode)?;
            entries.push(entry_of(&image, entry.name, inode)?);
        }
        entries.sort_by(|a, b| a.name.cmp(&b.name));
    } else {
        let name = path.rsplit(|&byte| byte == b'/').next().unwrap_or(path);
        entries.push(entry_of(&image, name.to_vec(), found)?);
    }
    if app.json {
        let entries = entries.iter().map(row).collect::<Result<_>>()?;
        let path = String::from_utf8_lossy(path).into_owned();
        app.out.json(&LsObject { image: args.image.clone(), path, entries })?;
        return Ok(());
    }
    for Entry { name, target, inode } in entries {
        let (kind, attributes) = (inode.kind.letter(), inode.attributes);
        write!(
            app.out,
            "{kind}{:04o} {:>4} {:>5} {:>5} {:>12} {}",
            attributes.mode,
            inode.links,
            attributes.uid,
            attributes.gid,
            inode.bytes,
            shown(&name)
        )?;
        match target {
            Some(target) => writeln!(app.out, " -> {}", shown(&target))?,
            None => writeln!(app.out)?,
        }
    }
    Ok(())
}

fn entry_of(image: &Ext4, name: Vec<u8>, inode: Inode) -> Result<Entry> {
    let target = match inode.kind {
        FileKind::Symlink => Some(image.target(&inode)?),
        _ => None,
    };
    Ok(Entry { name, target, inode })
}

fn row(entry: &Entry) -> Result<EntryRow> {
    let Entry { name, target, inode } = entry;
    let text = |bytes: &Vec<u8>| String::from_utf8_lossy(bytes).into_owned();
    Ok(EntryRow {
        name: text(name),
        name_hex: hex_unless_text(name),
        kind: inode.kind.letter(),
        mode: inode.attributes.mode,
        uid: inode.attributes.uid,
        gid: inode.attributes.gid,
        links: inode.links,
        size_bytes: inode.bytes,
        mtime: timestamp(inode)?,
        target: target.as_ref().map(text),
        target_hex: target.as_deref().and_then(hex_unless_text),
    })
}

/// The bytes of what JSON has no text for.
fn hex_unless_text(bytes: &[u8]) -> Option<String> {
    std::str::from_utf8(bytes).err()?;
    Some(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
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
        let what = format!("{} is no regular file", args.path.display());
        return Err(Fault::usage(what).into());
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
