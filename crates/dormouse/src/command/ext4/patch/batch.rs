//! One run of debugfs: what it is told, what must be there after it, and what to do if it is not.

use std::collections::{HashMap, HashSet};
use std::fs::{self, File, Metadata};
use std::io::Write;
use std::mem;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result};
use dormouse_ext4::free::Room;
use dormouse_ext4::input::folder;
use dormouse_ext4::read::{Ext4, FileKind, Inode};
use dormouse_ext4::tree::owner::Owner;
use dormouse_ext4::tree::{Time, Xattr};
use dormouse_sys::sparse::data_extents;

use super::room::Need;
use super::{check, find, joined, shown};
use crate::cli::ext4::PutArgs;
use crate::exit::{Fault, Kind};

/// The longest command: debugfs reads lines into 8 KiB.
const COMMAND_BYTES_MAX: usize = 8000;

/// The header of a block of extended attributes, and the zeros at the end of its entries.
const XATTR_BLOCK_HEADER_BYTES: usize = 32 + 4;

/// Inodes of this length have no room for more than whole seconds.
const OLD_INODE_BYTES: u64 = 128;

/// The first and the last second that an inode can have.
const SECONDS: [i64; 2] = [-(1 << 31), (1 << 34) - (1 << 31) - 1];

/// What is to be where when debugfs is done.
struct Expected {
    path: Vec<u8>,
    kind: FileKind,
    bytes: u64,
    mode: u16,
    owner: Owner,
    /// Of a folder that leads to what is put nobody asks.
    mtime: Option<Time>,
    xattrs: Vec<Xattr>,
    /// Another name of the file that was put there.
    link_of: Option<Vec<u8>>,
}

/// A file with several names among those that are put.
struct Linked {
    path: Vec<u8>,
    names: u32,
}

/// What was done.
pub(super) struct Done {
    pub(super) put: Vec<Vec<u8>>,
    pub(super) removed: Vec<Vec<u8>>,
}

/// One run of debugfs.
pub(super) struct Batch<'a> {
    image: &'a Ext4,
    room: Room,
    need: Need,
    commands: Vec<u8>,
    expected: Vec<Expected>,
    /// All paths of those.
    targets: HashSet<Vec<u8>>,
    gone: Vec<Vec<u8>>,
    /// Folders that will be there.
    made: HashSet<Vec<u8>>,
    /// Whether anything that the image holds is removed or replaced.
    removes: bool,
    /// By device and inode outside.
    links: HashMap<(u64, u64), Linked>,
    /// How many names come into a folder, and how long they are.
    names: HashMap<Vec<u8>, (u64, u64)>,
}

/// An argument as debugfs reads it. It knows no escapes.
fn quoted(path: &[u8]) -> Result<Vec<u8>> {
    if path.iter().any(|byte| b"\"\n\r".contains(byte)) {
        let what =
            format!("{:?} has a quote or a line end, which debugfs cannot take", shown(path));
        return Err(Fault::new(Kind::Unsupported, what).into());
    }
    Ok([b"\"", path, b"\""].concat())
}

/// A value as `ea_set` reads it: all bytes in octal.
fn escaped(value: &[u8]) -> Vec<u8> {
    let digits = value.iter().flat_map(|byte| format!("\\{byte:03o}").into_bytes());
    [b'"'].into_iter().chain(digits).chain([b'"']).collect()
}

impl<'a> Batch<'a> {
    pub(super) fn new(image: &'a Ext4) -> Batch<'a> {
        let room = image.room();
        Batch {
            image,
            need: Need::new(&room),
            room,
            commands: Vec::new(),
            expected: Vec::new(),
            targets: HashSet::new(),
            gone: Vec::new(),
            made: HashSet::new(),
            removes: false,
            links: HashMap::new(),
            names: HashMap::new(),
        }
    }

    fn add(&mut self, words: &[&[u8]]) -> Result<()> {
        let command = words.join(&b' ');
        if command.len() > COMMAND_BYTES_MAX {
            let what = format!("{:.200}…: longer than what debugfs reads", shown(&command));
            return Err(Fault::new(Kind::Unsupported, what).into());
        }
        self.commands.extend_from_slice(&command);
        self.commands.push(b'\n');
        Ok(())
    }

    /// Makes the folders that lead to a path and are not there.
    pub(super) fn parents(&mut self, path: &[u8]) -> Result<()> {
        let ends = (1..path.len()).filter(|&at| path[at] == b'/');
        for end in ends {
            let folder = &path[..end];
            if self.made.contains(folder) {
                continue;
            }
            let is_folder = match find(self.image, folder)? {
                _ if self.targets.contains(folder) => false,
                None => {
                    self.folder(folder, 0o755, Owner { uid: 0, gid: 0 }, None)?;
                    continue;
                }
                Some(found) => found.kind == FileKind::Folder,
            };
            if !is_folder {
                let what = format!("{} is no folder in the image", shown(folder));
                return Err(Fault::new(Kind::Refused, what).into());
            }
        }
        Ok(())
    }

    /// Makes a folder; `source` is the one outside that it is made after.
    fn folder(
        &mut self,
        path: &[u8],
        mode: u16,
        owner: Owner,
        source: Option<(&Path, &Metadata)>,
    ) -> Result<()> {
        self.new_name(path)?;
        self.need.inode(1);
        self.add(&[b"mkdir", &quoted(path)?])?;
        self.made.insert(path.to_vec());
        let (mtime, xattrs) = match source {
            Some((from, metadata)) => (Some(mtime_of(metadata)), folder::xattrs(from)?),
            None => (None, Vec::new()),
        };
        self.attributes(Expected {
            path: path.to_vec(),
            kind: FileKind::Folder,
            bytes: 0,
            mode,
            owner,
            mtime,
            xattrs,
            link_of: None,
        })
    }

    /// Notes a path that will be new.
    fn new_name(&mut self, path: &[u8]) -> Result<()> {
        if !self.targets.insert(path.to_vec()) {
            let what = format!("two files are to be put at {}", shown(path));
            return Err(Fault::usage(what).into());
        }
        let slash = path.iter().rposition(|&byte| byte == b'/').unwrap_or(0);
        let (count, bytes) = self.names.entry(path[..slash].to_vec()).or_default();
        *count += 1;
        *bytes += (path.len() - slash) as u64;
        Ok(())
    }

    fn attributes(&mut self, expected: Expected) -> Result<()> {
        let type_bits = match expected.kind {
            FileKind::Folder => 0o040_000,
            FileKind::Symlink => 0o120_000,
            _ => 0o100_000,
        };
        let name = quoted(&expected.path)?;
        let mut set = |field: &str, value: String| {
            self.add(&[b"sif", &name, field.as_bytes(), value.as_bytes()])
        };
        set("mode", format!("0{:o}", type_bits | expected.mode))?;
        set("uid", expected.owner.uid.to_string())?;
        set("gid", expected.owner.gid.to_string())?;
        for xattr in &expected.xattrs {
            let attribute = quoted(&xattr.name)?;
            self.add(&[b"ea_set", &name, &attribute, &escaped(&xattr.value)])?;
        }
        if !expected.xattrs.is_empty() {
            self.check_xattrs(&expected)?;
            self.need.xattrs();
        }
        if let Some(mtime) = expected.mtime {
            self.time(&name, mtime)?;
        }
        self.expected.push(expected);
        Ok(())
    }

    /// Fails unless the image has room for the attributes of a file in one block.
    fn check_xattrs(&self, expected: &Expected) -> Result<()> {
        let what = || format!("put {}", shown(&expected.path));
        let mut bytes = XATTR_BLOCK_HEADER_BYTES as u64;
        for xattr in &expected.xattrs {
            bytes += xattr.stored_bytes().with_context(what)? as u64;
        }
        if bytes > self.image.block_bytes() {
            let what = format!(
                "{}: its extended attributes take {bytes} bytes, and the image has room for {}",
                what(),
                self.image.block_bytes()
            );
            return Err(Fault::new(Kind::Refused, what).into());
        }
        Ok(())
    }

    /// When the content was changed last: 32 bits, and above the nanoseconds two more.
    fn time(&mut self, name: &[u8], mtime: Time) -> Result<()> {
        let seconds = mtime.seconds.clamp(SECONDS[0], SECONDS[1]);
        let low = seconds.rem_euclid(1 << 32);
        self.add(&[b"sif", name, b"mtime", format!("@{low}").as_bytes()])?;
        if self.image.inode_bytes() > OLD_INODE_BYTES {
            let epoch = (seconds - SECONDS[0]) >> 32;
            let extra = u64::from(mtime.nanoseconds) << 2 | u64::try_from(epoch).unwrap_or(0);
            self.add(&[b"sif", name, b"mtime_extra", extra.to_string().as_bytes()])?;
        }
        Ok(())
    }

    pub(super) fn put(&mut self, from: &Path, to: &[u8], args: &PutArgs) -> Result<()> {
        let what = || format!("put {}", from.display());
        let metadata = fs::symlink_metadata(from).with_context(what)?;
        let found = match self.made.contains(to) {
            true => None,
            false => find(self.image, to)?,
        };
        let mode = u16::try_from(metadata.mode() & 0o7777)?;
        let kind = metadata.file_type();
        if kind.is_dir() {
            let is_new = match found {
                Some(found) if found.kind != FileKind::Folder => {
                    self.replace(to, &found)?;
                    true
                }
                Some(_) => false,
                None => !self.made.contains(to),
            };
            if is_new {
                self.folder(to, mode, args.owner, Some((from, &metadata)))?;
            }
            let mut names: Vec<_> = fs::read_dir(from)
                .with_context(what)?
                .map(|entry| entry.map(|entry| entry.file_name()))
                .collect::<std::io::Result<_>>()
                .with_context(what)?;
            names.sort();
            for name in names {
                self.put(&from.join(&name), &joined(to, name.as_bytes()), args)?;
            }
            if is_new {
                // Once more, as what was put into it may have changed it.
                self.time(&quoted(to)?, mtime_of(&metadata))?;
            }
            return Ok(());
        }
        let is_folder = found.as_ref().is_some_and(|found| found.kind == FileKind::Folder);
        if is_folder || self.made.contains(to) {
            let what = format!(
                "{} is a folder in the image, and {} none; say the name in it, too",
                shown(to),
                from.display()
            );
            return Err(Fault::new(Kind::Refused, what).into());
        }
        if let Some(found) = found.filter(|_| !self.targets.contains(to)) {
            self.replace(to, &found)?;
        }
        self.new_name(to)?;
        let mut expected = Expected {
            path: to.to_vec(),
            kind: FileKind::File,
            bytes: metadata.len(),
            mode: args.mode.unwrap_or(mode),
            owner: args.owner,
            mtime: Some(mtime_of(&metadata)),
            xattrs: Vec::new(),
            link_of: None,
        };
        if !(kind.is_symlink() || kind.is_file()) {
            let is_device = kind.is_block_device() || kind.is_char_device();
            let what = if is_device { "a device" } else { "a pipe or socket" };
            let what = format!("{} is {what}; files, folders and links can be put", from.display());
            return Err(Fault::new(Kind::Unsupported, what).into());
        }
        if metadata.nlink() > 1 {
            let id = (metadata.dev(), metadata.ino());
            if let Some(linked) = self.links.get_mut(&id) {
                linked.names += 1;
                let (first, names) = (linked.path.clone(), linked.names);
                return self.link(&first, names, expected);
            }
            self.links.insert(id, Linked { path: to.to_vec(), names: 1 });
        }
        expected.xattrs = folder::xattrs(from)?;
        if kind.is_symlink() {
            let target = fs::read_link(from).with_context(what)?;
            let target = target.as_os_str().as_bytes();
            self.add(&[b"symlink", &quoted(to)?, &quoted(target)?])?;
            self.need.inode(target.len() as u64);
            expected.kind = FileKind::Symlink;
            expected.bytes = target.len() as u64;
            expected.mode = 0o777;
        } else {
            // What cannot be read shall be known before anything is changed.
            let file = File::open(from).with_context(what)?;
            let mut data = 0;
            for extent in data_extents(&file, 0..metadata.len()) {
                let extent = extent.with_context(what)?;
                let unit = self.room.unit_bytes;
                data += (extent.end.div_ceil(unit) - extent.start / unit) * unit;
            }
            self.need.inode(data);
            let path = fs::canonicalize(from).with_context(what)?;
            self.add(&[b"write", &quoted(path.as_os_str().as_bytes())?, &quoted(to)?])?;
        }
        self.attributes(expected)
    }

    /// Gives a file that was put a further name.
    fn link(&mut self, first: &[u8], names: u32, mut expected: Expected) -> Result<()> {
        let (old, new) = (quoted(first)?, quoted(&expected.path)?);
        // `ln` does not make a folder longer, but `symlink` does, and leaves the place.
        self.need.inode(0);
        self.add(&[b"symlink", &new, b"x"])?;
        self.add(&[b"rm", &new])?;
        self.need.less(0, 1);
        // Counted first, so that taking half of it back frees nothing that has a name.
        self.add(&[b"sif", &old, b"links_count", names.to_string().as_bytes()])?;
        self.add(&[b"ln", &old, &new])?;
        if let Some(put) = self.expected.iter().find(|put| put.path == first) {
            expected.kind = put.kind;
            expected.bytes = put.bytes;
            expected.mode = put.mode;
            expected.xattrs = put.xattrs.clone();
        }
        expected.link_of = Some(first.to_vec());
        self.expected.push(expected);
        Ok(())
    }

    fn replace(&mut self, path: &[u8], found: &Inode) -> Result<()> {
        self.remove(path, found)?;
        self.gone.retain(|gone| gone != path);
        Ok(())
    }

    pub(super) fn remove(&mut self, path: &[u8], found: &Inode) -> Result<()> {
        self.removes = true;
        if found.kind != FileKind::Folder {
            self.add(&[b"rm", &quoted(path)?])?;
            if found.links == 1 {
                // What cannot be told, such as of a file in its own inode, is none.
                let runs = self.image.runs(found).unwrap_or_default();
                let bytes: u64 = runs.iter().map(|run| run.blocks * self.image.block_bytes()).sum();
                self.need.less(bytes / self.room.unit_bytes, 1);
            }
        } else {
            for entry in self.image.entries(found)? {
                let below = self.image.inode(entry.inode)?;
                self.remove(&joined(path, &entry.name), &below)?;
            }
            self.add(&[b"rmdir", &quoted(path)?])?;
            self.need.less(1, 1);
        }
        self.gone.push(path.to_vec());
        Ok(())
    }

    /// Fails unless the image has room for all of it.
    pub(super) fn check_room(&mut self, image: &Path) -> Result<()> {
        for (count, bytes) in mem::take(&mut self.names).into_values() {
            self.need.names(count, bytes);
        }
        Ok(self.need.check(&self.room, &image.display().to_string())?)
    }

    /// Runs debugfs, and believes its work only after looking.
    pub(super) fn run(mut self, path: &Path) -> Result<Done> {
        let commands = mem::take(&mut self.commands);
        let done = debugfs(path, commands).and_then(|()| {
            check(path, "-fn")?;
            self.look(path)
        });
        if let Err(error) = done {
            return Err(error.context(self.take_back(path)));
        }
        let put = self.expected.into_iter().map(|expected| expected.path).collect();
        Ok(Done { put, removed: self.gone })
    }

    /// Removes what a failed run has put, and says what is left of it.
    fn take_back(&self, path: &Path) -> String {
        let mut commands = Vec::new();
        for expected in self.expected.iter().rev() {
            let verb: &[u8] = if expected.kind == FileKind::Folder { b"rmdir" } else { b"rm" };
            // It could be said to debugfs before.
            let Ok(name) = quoted(&expected.path) else { continue };
            commands.extend([verb, b" ", &name, b"\n"].concat());
        }
        // It complains about what was not put yet.
        let _ = debugfs(path, commands);
        let image = path.display();
        let is_left = |image: &Ext4| {
            self.expected.iter().any(|put| !matches!(find(image, &put.path), Ok(None)))
        };
        let opened = File::open(path).map_err(anyhow::Error::from);
        let opened = opened.and_then(|file| Ok(Ext4::open_file(file)?));
        if check(path, "-fn").is_err() || opened.as_ref().map_or(true, is_left) {
            return format!("{image} was changed and may be damaged; e2fsck {image} mends it");
        }
        if self.removes {
            return format!(
                "{image} was changed: nothing that was put is left in it, and what was to be \
                 removed or replaced may be gone"
            );
        }
        format!("nothing was put: {image} holds what it held before")
    }

    fn look(&self, path: &Path) -> Result<()> {
        let image = Ext4::open_file(File::open(path)?)?;
        for expected in &self.expected {
            let found = find(&image, &expected.path)?;
            let Some(found) = found.filter(|found| expected.is(&image, found)) else {
                let what = format!("debugfs did not put {} as it should be", shown(&expected.path));
                return Err(Fault::new(Kind::Io, what).into());
            };
            let mut xattrs = expected.xattrs.clone();
            xattrs.sort();
            let mut got = image.xattrs(&found)?;
            got.sort();
            let first = expected.link_of.as_ref().map(|first| find(&image, first)).transpose()?;
            let is_linked =
                first.is_none_or(|first| first.is_some_and(|first| first.number == found.number));
            if got != xattrs || !is_linked {
                let what = format!(
                    "debugfs did not keep the attributes or names of {}",
                    shown(&expected.path)
                );
                return Err(Fault::new(Kind::Io, what).into());
            }
        }
        for gone in &self.gone {
            if find(&image, gone)?.is_some() {
                let what = format!("debugfs did not remove {}", shown(gone));
                return Err(Fault::new(Kind::Io, what).into());
            }
        }
        Ok(())
    }
}

impl Expected {
    fn is(&self, image: &Ext4, found: &Inode) -> bool {
        let owner = Owner { uid: found.attributes.uid, gid: found.attributes.gid };
        let is_new = image.inode_bytes() > OLD_INODE_BYTES;
        // What lies outside of what an inode can say was cut.
        let has_time = self.mtime.is_none_or(|mtime| {
            let got = found.attributes.mtime;
            !is_new || got == mtime || !(SECONDS[0]..=SECONDS[1]).contains(&mtime.seconds)
        });
        found.kind == self.kind
            && found.attributes.mode == self.mode
            && owner == self.owner
            && has_time
            && (found.kind == FileKind::Folder || found.bytes == self.bytes)
    }
}

fn mtime_of(metadata: &Metadata) -> Time {
    let nanoseconds = u32::try_from(metadata.mtime_nsec()).unwrap_or(0);
    Time { seconds: metadata.mtime(), nanoseconds }
}

/// Runs debugfs with commands, of which each must succeed.
fn debugfs(image: &Path, commands: Vec<u8>) -> Result<()> {
    let mut child = Command::new("debugfs")
        .args(["-w", "-f", "-"])
        .arg(image)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .context("start debugfs, which is part of e2fsprogs")?;
    let mut stdin = child.stdin.take().context("debugfs has no input")?;
    // It may write errors before it has read all.
    let writer = std::thread::spawn(move || stdin.write_all(&commands));
    let output = child.wait_with_output().context("wait for debugfs")?;
    let written = writer.join();
    let said = String::from_utf8_lossy(&output.stderr);
    // The first line is its version.
    let said: Vec<&str> = said.lines().skip(1).collect();
    if !output.status.success() || !said.is_empty() || !matches!(written, Ok(Ok(()))) {
        return Err(Fault::new(Kind::Io, format!("debugfs failed: {}", said.join("; "))).into());
    }
    Ok(())
}
