//! Files of the host that are put into a tree at a path of their own.

use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;

use crate::error::{Context, Error, ErrorKind, Result};
use crate::input::{Limits, folder};
use crate::tree::content::{Contents, FileId, Opened};
use crate::tree::{Attributes, Kind, NodeId, ROOT, Time, Tree};
use crate::write::Watch;

/// Links followed in one path, as the kernel counts them.
const SYMLINKS_MAX: u32 = 40;

/// A file that was opened to be injected.
#[derive(Debug)]
struct OneFile(Arc<File>);

impl Contents for OneFile {
    fn open(&self, _key: u64) -> io::Result<Opened> {
        Ok(Opened::File { file: Arc::clone(&self.0), offset: 0 })
    }
}

/// Puts a file or folder of the host at `target`, in place of what is there; missing parents
/// are made. It belongs to root and keeps its permissions and extended attributes.
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
    let (folder, name) = parent(tree, target, mtime).map_err(|error| error.within(what()))?;
    let Some(name) = name else {
        let what = format!("{}: the target names no file", what());
        return Err(Error::new(ErrorKind::InvalidInput, what));
    };
    if metadata.is_dir() {
        let node = match tree.lookup(folder, name) {
            Some(found) if tree.node(found).is_folder() => found,
            _ => {
                tree.remove(folder, name);
                tree.add(folder, name, 0, &attributes, Kind::Folder)?
            }
        };
        let first = tree.nodes.len();
        folder::read(tree, node, source, limits, None, watch)?;
        let new = (first..tree.nodes.len()).filter_map(|id| u32::try_from(id).ok());
        for node in new.map(NodeId).chain([node]) {
            let attributes = tree.attributes(node);
            tree.set_attributes(node, &Attributes { uid: 0, gid: 0, ..attributes });
        }
        return Ok(());
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
    tree.remove(folder, name);
    let kind = Kind::File {
        bytes: metadata.len(),
        content,
        data: (!is_whole && metadata.len() > 0).then_some(data),
    };
    let node = tree.add(folder, name, 0, &attributes, kind)?;
    tree.set_xattrs(node, xattrs)
}

/// The folder that a path lies in, made if it is missing, and the path's last component.
///
/// Links on the way are followed within the tree, as they will be in the image: `/bin` leads to
/// `/usr/bin` in most of them.
fn parent<'a>(tree: &mut Tree, path: &'a [u8], mtime: Time) -> Result<(NodeId, Option<&'a [u8]>)> {
    let mut parts: Vec<&[u8]> = components(path).collect();
    let name = parts.pop();
    let mut rest: Vec<Vec<u8>> = parts.into_iter().rev().map(<[u8]>::to_vec).collect();
    let (mut at, mut links) = (ROOT, 0);
    while let Some(part) = rest.pop() {
        if part == b".." {
            at = tree.parent(at);
            continue;
        }
        let Some(found) = tree.lookup(at, &part) else {
            let attributes = Attributes { mode: 0o755, uid: 0, gid: 0, mtime };
            at = tree.add(at, &part, 0, &attributes, Kind::Folder)?;
            continue;
        };
        if !tree.node(found).is_symlink() {
            at = found;
            continue;
        }
        links += 1;
        if links > SYMLINKS_MAX {
            let what = format!("{}: links that lead in a circle", path.escape_ascii());
            return Err(Error::new(ErrorKind::InvalidInput, what));
        }
        let target = tree.target(found).to_vec();
        if target.starts_with(b"/") {
            at = ROOT;
        }
        let leads: Vec<Vec<u8>> = components(&target).map(<[u8]>::to_vec).collect();
        rest.extend(leads.into_iter().rev());
    }
    Ok((at, name))
}

fn components(path: &[u8]) -> impl Iterator<Item = &[u8]> {
    path.split(|&byte| byte == b'/').filter(|part| !part.is_empty() && *part != b".")
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLAIN: Attributes =
        Attributes { mode: 0o755, uid: 0, gid: 0, mtime: Time { seconds: 0, nanoseconds: 0 } };

    #[test]
    fn links_on_the_way_are_followed_and_stay_inside() {
        let mut tree = Tree::new();
        let usr = tree.add(ROOT, b"usr", 0, &PLAIN, Kind::Folder).unwrap();
        let bin = tree.add(usr, b"bin", 0, &PLAIN, Kind::Folder).unwrap();
        let link = |tree: &mut Tree, name: &[u8], target: &[u8]| {
            tree.add(ROOT, name, 0, &PLAIN, Kind::Symlink(target)).unwrap();
        };
        link(&mut tree, b"bin", b"usr/bin");
        link(&mut tree, b"out", b"../../../usr/./bin");
        link(&mut tree, b"abs", b"/bin");
        link(&mut tree, b"a", b"b");
        link(&mut tree, b"b", b"a");
        for path in [&b"/bin/x"[..], b"out/x", b"abs/x", b"usr/bin/x"] {
            let found = parent(&mut tree, path, Time::default()).unwrap();
            assert_eq!(found, (bin, Some(&b"x"[..])), "{}", path.escape_ascii());
        }
        assert!(parent(&mut tree, b"/a/x", Time::default()).is_err());
        let (made, _) = parent(&mut tree, b"/bin/new/x", Time::default()).unwrap();
        assert_eq!(tree.path_of(made), "/usr/bin/new");
    }
}
