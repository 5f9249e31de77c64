//! Who is at the other end of a unix socket, and how to stop it (`SO_PEERCRED`, `SO_PEERPIDFD`,
//! `pidfd_open(2)`).

use std::io;
use std::mem::size_of;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal};

/// `SO_PEERPIDFD` of `asm-generic/socket.h`, Linux 6.5.
const SO_PEERPIDFD: libc::c_int = 77;

/// The process that connected, held by a descriptor: its number may be given to another one, the
/// descriptor never is.
#[derive(Debug)]
pub struct Peer {
    pid: u32,
    uid: u32,
    pidfd: OwnedFd,
}

impl Peer {
    /// The one that connected to `socket`.
    ///
    /// `ESRCH` if it has ended since, or lives where this process cannot see it.
    pub fn of(socket: impl AsFd) -> io::Result<Peer> {
        let credentials = credentials_of_peer(&socket)?;
        let pid = visible(credentials.pid)?;
        let pidfd = match pidfd_of_peer(&socket) {
            Err(error) if error.raw_os_error() == Some(libc::ENOPROTOOPT) => {
                rustix::process::pidfd_open(pid, PidfdFlags::empty())?
            }
            pidfd => pidfd?,
        };
        let number = pid.as_raw_nonzero().get().unsigned_abs();
        Ok(Peer { pid: number, uid: credentials.uid, pidfd })
    }

    /// A process by its number. `ESRCH` if there is none.
    pub fn by_pid(pid: u32) -> io::Result<Peer> {
        let missing = || io::Error::from(Errno::SRCH);
        let number = i32::try_from(pid).ok().and_then(Pid::from_raw).ok_or_else(missing)?;
        let pidfd = rustix::process::pidfd_open(number, PidfdFlags::empty())?;
        let uid = rustix::fs::stat(format!("/proc/{pid}")).map_err(|_| missing())?.st_uid;
        Ok(Peer { pid, uid, pidfd })
    }

    /// The process that a descriptor stands for, which somebody kept. `ESRCH` if it has ended.
    pub fn from_pidfd(pidfd: OwnedFd) -> io::Result<Peer> {
        let info = std::fs::read_to_string(format!("/proc/self/fdinfo/{}", pidfd.as_raw_fd()))?;
        let pid =
            info.lines().find_map(|line| line.strip_prefix("Pid:")?.trim().parse::<i32>().ok());
        // -1 where it has ended, and no line where the descriptor is of something else.
        let pid = pid.and_then(|pid| u32::try_from(pid).ok());
        let pid = pid.ok_or_else(|| io::Error::from(Errno::SRCH))?;
        let uid = rustix::fs::stat(format!("/proc/{pid}"))?.st_uid;
        Ok(Peer { pid, uid, pidfd })
    }

    /// Its number in our namespace, at the time it connected.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Its user, at the time it connected.
    pub fn uid(&self) -> u32 {
        self.uid
    }

    /// Stops it, as nothing inside it can prevent (`SIGKILL`). Fine if it has ended.
    pub fn kill(&self) -> io::Result<()> {
        match rustix::process::pidfd_send_signal(&self.pidfd, Signal::KILL) {
            Ok(()) | Err(Errno::SRCH) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// Whether it has ended.
    pub fn has_ended(&self) -> io::Result<bool> {
        let mut poll = [PollFd::new(&self.pidfd, PollFlags::IN)];
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        loop {
            match rustix::event::poll(&mut poll, Some(&now)) {
                // A signal of ours says nothing about it.
                Err(Errno::INTR) => {}
                polled => return Ok(polled? > 0),
            }
        }
    }

    /// The descriptor that stands for it; readable when it has ended.
    pub fn pidfd(&self) -> &OwnedFd {
        &self.pidfd
    }
}

/// Who connected, with its number as this process sees it: 0 if it lives in a namespace from which
/// it cannot be seen, which `rustix`'s type for processes has no room for.
fn credentials_of_peer(socket: impl AsFd) -> io::Result<libc::ucred> {
    let mut credentials = libc::ucred { pid: 0, uid: 0, gid: 0 };
    let mut len: libc::socklen_t = 12;
    const { assert!(size_of::<libc::ucred>() == 12) };
    // SAFETY: the option's value is a `ucred`, which is what we have room for.
    let got = unsafe {
        libc::getsockopt(
            socket.as_fd().as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEERCRED,
            (&raw mut credentials).cast(),
            &raw mut len,
        )
    };
    if got < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(credentials)
}

/// The process with a number that the kernel gave us.
fn visible(pid: libc::pid_t) -> io::Result<Pid> {
    Pid::from_raw(pid).ok_or_else(|| io::Error::from(Errno::SRCH))
}

fn pidfd_of_peer(socket: impl AsFd) -> io::Result<OwnedFd> {
    let mut fd: libc::c_int = -1;
    let mut len: libc::socklen_t = 4;
    const { assert!(size_of::<libc::c_int>() == 4) };
    // SAFETY: the option's value is one int, which is what we have room for.
    let got = unsafe {
        libc::getsockopt(
            socket.as_fd().as_raw_fd(),
            libc::SOL_SOCKET,
            SO_PEERPIDFD,
            (&raw mut fd).cast(),
            &raw mut len,
        )
    };
    if got < 0 || fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel made this descriptor for us a moment ago.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::{UnixListener, UnixStream};
    use std::process::Command;

    use super::*;

    #[test]
    fn a_peer_is_known_and_stopped() {
        let (one, _two) = UnixStream::pair().unwrap();
        assert_eq!(Peer::of(&one).unwrap().pid(), std::process::id());

        let mut child = Command::new("sleep").arg("100").spawn().unwrap();
        let peer = Peer::by_pid(child.id()).unwrap();
        let copy = Peer::from_pidfd(peer.pidfd().try_clone().unwrap()).unwrap();
        assert_eq!(copy.pid(), child.id());
        assert!(!peer.has_ended().unwrap());
        peer.kill().unwrap();
        assert!(!child.wait().unwrap().success());
        assert!(peer.has_ended().unwrap());
        assert!(Peer::from_pidfd(peer.pidfd().try_clone().unwrap()).is_err());
        peer.kill().unwrap();
    }

    /// A VMM in a namespace of which we know nothing cannot be stopped by us, so it is not served.
    #[test]
    fn one_that_cannot_be_seen_is_an_error() {
        assert_eq!(visible(0).unwrap_err().raw_os_error(), Some(libc::ESRCH));
        let (one, _two) = UnixStream::pair().unwrap();
        let credentials = credentials_of_peer(&one).unwrap();
        assert_eq!(credentials.uid, rustix::process::getuid().as_raw());
        assert_eq!(visible(credentials.pid).unwrap(), rustix::process::getpid());
    }

    #[test]
    fn the_one_that_connected_is_meant() {
        let folder = std::env::temp_dir().join(format!("peer-{}", std::process::id()));
        let listener = UnixListener::bind(&folder).unwrap();
        let _client = UnixStream::connect(&folder).unwrap();
        let (server, _) = listener.accept().unwrap();
        std::fs::remove_file(&folder).unwrap();
        assert_eq!(Peer::of(&server).unwrap().pid(), std::process::id());
    }
}
