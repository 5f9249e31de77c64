//! Owners, modes and times from a manifest in mtree form (`mtree(5)` of the BSDs).
//!
//! Both forms are read: full paths (`./etc/passwd uid=0 …`), and names below the folder that the
//! last folder's line opened, closed by `..`. Keywords other than `uid`, `gid`, `mode`, `time` and
//! `type` are allowed and say nothing here, as do owners by name, which have no number.

use std::collections::HashMap;

use crate::error::{Error, ErrorKind, Result};
use crate::tree::{NodeId, ROOT, Time, Tree};

/// The longest manifest line.
const LINE_BYTES_MAX: usize = 64 << 10;

/// Changes the tree's entries as the manifest says. A path that the tree does not have, and a
/// `type` that is another, are errors that name the line.
pub fn apply(tree: &mut Tree, manifest: &str) -> Result<()> {
    if logical_lines(manifest).all(|(_, line)| line.trim().is_empty()) {
        return Err(Error::new(ErrorKind::InvalidInput, "the manifest has no lines"));
    }
    let mut defaults: HashMap<String, String> = HashMap::new();
    let mut folder: Vec<NodeId> = Vec::new();
    for (index, line) in logical_lines(manifest) {
        if line.len() > LINE_BYTES_MAX {
            return Err(wrong(index, "longer than 64 KiB"));
        }
        let mut words = line.split_ascii_whitespace();
        let Some(first) = words.next() else { continue };
        match first {
            "/set" => defaults.extend(words.map(key_and_value)),
            "/unset" => words.for_each(|key| {
                defaults.remove(key);
            }),
            ".." => {
                folder.pop().ok_or_else(|| wrong(index, "`..` without a folder to leave"))?;
            }
            name => {
                let name = unescape(name).ok_or_else(|| wrong(index, "a broken escape"))?;
                let full = name.contains(&b'/');
                let node = if full || name == b"." {
                    tree.lookup_path(&name)
                } else {
                    tree.lookup(folder.last().copied().unwrap_or(ROOT), &name)
                };
                let node = node.ok_or_else(|| {
                    wrong(index, &format!("{} is not in the tree", name.escape_ascii()))
                })?;
                let mut keys = defaults.clone();
                keys.extend(words.map(key_and_value));
                set(tree, node, &keys).map_err(|what| wrong(index, &what))?;
                if !full && tree.node(node).is_folder() {
                    folder.push(node);
                }
            }
        }
    }
    Ok(())
}

fn wrong(index: usize, what: &str) -> Error {
    Error::new(ErrorKind::InvalidInput, format!("line {} of the manifest: {what}", index + 1))
}

fn key_and_value(word: &str) -> (String, String) {
    let (key, value) = word.split_once('=').unwrap_or((word, ""));
    (key.to_owned(), value.to_owned())
}

/// Lines without comments, joined where a backslash ends one.
fn logical_lines(text: &str) -> impl Iterator<Item = (usize, String)> {
    let mut lines = text.lines().enumerate();
    std::iter::from_fn(move || {
        let (index, line) = lines.next()?;
        let mut joined = without_comment(line).to_owned();
        while joined.ends_with('\\') && joined.len() <= LINE_BYTES_MAX {
            joined.pop();
            let Some((_, next)) = lines.next() else { break };
            joined.push(' ');
            joined.push_str(without_comment(next));
        }
        Some((index, joined))
    })
}

fn without_comment(line: &str) -> &str {
    let line = line.trim();
    if line.starts_with('#') { "" } else { line }
}

fn unescape(name: &str) -> Option<Vec<u8>> {
    let mut bytes = Vec::with_capacity(name.len());
    let mut rest = name.as_bytes();
    while let Some((&byte, after)) = rest.split_first() {
        rest = after;
        if byte != b'\\' {
            bytes.push(byte);
            continue;
        }
        let digits = std::str::from_utf8(rest.get(..3)?).ok()?;
        bytes.push(u8::from_str_radix(digits, 8).ok()?);
        rest = &rest[3..];
    }
    Some(bytes)
}

fn set(
    tree: &mut Tree,
    node: NodeId,
    keys: &HashMap<String, String>,
) -> std::result::Result<(), String> {
    let mut attributes = tree.attributes(node);
    for (key, value) in keys {
        let broken = || format!("{key}={value} cannot be read");
        match key.as_str() {
            "uid" => attributes.uid = value.parse().map_err(|_| broken())?,
            "gid" => attributes.gid = value.parse().map_err(|_| broken())?,
            "mode" => {
                let mode = u16::from_str_radix(value, 8).ok().filter(|&mode| mode <= 0o7777);
                attributes.mode = mode.ok_or_else(broken)?;
            }
            "time" => {
                let (seconds, fraction) = value.split_once('.').unwrap_or((value, "0"));
                attributes.mtime = Time {
                    seconds: seconds.parse().map_err(|_| broken())?,
                    // FreeBSD writes nanoseconds after the dot, without leading zeros.
                    nanoseconds: fraction
                        .parse()
                        .ok()
                        .filter(|&nanoseconds: &u32| nanoseconds < 1_000_000_000)
                        .ok_or_else(broken)?,
                };
            }
            "type" => {
                let expected = match tree.node(node).type_bits() {
                    crate::disk::TYPE_FOLDER => "dir",
                    crate::disk::TYPE_FILE => "file",
                    crate::disk::TYPE_SYMLINK => "link",
                    crate::disk::TYPE_CHAR => "char",
                    crate::disk::TYPE_BLOCK => "block",
                    crate::disk::TYPE_FIFO => "fifo",
                    _ => "socket",
                };
                if value != expected {
                    return Err(format!("{} is a {expected}, not a {value}", tree.path_of(node)));
                }
            }
            _ => {}
        }
    }
    tree.set_attributes(node, &attributes);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tree::{Attributes, Kind};

    fn tree() -> Tree {
        let plain = Attributes { mode: 0o600, uid: 9, gid: 9, mtime: Time::default() };
        let mut tree = Tree::new();
        let etc = tree.add(ROOT, b"etc", 0, &plain, Kind::Folder).expect("a new name");
        tree.add(etc, b"a b", 0, &plain, Kind::Fifo).expect("a new name");
        tree.add(ROOT, b"z", 0, &plain, Kind::Fifo).expect("a new name");
        tree
    }

    #[test]
    fn both_forms_say_the_same() {
        let nested = "#mtree\n/set uid=0 gid=5 type=fifo\n. type=dir mode=0711\n etc type=dir \\\n \
                      mode=0750\n a\\040b time=12.34 mode=04755\n ..\n z uid=70000\n..\n";
        let full = "/set gid=5\n. uid=0 mode=711\n./etc uid=0 mode=750\n./etc/a\\040b uid=0 \
                    time=12.34 mode=4755\n./z uid=70000 mode=600\n";
        for text in [nested, full] {
            let mut tree = tree();
            apply(&mut tree, text).unwrap();
            let at = |path: &[u8]| {
                let found = tree.attributes(tree.lookup_path(path).unwrap());
                (found.mode, found.uid, found.gid, found.mtime.nanoseconds)
            };
            assert_eq!(at(b""), (0o711, 0, 5, 0));
            assert_eq!(at(b"etc"), (0o750, 0, 5, 0));
            assert_eq!(at(b"etc/a b"), (0o4755, 0, 5, 34));
            assert_eq!(at(b"z"), (0o600, 70000, 5, 0));
        }
    }

    #[test]
    fn what_is_wrong_is_told_with_its_line() {
        for (text, expected) in [
            ("\n./nothing uid=1", "line 2"),
            ("etc uid=x", "uid=x"),
            ("etc mode=99", "mode=99"),
            ("etc type=file", "is a dir"),
            ("..", "line 1"),
            ("a\\9", "escape"),
            ("#mtree\n\n", "no lines"),
        ] {
            let error = apply(&mut tree(), text).unwrap_err().to_string();
            assert!(error.contains(expected), "{text}: {error}");
        }
    }
}
