//! Files of the host that are put into a tree at a path of their own.

use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;

use crate::error::{Context, Error, ErrorKind, Result};
use crate::input::follow::{Missing, follow};
use crate::input::{Limits, folder};
use crate::tree::content::{Contents, FileId, Opened};
use crate::tree::{Attributes, Kind, NodeId, ROOT, Time, Tree};
use crate::write::Watch;

/// A file that was opened to be injected.
#[derive(Debug)]
struct OneFile(Arc<File>);

impl Contents for OneFile {
    fn open(&self, _key: u64) -> io::Result<Opened> {
        Ok(Opened::File { file: Arc::clone(&self.0), offset: 0 })
    }
}

/// Puts a file or folder of the host at `target`; missing parents are made. It belongs to root and
/// keeps its permissions and extended attributes.
///
/// A file takes the place of whatever is there, a link, too, but for folders and links to them. A folder
/// is merged with the one that is there or that a link there leads to, and that stays as it is.
pub fn inject(
    tree: &mut Tree,
    source: &Path,
    target: &[u8],
    limits: &Limits,
    watch: &dyn Watch,
) -> Result<()> {
    let what = || format!("cannot inject {}", source.display());
    let metadata = std::fs::metadata(source).context(what)?;
    let mtime = Time {
        seconds: metadata.mtime(),
        nanoseconds: u32::try_from(metadata.mtime_nsec()).unwrap_or(0),
    };
    let mode = u16::try_from(metadata.mode() & 0o7777).unwrap_or(0);
    let attributes = Attributes { mode, uid: 0, gid: 0, mtime };
    let (above, name) = split(target);
    let made = Attributes { mode: 0o755, ..attributes };
    let folder = reach(tree, ROOT, above, &made).map_err(|error| error.within(what()))?;
    if metadata.is_dir() {
        let first = tree.nodes.len();
        let node = reach(tree, folder, name, &attributes).map_err(|error| error.within(what()))?;
        let there = ((node.0 as usize) < first)
            .then(|| (tree.attributes(node), tree.xattrs(node).to_vec()));
        let new_from = tree.nodes.len();
        folder::read(tree, node, source, limits, None, watch)?;
        let new = (new_from..tree.nodes.len()).filter_map(|id| u32::try_from(id).ok());
        for node in new.map(NodeId).chain([node]) {
            let attributes = tree.attributes(node);
            tree.set_attributes(node, &Attributes { uid: 0, gid: 0, ..attributes });
        }
        if let Some((attributes, xattrs)) = there {
            tree.set_attributes(node, &attributes);
            tree.set_xattrs(node, xattrs)?;
        }
        return Ok(());
    }
    if name.is_empty() || name == b".." {
        let what = format!("{}: the target names no file", what());
        return Err(Error::new(ErrorKind::InvalidInput, what));
    }
    if !metadata.is_file() {
        let what = format!("{}: neither a file nor a folder", what());
        return Err(Error::new(ErrorKind::InvalidInput, what));
    }
    let file = File::open(source).context(what)?;
    // Of the open file, so that a link that was given stands for what it leads to.
    let own = format!("/proc/self/fd/{}", file.as_raw_fd());
    let xattrs = folder::xattrs_behind(OsStr::new(&own)).context(what)?;
    let data = folder::data_of(&file, metadata.len()).context(what)?;
    let all = metadata.len().div_ceil(crate::disk::BLOCK);
    let is_whole = data.len() == 1 && data[0] == (0..all);
    let content = if data.is_empty() {
        FileId::empty()
    } else {
        FileId::new(tree.add_source(Arc::new(OneFile(Arc::new(file))))?, 0)
    };
    // A link that leads to nothing, or in a circle, is in nobody's way.
    if let Ok(Some(there)) = follow(tree, folder, name, Missing::Nowhere)
        && tree.node(there).is_folder()
    {
        let path = tree.path_of(there);
        let what = format!("{}: {path} is a folder in the image; name a file in it", what());
        return Err(Error::new(ErrorKind::Refused, what));
    }
    tree.remove(folder, name);
    let kind = Kind::File {
        bytes: metadata.len(),
        content,
        data: (!is_whole && metadata.len() > 0).then_some(data),
    };
    let node = tree.add(folder, name, 0, &attributes, kind)?;
    tree.set_xattrs(node, xattrs)
}

/// The folder that a path leads to, made if it is missing.
fn reach(tree: &mut Tree, from: NodeId, path: &[u8], made: &Attributes) -> Result<NodeId> {
    let found = follow(tree, from, path, Missing::Make(made))?;
    let found = found.filter(|&node| tree.node(node).is_folder());
    found.ok_or_else(|| {
        let what = format!("{} is there and no folder in the image", path.escape_ascii());
        Error::new(ErrorKind::Refused, what)
    })
}

/// What is above the last component of a path, and that, which is empty for the root.
fn split(path: &[u8]) -> (&[u8], &[u8]) {
    let mut path = path;
    while let Some(rest) = path.strip_suffix(b"/").or_else(|| path.strip_suffix(b"/.")) {
        path = rest;
    }
    let at = path.iter().rposition(|&byte| byte == b'/').map_or(0, |at| at + 1);
    match path.split_at(at) {
        (above, b".") => (above, b""),
        both => both,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_target_has_a_last_component_or_is_the_root() {
        for [path, above, name] in [
            ["/", "", ""],
            ["//./", "", ""],
            [".", "", ""],
            ["a", "", "a"],
            ["/a/b/", "/a/", "b"],
            ["/a/b/.", "/a/", "b"],
            ["/a/..", "/a/", ".."],
        ] {
            assert_eq!(split(path.as_bytes()), (above.as_bytes(), name.as_bytes()), "{path}");
        }
    }
}
