//! Sockets that a VMM leaves behind: whoever is killed takes no file along, and the next VMM that is to
//! have the path, of a vsock device for example, finds it taken.

use std::fs;
use std::io;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

/// `__SO_ACCEPTCON` of the kernel: somebody listens there.
const LISTENS: u32 = 0x1_0000;

/// Files of sockets on which a process listens.
#[derive(Debug)]
pub(super) struct Listening {
    paths: Vec<PathBuf>,
}

impl Listening {
    /// Those of a process. What cannot be found out is none: it is a courtesy.
    pub(super) fn of(pid: u32) -> Listening {
        let process = PathBuf::from(format!("/proc/{pid}"));
        Listening { paths: find(&process).unwrap_or_default() }
    }

    /// Removes those on which nobody listens now that the process has ended.
    pub(super) fn remove(self) {
        for path in self.paths {
            if let Err(error) = remove_unused(&path) {
                tracing::warn!(path = %path.display(), %error, "a socket of the VMM's stays");
            }
        }
    }
}

fn find(process: &Path) -> io::Result<Vec<PathBuf>> {
    let cwd = fs::read_link(process.join("cwd"))?;
    let mut own = Vec::new();
    for entry in fs::read_dir(process.join("fd"))? {
        // It may be closed meanwhile.
        let Ok(target) = fs::read_link(entry?.path()) else { continue };
        let inode =
            target.to_str().and_then(|text| text.strip_prefix("socket:[")?.strip_suffix(']'));
        own.extend(inode.and_then(|inode| inode.parse::<u64>().ok()));
    }
    let all = fs::read_to_string(process.join("net/unix"))?;
    Ok(all
        .lines()
        .filter_map(listening)
        .filter(|(inode, _)| own.contains(inode))
        .map(|(_, path)| cwd.join(path))
        .collect())
}

/// The inode and file of a line of `/proc/net/unix`, if somebody listens there.
fn listening(line: &str) -> Option<(u64, &str)> {
    let mut fields = line.splitn(8, ' ').map(str::trim);
    let flags = u32::from_str_radix(fields.nth(3)?, 16).ok()?;
    // Numbers are aligned with blanks, which begin the rest.
    let (inode, path) = line.rsplit_once(" 01 ")?.1.trim_start().split_once(' ')?;
    let is_file = !path.is_empty() && !path.starts_with('@');
    (flags & LISTENS != 0 && is_file).then_some((inode.parse().ok()?, path))
}

fn remove_unused(path: &Path) -> io::Result<()> {
    let is_socket = match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        metadata => metadata?.file_type().is_socket(),
    };
    let refused = |error: io::Error| error.kind() == io::ErrorKind::ConnectionRefused;
    if is_socket && UnixStream::connect(path).is_err_and(refused) {
        fs::remove_file(path)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;

    #[test]
    fn what_a_process_listens_on_is_found_and_removed_when_nobody_does() {
        let folder = tempfile::tempdir().unwrap();
        let [left, used, file] = ["a b", "used", "file"].map(|name| folder.path().join(name));
        let listener = UnixListener::bind(&left).unwrap();
        let _used = UnixListener::bind(&used).unwrap();
        fs::write(&file, "").unwrap();
        let found = Listening::of(std::process::id());
        assert!(found.paths.contains(&left) && found.paths.contains(&used), "{found:?}");
        let connected = UnixStream::connect(&left).unwrap();
        let again = Listening::of(std::process::id());
        let count = |found: &Listening| found.paths.iter().filter(|path| **path == left).count();
        assert_eq!((count(&found), count(&again)), (1, 1), "a connection listens to nobody");
        drop((listener, connected));
        let mut all = found;
        all.paths.extend([file.clone(), folder.path().join("none")]);
        all.remove();
        assert!(!left.exists() && used.exists() && file.exists());
        assert!(Listening::of(0).paths.is_empty());
    }
}
