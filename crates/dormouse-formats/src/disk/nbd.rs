//! The little of an NBD client that reading takes: the fixed newstyle handshake with `GO`, and plain
//! reads. The server is a child of ours.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use crate::error::{Context, Error, ErrorKind, Result};

const NBD_MAGIC: u64 = 0x4e42_444d_4147_4943;
const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
const REQUEST_MAGIC: u32 = 0x2560_9513;
const REPLY_MAGIC: u32 = 0x6744_6698;
const FIXED_NEWSTYLE_NO_ZEROES: u32 = 3;
const OPTION_GO: u32 = 7;
const REPLY_ACK: u32 = 1;
const REPLY_INFO: u32 = 3;

/// Replies to `GO` until the last, and bytes of one: a server of ours sends three short ones.
const REPLIES_MAX: usize = 64;
const REPLY_BYTES_MAX: u32 = 64 << 10;

/// No handshake of a server on this host takes longer.
const HANDSHAKE: Duration = Duration::from_secs(20);

/// No read of a local disk takes longer.
const PATIENCE: Duration = Duration::from_secs(300);

/// A client of a server that was greeted.
#[derive(Debug)]
pub struct Client<S> {
    stream: S,
    next: u64,
}

/// A connection to a server of ours.
pub(super) type Connection = Client<UnixStream>;

impl Connection {
    /// Connects to the one export there is.
    pub(super) fn open(socket: &Path) -> Result<Connection> {
        Connection::open_within(socket, HANDSHAKE)
    }

    fn open_within(socket: &Path, patience: Duration) -> Result<Connection> {
        let what = || "cannot talk to the NBD server".to_owned();
        let stream = UnixStream::connect(socket).context(what)?;
        stream.set_read_timeout(Some(patience)).context(what)?;
        stream.set_write_timeout(Some(PATIENCE)).context(what)?;
        let client = Client::begin(stream)?;
        client.stream.set_read_timeout(Some(PATIENCE)).context(what)?;
        Ok(client)
    }
}

impl<S: Read + Write> Client<S> {
    /// Greets a server and takes the one export there is.
    pub fn begin(mut stream: S) -> Result<Client<S>> {
        let what = || "cannot talk to the NBD server".to_owned();
        let mut greeting = [0; 18];
        stream.read_exact(&mut greeting).context(what)?;
        if number64(&greeting, 0) != NBD_MAGIC || number64(&greeting, 8) != OPTION_MAGIC {
            return Err(Error::new(ErrorKind::Tool, "the NBD server greets as none does"));
        }
        let mut hello = FIXED_NEWSTYLE_NO_ZEROES.to_be_bytes().to_vec();
        hello.extend(OPTION_MAGIC.to_be_bytes());
        hello.extend(OPTION_GO.to_be_bytes());
        // An empty name, and no wish for information.
        hello.extend(6_u32.to_be_bytes());
        hello.extend([0; 6]);
        stream.write_all(&hello).context(what)?;
        for _ in 0..REPLIES_MAX {
            let mut head = [0; 20];
            stream.read_exact(&mut head).context(what)?;
            let (kind, len) = (number32(&head, 12), number32(&head, 16));
            if number64(&head, 0) != OPTION_REPLY_MAGIC || len > REPLY_BYTES_MAX {
                break;
            }
            let mut body = vec![0; usize::try_from(len).unwrap_or(0)];
            stream.read_exact(&mut body).context(what)?;
            match kind {
                REPLY_ACK => return Ok(Client { stream, next: 0 }),
                REPLY_INFO => {}
                _ => break,
            }
        }
        Err(Error::new(ErrorKind::Tool, "the NBD server refuses the export"))
    }

    /// Fills `buf` from `offset`.
    pub fn read_at(&mut self, buf: &mut [u8], offset: u64) -> Result<()> {
        let bytes = buf.len();
        let what = || format!("cannot read {bytes} bytes at {offset} over NBD");
        let len = u32::try_from(buf.len())
            .map_err(|_| Error::new(ErrorKind::InvalidInput, "more than 4 GiB in one read"))?;
        let cookie = self.next;
        self.next += 1;
        let mut request = REQUEST_MAGIC.to_be_bytes().to_vec();
        request.extend([0; 4]);
        request.extend(cookie.to_be_bytes());
        request.extend(offset.to_be_bytes());
        request.extend(len.to_be_bytes());
        self.stream.write_all(&request).context(what)?;
        let mut reply = [0; 16];
        self.stream.read_exact(&mut reply).context(what)?;
        if number32(&reply, 0) != REPLY_MAGIC || number64(&reply, 8) != cookie {
            return Err(Error::new(ErrorKind::Tool, "the NBD server answers something else"));
        }
        match number32(&reply, 4) {
            0 => self.stream.read_exact(buf).context(what),
            errno => Err(Error::new(
                ErrorKind::Corrupt,
                format!("{}: error {errno}: is the disk damaged?", what()),
            )),
        }
    }
}

fn number32(bytes: &[u8], at: usize) -> u32 {
    let mut number = [0; 4];
    number.copy_from_slice(&bytes[at..at + 4]);
    u32::from_be_bytes(number)
}

fn number64(bytes: &[u8], at: usize) -> u64 {
    let mut number = [0; 8];
    number.copy_from_slice(&bytes[at..at + 8]);
    u64::from_be_bytes(number)
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;
    use std::time::Instant;

    use super::*;

    #[test]
    fn a_server_that_says_nothing_is_not_waited_for() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("nbd");
        let _listener = UnixListener::bind(&path).unwrap();
        let begin = Instant::now();
        let error = Connection::open_within(&path, Duration::from_millis(200)).unwrap_err();
        assert_eq!(error.to_string(), "cannot talk to the NBD server");
        assert!(begin.elapsed() < HANDSHAKE, "{:?}", begin.elapsed());
    }
}
