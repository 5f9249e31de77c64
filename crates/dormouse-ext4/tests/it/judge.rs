//! What others say about an image.

use std::ffi::OsStr;
use std::fs::File;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// Fails unless e2fsck, which changes nothing here, finds nothing at all.
pub(crate) fn fsck(image: &Path) {
    let output = run(Command::new("e2fsck").arg("-fn").arg(image));
    let said = String::from_utf8_lossy(&output.stdout);
    let stdout: Vec<&str> = said.lines().collect();
    assert!(output.status.success(), "e2fsck: {}", stdout.join("\n"));
    // Some complaints leave the exit code alone; a clean run has five passes and one summary.
    assert!(stdout.len() <= 6, "e2fsck: {}", stdout.join("\n"));
}

pub(crate) fn run(command: &mut Command) -> Output {
    command.env("LC_ALL", "C").output().unwrap()
}

/// Runs what must succeed and returns what it printed.
pub(crate) fn said(command: &mut Command) -> String {
    let output = run(command);
    let [stdout, stderr] =
        [output.stdout, output.stderr].map(|text| String::from_utf8_lossy(&text).into_owned());
    assert!(output.status.success(), "{command:?}: {}\n{stdout}\n{stderr}", output.status);
    stdout
}

/// An image that the kernel mounted, until the end of the test.
pub(crate) struct Mount(pub(crate) PathBuf);

impl Mount {
    pub(crate) fn new(image: &Path, at: &Path, options: &str) -> Mount {
        std::fs::create_dir_all(at).unwrap();
        let options = format!("loop,{options}");
        let mut command = Command::new("mount");
        command.args(["-t", "ext4", "-o", &options]).arg(image).arg(at);
        said(&mut command);
        Mount(at.to_owned())
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let unmounted = Command::new("umount").arg(&self.0).status();
        if !unmounted.is_ok_and(|status| status.success()) {
            // Busy: at least nobody sees it any more.
            let _ = Command::new("umount").arg("-l").arg(&self.0).status();
        }
    }
}

/// What a walk tells of an entry: all that an image keeps.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Seen {
    pub(crate) path: Vec<u8>,
    pub(crate) mode: u32,
    pub(crate) owner: (u32, u32),
    pub(crate) mtime: (i64, i64),
    pub(crate) links: u64,
    pub(crate) device: u64,
    pub(crate) size: u64,
    /// Length and a hash of a file's content, or a symlink's target.
    pub(crate) content: Vec<u8>,
    pub(crate) xattrs: Vec<(Vec<u8>, Vec<u8>)>,
}

impl Seen {
    /// The same without what differs where hard links are not known as such.
    pub(crate) fn is_socket(&self) -> bool {
        self.mode & 0o170_000 == 0o140_000
    }
}

/// Everything below a folder but `lost+found`, by path.
pub(crate) fn walk(root: &Path) -> Vec<Seen> {
    let mut seen = Vec::new();
    let mut pending = vec![PathBuf::new()];
    while let Some(path) = pending.pop() {
        let at = root.join(&path);
        let metadata = std::fs::symlink_metadata(&at).unwrap();
        let kind = metadata.file_type();
        let content = if kind.is_symlink() {
            std::fs::read_link(&at).unwrap().as_os_str().as_bytes().to_vec()
        } else if kind.is_file() {
            digest(&at)
        } else {
            Vec::new()
        };
        if kind.is_dir() {
            for entry in std::fs::read_dir(&at).unwrap() {
                let name = entry.unwrap().file_name();
                if !(path.as_os_str().is_empty() && name == OsStr::new("lost+found")) {
                    pending.push(path.join(name));
                }
            }
        }
        let has_size = kind.is_file() || kind.is_symlink();
        let is_device = kind.is_block_device() || kind.is_char_device();
        seen.push(Seen {
            path: path.as_os_str().as_bytes().to_vec(),
            mode: metadata.mode(),
            owner: (metadata.uid(), metadata.gid()),
            mtime: (metadata.mtime(), metadata.mtime_nsec()),
            links: metadata.nlink(),
            device: if is_device { metadata.rdev() } else { 0 },
            size: if has_size { metadata.len() } else { 0 },
            content,
            xattrs: xattrs(&at),
        });
    }
    seen.sort_by(|a, b| a.path.cmp(&b.path));
    // The root has one folder more in an image.
    if let Some(root) = seen.first_mut() {
        root.links = 0;
    }
    seen
}

/// Fails at the first entry in which two walks differ.
pub(crate) fn assert_same(expected: &[Seen], found: &[Seen]) {
    for (expected, found) in expected.iter().zip(found) {
        assert_eq!(expected, found, "{}", expected.path.escape_ascii());
    }
    assert_eq!(expected.len(), found.len());
}

/// A short digest of the blocks that are not zero, so that holes cost nothing and a failure's
/// message is short as well.
fn digest(path: &Path) -> Vec<u8> {
    use std::hash::Hasher;
    let file = File::open(path).unwrap();
    let bytes = file.metadata().unwrap().len();
    let mut hasher = std::hash::DefaultHasher::new();
    let mut buffer = vec![0; 4096];
    // Extents may be finer than these blocks, and no block counts twice.
    let mut next = 0;
    for extent in dormouse_sys::sparse::data_extents(&file, 0..bytes) {
        let extent = extent.unwrap();
        for block in next.max(extent.start / 4096)..extent.end.div_ceil(4096) {
            next = block + 1;
            let len = usize::try_from((bytes - block * 4096).min(4096)).unwrap();
            file.read_exact_at(&mut buffer[..len], block * 4096).unwrap();
            if buffer[..len].iter().any(|&byte| byte != 0) {
                hasher.write_u64(block);
                hasher.write(&buffer[..len]);
            }
        }
    }
    hasher.finish().to_le_bytes().to_vec()
}

pub(crate) fn xattrs(path: &Path) -> Vec<(Vec<u8>, Vec<u8>)> {
    let mut names = vec![0; 64 << 10];
    let Ok(len) = rustix::fs::llistxattr(path, &mut names[..]) else { return Vec::new() };
    let mut found: Vec<(Vec<u8>, Vec<u8>)> = names[..len]
        .split(|&byte| byte == 0)
        .filter(|name| !name.is_empty())
        .map(|name| {
            let mut value = vec![0; 64 << 10];
            let len = rustix::fs::lgetxattr(path, name, &mut value[..]).unwrap();
            (name.to_vec(), value[..len].to_vec())
        })
        .collect();
    found.sort();
    found
}
