//! A folder of an ext4 image as a tree: for work disks, straight from a root image.

use std::collections::{HashMap, HashSet};
use std::io;
use std::ops::Range;
use std::sync::Arc;

use crate::disk::BLOCK;
use crate::error::{Error, ErrorKind, Result};
use crate::input::Limits;
use crate::layout::LOST_FOUND;
use crate::read::{Ext4, FileContent, FileKind, Inode};
use crate::tree::content::{Contents, FileId, Opened};
use crate::tree::{Kind, NodeId, Tree};
use crate::write::Watch;

/// Contents by inode number.
#[derive(Debug)]
struct ImageFiles(Arc<Ext4>);

impl Contents for ImageFiles {
    fn open(&self, key: u64) -> io::Result<Opened> {
        let number = u32::try_from(key).map_err(io::Error::other)?;
        let inode = self.0.inode(number)?;
        if let (Some(file), true) = (self.0.file(), self.0.is_on_disk())
            && let [run] = self.0.runs(&inode)?[..]
            && run.logical == 0
            && run.blocks * self.0.block_bytes() >= inode.bytes
        {
            let offset = run.start * self.0.block_bytes();
            return Ok(Opened::File { file: Arc::clone(file), offset });
        }
        Ok(Opened::Bytes(Box::new(FileContent::new(&self.0, inode)?)))
    }
}

/// Puts what is in a folder of an image into `tree`, below `into`, but no `lost+found` of its root.
/// The folder's own attributes become those of `into`.
pub fn read(
    tree: &mut Tree,
    into: NodeId,
    image: &Arc<Ext4>,
    path: &[u8],
    limits: &Limits,
    watch: &dyn Watch,
) -> Result<()> {
    let folder = image.lookup(path)?;
    if folder.kind != FileKind::Folder {
        let what = format!("{} is no folder", path.escape_ascii());
        return Err(Error::new(ErrorKind::InvalidInput, what));
    }
    let source = tree.add_source(Arc::new(ImageFiles(Arc::clone(image))))?;
    tree.set_attributes(into, &folder.attributes);
    tree.set_xattrs(into, image.xattrs(&folder)?)?;
    let mut links: HashMap<u32, NodeId> = HashMap::new();
    let root = image.root()?.number;
    let mut seen = HashSet::from([folder.number]);
    let mut pending = vec![(folder, into)];
    while let Some((folder, node)) = pending.pop() {
        for entry in image.entries(&folder)? {
            if watch.is_cancelled() {
                return Err(Error::cancelled());
            }
            if folder.number == root && entry.name == LOST_FOUND {
                continue;
            }
            if let Some(&found) = links.get(&entry.inode) {
                tree.link(node, &entry.name, 0, found)?;
                continue;
            }
            if tree.len() > limits.entries {
                let what = format!("more than {} entries", limits.entries);
                return Err(Error::new(ErrorKind::Limit, what));
            }
            let inode = image.inode(entry.inode)?;
            let target;
            let (major, minor) = inode.device;
            let kind = match inode.kind {
                FileKind::Folder => Kind::Folder,
                FileKind::File => file(image, source, &inode)?,
                FileKind::Symlink => {
                    target = image.target(&inode)?;
                    Kind::Symlink(&target)
                }
                FileKind::CharDevice => Kind::CharDevice { major, minor },
                FileKind::BlockDevice => Kind::BlockDevice { major, minor },
                FileKind::Fifo => Kind::Fifo,
                FileKind::Socket => Kind::Socket,
            };
            let new = tree.add(node, &entry.name, 0, &inode.attributes, kind)?;
            tree.set_xattrs(new, image.xattrs(&inode)?)?;
            if inode.kind == FileKind::Folder {
                if !seen.insert(inode.number) {
                    let what = format!("folder {} has two names", inode.number);
                    return Err(Error::new(ErrorKind::Corrupt, what));
                }
                pending.push((inode, new));
            } else if inode.links > 1 {
                links.insert(entry.inode, new);
            }
        }
    }
    Ok(())
}

fn file(image: &Ext4, source: u16, inode: &Inode) -> Result<Kind<'static>> {
    inode.check_readable()?;
    let bytes = inode.bytes;
    if bytes == 0 {
        return Ok(Kind::File { bytes, content: FileId::empty(), data: None });
    }
    let content = FileId::new(source, inode.number.into());
    if inode.is_inline() {
        return Ok(Kind::File { bytes, content, data: None });
    }
    let size = image.block_bytes();
    let all = bytes.div_ceil(BLOCK);
    let mut data: Vec<Range<u64>> = Vec::new();
    for run in image.runs(inode)? {
        let begin = run.logical * size / BLOCK;
        let end = ((run.logical + run.blocks) * size).div_ceil(BLOCK).min(all);
        if begin >= end {
            // Reserved beyond the file's end.
            continue;
        }
        match data.last_mut() {
            Some(last) if begin <= last.end => last.end = last.end.max(end),
            _ => data.push(begin..end),
        }
    }
    if data.is_empty() {
        return Ok(Kind::File { bytes, content: FileId::empty(), data: Some(data) });
    }
    let is_whole = data.len() == 1 && data[0] == (0..all);
    Ok(Kind::File { bytes, content, data: (!is_whole).then_some(data) })
}
