//! The file of a unix socket: made with mode 0600, taken over when stale, removed when ours.
//!
//! Who makes or removes one holds a lock on the folder, so that of two servers that find the same
//! stale file one gets it and the other is told so. Paths go through the folder's descriptor,
//! whatever their length: the kernel's limit is 107 bytes.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, Mode, flock};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

use crate::error::{Error, ErrorKind, Result};

/// Connections that wait to be accepted.
const BACKLOG: i32 = 128;

/// The file of a listening socket; dropping it removes the file, if it is still ours.
#[derive(Debug)]
pub struct SocketFile {
    is_left: bool,
    folder: File,
    name: OsString,
    path: PathBuf,
    device: u64,
    inode: u64,
}

/// Listens at `path`, where only this user may connect.
///
/// # Errors
///
/// `InUse` where another process listens, `AlreadyExists` where something is that is no socket.
pub fn listen(path: &Path) -> Result<(UnixListener, SocketFile)> {
    let failed =
        |error: io::Error| Error::io(format!("cannot listen at {}", path.display()), error);
    let (folder, name) = open_parent(path)?;
    let folder = folder.map_err(failed)?;
    flock(&folder, FlockOperation::LockExclusive).map_err(io::Error::from).map_err(failed)?;
    let through_folder = within(&folder, name);
    remove_stale(&through_folder, path)?;
    let listener = bind(&through_folder).map_err(failed)?;
    let made = fs::symlink_metadata(&through_folder).map_err(failed)?;
    let file = SocketFile {
        is_left: false,
        name: name.to_owned(),
        path: path.to_owned(),
        device: made.dev(),
        inode: made.ino(),
        folder,
    };
    flock(&file.folder, FlockOperation::Unlock).map_err(io::Error::from).map_err(failed)?;
    Ok((listener, file))
}

impl SocketFile {
    /// What tells the file from every other that was or will be there: device and inode.
    pub fn identity(&self) -> (u64, u64) {
        (self.device, self.inode)
    }

    /// Leaves the file there: somebody else goes on listening.
    pub fn leave(mut self) {
        self.is_left = true;
    }
}

/// Connects to the socket at `path`; `None` where nobody listens.
///
/// # Errors
///
/// Where there is a socket that this user may not connect to.
pub fn connect(path: &Path) -> Result<Option<UnixStream>> {
    let (folder, name) = open_parent(path)?;
    let connected = folder.and_then(|folder| {
        let socket = socket(SocketFlags::CLOEXEC)?;
        rustix::net::connect(&socket, &SocketAddrUnix::new(within(&folder, name))?)?;
        Ok(UnixStream::from(socket))
    });
    match connected {
        Ok(stream) => Ok(Some(stream)),
        Err(error)
            if matches!(
                error.kind(),
                io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused
            ) =>
        {
            Ok(None)
        }
        Err(error) => Err(Error::io(format!("cannot connect to {}", path.display()), error)),
    }
}

/// The folder of a socket, and the socket's name in it.
fn open_parent(path: &Path) -> Result<(io::Result<File>, &OsStr)> {
    let Some(name) = path.file_name() else {
        let message = format!("{} is no name for a socket", path.display());
        return Err(Error::new(ErrorKind::InvalidInput, message));
    };
    let parent = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    Ok((File::open(parent), name))
}

fn within(folder: &File, name: &OsStr) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", folder.as_raw_fd())).join(name)
}

/// Removes a socket that nobody listens on; anything else that is there is an error.
fn remove_stale(through_folder: &Path, path: &Path) -> Result<()> {
    let taken =
        |kind, why: &str| Error::new(kind, format!("cannot listen at {}: {why}", path.display()));
    match fs::symlink_metadata(through_folder) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(Error::io(format!("cannot look at {}", path.display()), error)),
        Ok(there) if !there.file_type().is_socket() => {
            let why = "something that is no socket is there; choose another path";
            return Err(taken(ErrorKind::AlreadyExists, why));
        }
        Ok(_) => {}
    }
    // A socket that is listened on accepts, or has a full backlog.
    match try_connect(through_folder) {
        Err(Errno::CONNREFUSED) => fs::remove_file(through_folder)
            .map_err(|error| Error::io(format!("cannot remove {}", path.display()), error)),
        Err(Errno::NOENT) => Ok(()),
        Ok(()) | Err(Errno::AGAIN) => Err(taken(ErrorKind::InUse, "another server listens there")),
        Err(errno) => {
            Err(Error::io(format!("cannot tell who listens at {}", path.display()), errno.into()))
        }
    }
}

fn try_connect(path: &Path) -> rustix::io::Result<()> {
    let socket = socket(SocketFlags::CLOEXEC | SocketFlags::NONBLOCK)?;
    rustix::net::connect(&socket, &SocketAddrUnix::new(path)?)
}

fn bind(path: &Path) -> io::Result<UnixListener> {
    let socket = socket(SocketFlags::CLOEXEC)?;
    // The file gets the mode of the descriptor; there is no moment at which others may connect.
    rustix::fs::fchmod(&socket, Mode::RUSR | Mode::WUSR)?;
    rustix::net::bind(&socket, &SocketAddrUnix::new(path)?)?;
    rustix::net::listen(&socket, BACKLOG)?;
    Ok(UnixListener::from(socket))
}

fn socket(flags: SocketFlags) -> rustix::io::Result<OwnedFd> {
    rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        if self.is_left {
            return;
        }
        let path = within(&self.folder, &self.name);
        let removed = flock(&self.folder, FlockOperation::LockExclusive)
            .map_err(io::Error::from)
            .and_then(|()| fs::symlink_metadata(&path))
            .and_then(|there| {
                if there.dev() == self.device && there.ino() == self.inode {
                    fs::remove_file(&path)
                } else {
                    Ok(())
                }
            });
        if let Err(error) = removed
            && error.kind() != io::ErrorKind::NotFound
        {
            tracing::warn!(path = %self.path.display(), %error, "cannot remove a socket");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn a_stale_socket_is_taken_over_and_a_live_one_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("s");
        drop(UnixListener::bind(&path).unwrap());
        assert!(UnixStream::connect(&path).is_err());
        let (_listener, file) = listen(&path).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        UnixStream::connect(&path).unwrap();
        assert_eq!(listen(&path).unwrap_err().kind(), ErrorKind::InUse);
        drop(file);
        assert!(!path.exists());
    }

    #[test]
    fn what_is_no_socket_stays() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("s");
        fs::write(&path, "precious").unwrap();
        assert_eq!(listen(&path).unwrap_err().kind(), ErrorKind::AlreadyExists);
        assert_eq!(fs::read(&path).unwrap(), b"precious");
    }

    #[test]
    fn another_ones_socket_is_not_removed() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("s");
        let (_listener, file) = listen(&path).unwrap();
        fs::remove_file(&path).unwrap();
        let _other = UnixListener::bind(&path).unwrap();
        drop(file);
        assert!(path.exists());
    }

    #[test]
    fn long_folders_do() {
        let folder = tempfile::tempdir().unwrap();
        let deep = folder.path().join("x".repeat(120));
        fs::create_dir(&deep).unwrap();
        let (_listener, _file) = listen(&deep.join("s")).unwrap();
        assert!(deep.join("s").exists());
        assert!(connect(&deep.join("s")).unwrap().is_some());
        assert!(connect(&deep.join("t")).unwrap().is_none());
        assert!(connect(&folder.path().join("none/s")).unwrap().is_none());
    }
}
