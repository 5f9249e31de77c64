//! Descriptors sent over a unix socket (`SCM_RIGHTS`, `unix(7)`).

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};

/// The most descriptors that are sent with a message.
pub const DESCRIPTORS_MAX: usize = 16;

/// Sends all of `bytes`, the descriptors with the first of them.
///
/// # Panics
///
/// If there are no bytes, or more than [`DESCRIPTORS_MAX`] descriptors.
pub fn send(socket: impl AsFd, bytes: &[u8], descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
    assert!(!bytes.is_empty(), "descriptors travel with a byte");
    assert!(descriptors.len() <= DESCRIPTORS_MAX, "room for {DESCRIPTORS_MAX} descriptors");
    let mut sent = 0;
    while sent < bytes.len() {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS_MAX))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if sent == 0 && !descriptors.is_empty() {
            let has_room = control.push(SendAncillaryMessage::ScmRights(descriptors));
            debug_assert!(has_room, "as much as the space was made for");
        }
        let part = [IoSlice::new(&bytes[sent..])];
        match sendmsg(&socket, &part, &mut control, SendFlags::NOSIGNAL) {
            Ok(count) => sent += count,
            Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

/// Receives some bytes and adds the descriptors that came with them; 0 bytes at the end.
///
/// Waits as the socket is set to. `E2BIG` if there were more than [`DESCRIPTORS_MAX`] descriptors,
/// or more than this process may have.
pub fn receive(
    socket: impl AsFd,
    bytes: &mut [u8],
    descriptors: &mut Vec<OwnedFd>,
) -> io::Result<usize> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS_MAX))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut parts = [IoSliceMut::new(bytes)];
    let received = loop {
        match recvmsg(&socket, &mut parts, &mut control, RecvFlags::CMSG_CLOEXEC) {
            Err(Errno::INTR) => {}
            received => break received?,
        }
    };
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(some) = message {
            descriptors.extend(some);
        }
    }
    if received.flags.contains(ReturnFlags::CTRUNC) {
        return Err(Errno::TOOBIG.into());
    }
    Ok(received.bytes)
}

/// Bytes that were sent over a socket and not taken by its other end yet, in the kernel's own measure,
/// which is more than what was sent (`SIOCOUTQ`, `unix(7)`): none is none.
pub fn unread(socket: impl AsFd) -> io::Result<u64> {
    let mut bytes: libc::c_int = 0;
    // SAFETY: writes an int to where it points, which is one.
    let done = unsafe { libc::ioctl(socket.as_fd().as_raw_fd(), libc::TIOCOUTQ, &raw mut bytes) };
    if done < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(u64::try_from(bytes).unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::Read;
    use std::os::unix::net::UnixStream;

    use super::*;
    use crate::temp_file;

    #[test]
    fn descriptors_arrive_with_their_bytes() {
        let (here, there) = UnixStream::pair().unwrap();
        let file = temp_file::unnamed(&std::env::temp_dir()).unwrap();
        std::os::unix::fs::FileExt::write_all_at(&file, b"inside", 0).unwrap();
        send(&here, b"a file\n", &[file.as_fd()]).unwrap();
        let (mut bytes, mut descriptors) = ([0; 64], Vec::new());
        assert_eq!(receive(&there, &mut bytes, &mut descriptors).unwrap(), 7);
        let mut text = String::new();
        File::from(descriptors.remove(0)).read_to_string(&mut text).unwrap();
        assert_eq!(text, "inside");
        drop(here);
        assert_eq!(receive(&there, &mut bytes, &mut descriptors).unwrap(), 0);
    }

    #[test]
    fn what_nobody_took_is_told() {
        let (here, there) = UnixStream::pair().unwrap();
        assert_eq!(unread(&here).unwrap(), 0);
        send(&here, b"1234", &[]).unwrap();
        assert!(unread(&here).unwrap() > 0);
        let (mut bytes, mut descriptors) = ([0; 64], Vec::new());
        assert_eq!(receive(&there, &mut bytes, &mut descriptors).unwrap(), 4);
        assert_eq!(unread(&here).unwrap(), 0);
    }
}
