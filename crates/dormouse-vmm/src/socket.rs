//! Connecting to a VMM's unix socket within a deadline, also where its path is long.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::Duration;

use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, socket_with};

use crate::deadline::Deadline;
use crate::error::{Error, ErrorKind, Result};

/// Between two attempts. A VMM takes some tens of milliseconds to listen.
const RETRY: Duration = Duration::from_millis(2);

/// Connects once; a socket with a full queue is tried again until the deadline.
pub(crate) fn connect(path: &Path, deadline: Deadline) -> Result<UnixStream> {
    let failed = |error| Error::io(format!("cannot connect to {}", path.display()), error);
    loop {
        match try_connect(path) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                deadline.left(format!("{} takes no connection", path.display()))?;
                sleep(RETRY);
            }
            connected => return connected.map_err(failed),
        }
    }
}

/// Connects to a VMM that was just started: until its socket is there, or it has ended.
///
/// `ended` is asked now and then, and says how the process ended.
pub(crate) fn connect_when_there(
    path: &Path,
    deadline: Deadline,
    ended: &mut dyn FnMut() -> Option<String>,
) -> Result<UnixStream> {
    loop {
        let error = match connect(path, deadline) {
            Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::Gone) => error,
            connected => return connected,
        };
        if let Some(how) = ended() {
            return Err(gone_at_start(&how));
        }
        if deadline.has_passed() {
            let context = format!("the VMM does not listen on {} in time", path.display());
            return Err(Error::with_source(ErrorKind::Timeout, context, error));
        }
        sleep(RETRY);
    }
}

pub(crate) fn gone_at_start(how: &str) -> Error {
    let context = format!("the VMM ended before its API answered ({how}); see its log");
    Error::new(ErrorKind::Gone, context)
}

fn try_connect(path: &Path) -> io::Result<UnixStream> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    let connected = match SocketAddrUnix::new(path) {
        Ok(address) => rustix::net::connect(&socket, &address),
        // An address has room for 108 bytes; through the folder's descriptor any path will do.
        Err(Errno::NAMETOOLONG) => {
            let (folder, short) = through_folder(path)?;
            let connected = rustix::net::connect(&socket, &SocketAddrUnix::new(&short)?);
            drop(folder);
            connected
        }
        Err(error) => Err(error),
    };
    connected?;
    let stream = UnixStream::from(socket);
    stream.set_nonblocking(false)?;
    Ok(stream)
}

fn through_folder(path: &Path) -> io::Result<(File, PathBuf)> {
    let name = path.file_name().ok_or(Errno::INVAL)?;
    let folder = File::open(path.parent().unwrap_or(Path::new(".")))?;
    let short = PathBuf::from(format!("/proc/self/fd/{}", folder.as_raw_fd())).join(name);
    Ok((folder, short))
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;

    #[test]
    fn long_paths_late_sockets_and_full_queues() {
        let folder = tempfile::tempdir().unwrap();
        let deep = folder.path().join("x".repeat(120));
        std::fs::create_dir(&deep).unwrap();
        let path = deep.join("s");
        let deadline = || Deadline::after(Duration::from_secs(5));
        assert_eq!(connect(&path, deadline()).unwrap_err().kind(), ErrorKind::NotFound);
        let listener = std::thread::scope(|scope| {
            let made = scope.spawn(|| {
                sleep(Duration::from_millis(20));
                let (folder, short) = through_folder(&path).unwrap();
                let listener = UnixListener::bind(short).unwrap();
                drop(folder);
                listener
            });
            connect_when_there(&path, deadline(), &mut || None).unwrap();
            made.join().unwrap()
        });
        let mut held = Vec::new();
        let soon = || Deadline::after(Duration::from_millis(30));
        let error = loop {
            match connect(&path, soon()) {
                Ok(stream) => held.push(stream),
                Err(error) => break error,
            }
        };
        assert_eq!(error.kind(), ErrorKind::Timeout, "{error}");
        drop(listener);
        let ended = &mut || Some("exit code 1".to_owned());
        let error = connect_when_there(&path, deadline(), ended).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Gone);
        assert!(error.to_string().contains("exit code 1"), "{error}");
    }
}
