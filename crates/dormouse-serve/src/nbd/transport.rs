//! What a connection runs over: two halves that block, and a way to end both from elsewhere.

use std::fmt;
use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use super::input::Input;
use super::limits::SEND_BUFFER_BYTES;

/// The halves of a connection in the handshake, where they may be exchanged for encrypted ones.
pub(crate) struct Transport {
    pub(crate) input: Input,
    pub(crate) output: Box<dyn Write + Send>,
}

impl Transport {
    pub(crate) fn new(reader: Box<dyn Read + Send>, writer: Box<dyn Write + Send>) -> Transport {
        Transport { input: Input::new(reader), output: writer }
    }

    pub(crate) fn of_socket(socket: &Arc<Socket>) -> Transport {
        Transport::new(
            Box::new(SocketHalf(Arc::clone(socket))),
            Box::new(SocketHalf(Arc::clone(socket))),
        )
    }
}

impl fmt::Debug for Transport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Transport").field("input", &self.input).finish_non_exhaustive()
    }
}

/// A connected socket.
#[derive(Debug)]
pub(crate) enum Socket {
    Unix(UnixStream),
    Tcp(TcpStream),
}

impl Socket {
    /// Sets what makes replies go out at once and whole. Failing at it costs speed, no more.
    pub(crate) fn tune(&self) {
        let tuned = match self {
            Socket::Unix(stream) => {
                rustix::net::sockopt::set_socket_send_buffer_size(stream, SEND_BUFFER_BYTES)
                    .map_err(io::Error::from)
            }
            Socket::Tcp(stream) => stream
                .set_nodelay(true)
                .and_then(|()| Ok(rustix::net::sockopt::set_socket_keepalive(stream, true)?)),
        };
        if let Err(error) = tuned {
            tracing::debug!(%error, "cannot tune a socket");
        }
    }

    /// Whether bytes have come that were not read yet, or may have.
    pub(crate) fn has_input(&self) -> bool {
        let waiting = match self {
            Socket::Unix(stream) => rustix::io::ioctl_fionread(stream),
            Socket::Tcp(stream) => rustix::io::ioctl_fionread(stream),
        };
        waiting.map_or(true, |bytes| bytes > 0)
    }

    /// What comes from now on is an end; what the kernel has already is still read.
    pub(crate) fn stop_reading(&self) {
        self.shutdown(Shutdown::Read);
    }

    /// Ends both directions; whoever reads or writes returns.
    pub(crate) fn close(&self) {
        self.shutdown(Shutdown::Both);
    }

    fn shutdown(&self, how: Shutdown) {
        // It fails when the peer was quicker, which is as good.
        let _ = match self {
            Socket::Unix(stream) => stream.shutdown(how),
            Socket::Tcp(stream) => stream.shutdown(how),
        };
    }
}

struct SocketHalf(Arc<Socket>);

impl Read for SocketHalf {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match &*self.0 {
            Socket::Unix(stream) => (&mut &*stream).read(buffer),
            Socket::Tcp(stream) => (&mut &*stream).read(buffer),
        }
    }
}

impl Write for SocketHalf {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        match &*self.0 {
            Socket::Unix(stream) => (&mut &*stream).write(data),
            Socket::Tcp(stream) => (&mut &*stream).write(data),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
