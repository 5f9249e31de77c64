//! A client of the protocol that times single requests: one at a time, structured replies.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;

use anyhow::{Result, bail, ensure};

use crate::peers::Server;

const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
const STRUCTURED_REPLY: u32 = 8;
const GO: u32 = 7;
const ACK: u32 = 1;
const REQUEST_MAGIC: u32 = 0x2560_9513;
const SIMPLE_MAGIC: u32 = 0x6744_6698;
const CHUNK_MAGIC: u32 = 0x668e_33ef;

/// A connection after its handshake.
#[derive(Debug)]
pub(crate) struct Client {
    stream: UnixStream,
}

impl Client {
    /// Connects, agrees on structured replies, and asks for the server's export.
    pub(crate) fn connect(server: &Server) -> Result<Client> {
        let mut client = Client { stream: UnixStream::connect(server.socket())? };
        let greeting: [u8; 18] = client.take()?;
        ensure!(&greeting[..8] == b"NBDMAGIC", "no NBD server");
        client.stream.write_all(&3_u32.to_be_bytes())?;
        client.option(STRUCTURED_REPLY, &[])?;
        let name = server.export();
        let mut go = u32::try_from(name.len())?.to_be_bytes().to_vec();
        go.extend_from_slice(name.as_bytes());
        go.extend_from_slice(&[0, 0]);
        client.option(GO, &go)?;
        Ok(client)
    }

    /// Sends an option and reads replies up to the one that agrees.
    fn option(&mut self, option: u32, data: &[u8]) -> Result<()> {
        let mut bytes = OPTION_MAGIC.to_be_bytes().to_vec();
        bytes.extend_from_slice(&option.to_be_bytes());
        bytes.extend_from_slice(&u32::try_from(data.len())?.to_be_bytes());
        bytes.extend_from_slice(data);
        self.stream.write_all(&bytes)?;
        loop {
            let reply: [u8; 20] = self.take()?;
            let kind = u32_at(&reply, 12);
            let mut rest = vec![0; u32_at(&reply, 16) as usize];
            self.stream.read_exact(&mut rest)?;
            if kind == ACK {
                return Ok(());
            }
            ensure!(kind >> 31 == 0, "option {option} was refused: {kind:#x}");
        }
    }

    /// Fills `buf` from `offset`.
    pub(crate) fn read(&mut self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.request(0, offset, buf.len(), &[])?;
        loop {
            let header: [u8; 20] = self.take()?;
            ensure!(u32_at(&header, 0) == CHUNK_MAGIC, "no chunk");
            let kind = u16::from_be_bytes([header[6], header[7]]);
            let length = u32_at(&header, 16) as usize;
            match kind {
                0 => {}
                1 => {
                    let at: [u8; 8] = self.take()?;
                    let at = usize::try_from(u64::from_be_bytes(at) - offset)?;
                    self.stream.read_exact(&mut buf[at..at + length - 8])?;
                }
                2 => {
                    let hole: [u8; 12] = self.take()?;
                    let at = u64::from(u32_at(&hole, 0)) << 32 | u64::from(u32_at(&hole, 4));
                    let at = usize::try_from(at - offset)?;
                    buf[at..at + u32_at(&hole, 8) as usize].fill(0);
                }
                _ => bail!("a read failed with a chunk of kind {kind:#x}"),
            }
            if header[5] & 1 != 0 {
                return Ok(());
            }
        }
    }

    /// Writes all of `data` at `offset`.
    pub(crate) fn write(&mut self, data: &[u8], offset: u64) -> Result<()> {
        self.request(1, offset, data.len(), data)?;
        self.answer()
    }

    /// Makes what was written durable.
    pub(crate) fn flush(&mut self) -> Result<()> {
        self.request(3, 0, 0, &[])?;
        self.answer()
    }

    fn request(&mut self, kind: u16, offset: u64, length: usize, data: &[u8]) -> Result<()> {
        let mut bytes = Vec::with_capacity(28 + data.len());
        bytes.extend_from_slice(&REQUEST_MAGIC.to_be_bytes());
        bytes.extend_from_slice(&[0, 0]);
        bytes.extend_from_slice(&kind.to_be_bytes());
        bytes.extend_from_slice(&[0; 8]);
        bytes.extend_from_slice(&offset.to_be_bytes());
        bytes.extend_from_slice(&u32::try_from(length)?.to_be_bytes());
        bytes.extend_from_slice(data);
        Ok(self.stream.write_all(&bytes)?)
    }

    /// The reply to what is no read: simple, or one chunk.
    fn answer(&mut self) -> Result<()> {
        let head: [u8; 16] = self.take()?;
        match u32_at(&head, 0) {
            SIMPLE_MAGIC => ensure!(u32_at(&head, 4) == 0, "error {}", u32_at(&head, 4)),
            CHUNK_MAGIC => {
                let length: [u8; 4] = self.take()?;
                ensure!(u32::from_be_bytes(length) == 0, "a request failed");
            }
            magic => bail!("{magic:#x} is no reply"),
        }
        Ok(())
    }

    fn take<const N: usize>(&mut self) -> Result<[u8; N]> {
        let mut bytes = [0; N];
        self.stream.read_exact(&mut bytes)?;
        Ok(bytes)
    }
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}
