//! Paths whose links are followed within a tree, as they will be in the image.

use crate::error::{Error, ErrorKind, Result};
use crate::tree::{Attributes, Kind, NodeId, ROOT, Tree};

/// Links followed in one path, as the kernel counts them.
const SYMLINKS_MAX: u32 = 40;

/// What becomes of a folder on the way that is not there.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Missing<'a> {
    /// It is made.
    Make(&'a Attributes),

    /// The path leads nowhere.
    Nowhere,
}

/// Where `path` leads from the folder `from`; nowhere only if nothing is made.
///
/// Links are followed, the last component, too: `/sbin` leads to `/usr/sbin` in most images. The root
/// is above all, so no link leads out. One that leads in a circle, and what should be a folder and is
/// none, are refused.
pub(crate) fn follow(
    tree: &mut Tree,
    from: NodeId,
    path: &[u8],
    missing: Missing<'_>,
) -> Result<Option<NodeId>> {
    let mut rest = reversed(path);
    let (mut at, mut links) = (from, 0);
    while let Some(part) = rest.pop() {
        if !tree.node(at).is_folder() {
            let what = format!("{} is no folder in the image", tree.path_of(at));
            return Err(Error::new(ErrorKind::Refused, what));
        }
        if part == b".." {
            at = tree.parent(at);
            continue;
        }
        let Some(found) = tree.lookup(at, &part) else {
            let Missing::Make(attributes) = missing else { return Ok(None) };
            at = tree.add(at, &part, 0, attributes, Kind::Folder)?;
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
        let target = tree.target(found);
        if target.starts_with(b"/") {
            at = ROOT;
        }
        rest.extend(reversed(target));
    }
    Ok(Some(at))
}

/// The components of a path that say anything, the last one first.
fn reversed(path: &[u8]) -> Vec<Vec<u8>> {
    let parts = path.split(|&byte| byte == b'/').rev();
    parts.filter(|part| !part.is_empty() && *part != b".").map(<[u8]>::to_vec).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tree::Time;

    const PLAIN: Attributes =
        Attributes { mode: 0o755, uid: 0, gid: 0, mtime: Time { seconds: 0, nanoseconds: 0 } };

    #[test]
    fn links_are_followed_and_stay_inside() {
        let mut tree = Tree::new();
        let usr = tree.add(ROOT, b"usr", 0, &PLAIN, Kind::Folder).unwrap();
        let bin = tree.add(usr, b"bin", 0, &PLAIN, Kind::Folder).unwrap();
        tree.add(ROOT, b"pipe", 0, &PLAIN, Kind::Fifo).unwrap();
        let links: [(&[u8], &[u8]); 7] = [
            (b"bin", b"usr/bin"),
            (b"out", b"../../../usr/./bin"),
            (b"abs", b"/bin"),
            (b"a", b"b"),
            (b"b", b"a"),
            (b"gone", b"usr/gone"),
            (b"file", b"pipe"),
        ];
        for (name, target) in links {
            tree.add(ROOT, name, 0, &PLAIN, Kind::Symlink(target)).unwrap();
        }
        for path in [&b"/bin"[..], b"out", b"abs/", b"usr/bin", b"usr/../abs/.", b"../bin"] {
            let found = follow(&mut tree, ROOT, path, Missing::Nowhere).unwrap();
            assert_eq!(found, Some(bin), "{}", path.escape_ascii());
        }
        for path in [&b"/a"[..], b"a/x", b"file/x", b"pipe/.."] {
            assert!(follow(&mut tree, ROOT, path, Missing::Make(&PLAIN)).is_err());
        }
        assert_eq!(follow(&mut tree, ROOT, b"gone", Missing::Nowhere).unwrap(), None);
        for (path, leads) in [(&b"gone"[..], "/usr/gone"), (b"/bin/new", "/usr/bin/new")] {
            let made = follow(&mut tree, ROOT, path, Missing::Make(&PLAIN)).unwrap().unwrap();
            assert_eq!(tree.path_of(made), leads);
        }
        assert_eq!(follow(&mut tree, bin, b"../..", Missing::Nowhere).unwrap(), Some(ROOT));
    }
}
