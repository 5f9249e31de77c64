//! The kernel's NBD driver: `/dev/nbdN` over sockets that a server of ours has the other ends of.
//!
//! By generic netlink, family `nbd` of `linux/nbd-netlink.h`. The kernel does no handshake: it is
//! told size, block size and flags, and begins with requests. It needs `CAP_SYS_ADMIN`, and a
//! module that is loaded (`modprobe nbd`).

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use crate::netlink::{Family, Request};

const FAMILY: &str = "nbd";
const VERSION: u8 = 1;

const CMD_CONNECT: u8 = 1;
const CMD_DISCONNECT: u8 = 2;

const ATTR_INDEX: u16 = 1;
const ATTR_SIZE_BYTES: u16 = 2;
const ATTR_BLOCK_SIZE_BYTES: u16 = 3;
const ATTR_TIMEOUT: u16 = 4;
const ATTR_SERVER_FLAGS: u16 = 5;
const ATTR_CLIENT_FLAGS: u16 = 6;
const ATTR_SOCKETS: u16 = 7;
const ATTR_DEAD_CONN_TIMEOUT: u16 = 8;
const SOCK_ITEM: u16 = 1;
const SOCK_FD: u16 = 1;

/// A device to be connected.
#[derive(Clone, Debug)]
pub struct NbdDevice<'a> {
    /// N of `/dev/nbdN`.
    pub index: u32,

    /// Bytes of the device, a multiple of its blocks.
    pub size_bytes: u64,

    /// Bytes of a logical block: a power of two from 512 to a page.
    pub block_bytes: u64,

    /// Transmission flags, as a server tells them in its handshake.
    pub server_flags: u16,

    /// Seconds that a request may take before its connection counts as dead; 0 is for ever.
    pub request_timeout_s: u64,

    /// Seconds that requests wait for another connection when all are dead; then they fail.
    pub dead_timeout_s: u64,

    /// One or more connected stream sockets. The kernel keeps them by itself.
    pub sockets: Vec<BorrowedFd<'a>>,
}

impl NbdDevice<'_> {
    fn put(&self, request: &mut Request) {
        request.put_u32(ATTR_INDEX, self.index);
        request.put_u64(ATTR_SIZE_BYTES, self.size_bytes);
        request.put_u64(ATTR_BLOCK_SIZE_BYTES, self.block_bytes);
        request.put_u64(ATTR_TIMEOUT, self.request_timeout_s);
        request.put_u64(ATTR_DEAD_CONN_TIMEOUT, self.dead_timeout_s);
        request.put_u64(ATTR_SERVER_FLAGS, u64::from(self.server_flags));
        // Neither destroyed when disconnected nor disconnected when closed.
        request.put_u64(ATTR_CLIENT_FLAGS, 0);
        request.nest(ATTR_SOCKETS, |sockets| {
            for socket in &self.sockets {
                let fd = socket.as_raw_fd().cast_unsigned();
                sockets.nest(SOCK_ITEM, |item| item.put_u32(SOCK_FD, fd));
            }
        });
    }

    /// Connects the device. `NotFound` where the module is not loaded, `ResourceBusy` where the
    /// device is connected, `PermissionDenied` for others than root.
    pub fn connect(&self) -> io::Result<()> {
        Family::find(FAMILY)?.ask(CMD_CONNECT, VERSION, |request| self.put(request)).map(drop)
    }
}

/// Disconnects `/dev/nbdN`; whoever has it open gets errors from then on.
pub fn disconnect(index: u32) -> io::Result<()> {
    let put = |request: &mut Request| request.put_u32(ATTR_INDEX, index);
    Family::find(FAMILY)?.ask(CMD_DISCONNECT, VERSION, put).map(drop)
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;

    use super::*;
    use crate::netlink::attribute;

    /// Against `linux/nbd-netlink.h` and the types that the driver's policy has for them.
    #[test]
    fn a_connect_request_holds_what_the_driver_reads() {
        let (a, b) = UnixStream::pair().unwrap();
        let device = NbdDevice {
            index: 3,
            size_bytes: 1 << 40,
            block_bytes: 4096,
            server_flags: 0x12d,
            request_timeout_s: 120,
            dead_timeout_s: 10,
            sockets: vec![a.as_fd(), b.as_fd()],
        };
        let mut request = Request::new(29, 1, CMD_CONNECT, VERSION);
        device.put(&mut request);
        let message = request.finish();
        assert_eq!(message[16..20], [1, 1, 0, 0]);
        let attributes = &message[20..];
        let number = |kind: u16| {
            attribute(attributes, kind).map(|value| u64::from_ne_bytes(value.try_into().unwrap()))
        };
        assert_eq!(attribute(attributes, 1), Some(&3_u32.to_ne_bytes()[..]));
        assert_eq!(
            [2, 3, 4, 5, 6, 8].map(number),
            [1 << 40, 4096, 120, 0x12d, 0, 10].map(Some),
            "size, block size, timeout, server flags, client flags, dead timeout"
        );
        let sockets = attribute(attributes, 7).unwrap();
        // Two items of eight bytes each with a header.
        assert_eq!(sockets.len(), 24);
        for (item, socket) in sockets.chunks(12).zip([&a, &b]) {
            let fd = attribute(attribute(item, 1).unwrap(), 1).unwrap();
            assert_eq!(fd, socket.as_raw_fd().to_ne_bytes());
        }
        assert_eq!(message.len() % 4, 0);
        assert_eq!(message[..4], u32::try_from(message.len()).unwrap().to_ne_bytes());
    }
}
