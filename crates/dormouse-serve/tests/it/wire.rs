//! A client that says exactly what it is told to, and a server to say it to.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};
use std::sync::Arc;
use std::time::Duration;

use dormouse_serve::nbd::{Export, Limits, Server};

use crate::memory::Memory;

pub(crate) const READ: u16 = 0;
pub(crate) const WRITE: u16 = 1;
pub(crate) const DISC: u16 = 2;
pub(crate) const FLUSH: u16 = 3;
pub(crate) const TRIM: u16 = 4;
pub(crate) const CACHE: u16 = 5;
pub(crate) const ZEROES: u16 = 6;
pub(crate) const STATUS: u16 = 7;

pub(crate) struct Fixture {
    pub(crate) folder: tempfile::TempDir,
    pub(crate) memory: Arc<Memory>,
    pub(crate) server: Server,
}

impl Fixture {
    pub(crate) fn new(bytes: Vec<u8>) -> Fixture {
        Fixture::with(Memory::new(bytes), Limits::STANDARD)
    }

    pub(crate) fn with(memory: Memory, limits: Limits) -> Fixture {
        let folder = tempfile::tempdir().unwrap();
        let memory = Arc::new(memory);
        let mut fixed = Memory::new(Memory::pattern(1 << 20));
        fixed.read_only = true;
        let server = Server::builder(limits)
            .export(Export::new("disk", memory.clone()).description("a disk in memory"))
            .export(Export::new("fixed", Arc::new(fixed)))
            .default_export("disk")
            .listen_unix(folder.path().join("s"))
            .start()
            .unwrap();
        Fixture { folder, memory, server }
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.folder.path().join("s")
    }

    pub(crate) fn uri(&self) -> String {
        format!("nbd+unix:///disk?socket={}", self.socket().display())
    }

    pub(crate) fn client(&self) -> Client {
        Client::connect(self)
    }
}

/// Runs a program; its output if it succeeded.
pub(crate) fn run(program: &str, arguments: &[&str]) -> String {
    let output = try_run(program, arguments);
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {arguments:?}: {text}{errors}");
    text
}

pub(crate) fn try_run(program: &str, arguments: &[&str]) -> Output {
    // A client that hangs is a failure, not a test that never ends.
    let mut command = Command::new("timeout");
    command.args(["-k", "1", "60", program]).args(arguments).stdin(Stdio::null());
    command.output().unwrap_or_else(|error| panic!("{program}: {error}; `cargo xtask packages`"))
}

pub(crate) struct Client {
    pub(crate) stream: UnixStream,
    pub(crate) extended: bool,
}

/// A chunk of either form; simple replies are chunks of kind `None`.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Reply {
    pub(crate) kind: Option<u16>,
    pub(crate) done: bool,
    pub(crate) cookie: u64,
    pub(crate) error: u32,
    pub(crate) payload: Vec<u8>,
}

impl Client {
    /// Past the greeting.
    pub(crate) fn connect(fixture: &Fixture) -> Client {
        let mut stream = UnixStream::connect(fixture.socket()).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        let mut greeting = [0; 18];
        stream.read_exact(&mut greeting).unwrap();
        assert_eq!(&greeting, b"NBDMAGICIHAVEOPT\0\x03");
        stream.write_all(&[0, 0, 0, 3]).unwrap();
        Client { stream, extended: false }
    }

    pub(crate) fn send_option(&mut self, option: u32, data: &[u8]) {
        let mut bytes = b"IHAVEOPT".to_vec();
        bytes.extend(option.to_be_bytes());
        bytes.extend(u32::try_from(data.len()).unwrap().to_be_bytes());
        bytes.extend(data);
        self.stream.write_all(&bytes).unwrap();
    }

    /// Replies up to and with the last one, with their data.
    pub(crate) fn option(&mut self, option: u32, data: &[u8]) -> Vec<(u32, Vec<u8>)> {
        self.send_option(option, data);
        let mut replies = Vec::new();
        loop {
            let header = self.take(20);
            assert_eq!(header[..8], 0x0003_e889_0455_65a9u64.to_be_bytes());
            assert_eq!(header[8..12], option.to_be_bytes());
            let reply = u32_at(&header, 12);
            let data = self.take(u32_at(&header, 16) as usize);
            replies.push((reply, data));
            if reply == 1 || reply >> 31 == 1 {
                return replies;
            }
        }
    }

    /// The last reply to an option.
    pub(crate) fn verdict(&mut self, option: u32, data: &[u8]) -> u32 {
        self.option(option, data).last().unwrap().0
    }

    pub(crate) fn structured(mut self) -> Client {
        assert_eq!(self.verdict(8, &[]), 1);
        self
    }

    pub(crate) fn extended(mut self) -> Client {
        assert_eq!(self.verdict(11, &[]), 1);
        self.extended = true;
        self
    }

    pub(crate) fn go(mut self, name: &str) -> Client {
        assert_eq!(self.verdict(7, &info(name, &[])), 1);
        self
    }

    pub(crate) fn select(mut self, contexts: &[&str]) -> Client {
        let replies = self.option(10, &meta("disk", contexts));
        assert_eq!(replies.len(), contexts.len() + 1, "{replies:?}");
        self
    }

    pub(crate) fn request(
        &mut self,
        command: u16,
        flags: u16,
        cookie: u64,
        offset: u64,
        length: u64,
    ) {
        let bytes = self.header(command, flags, cookie, offset, length);
        self.stream.write_all(&bytes).unwrap();
    }

    pub(crate) fn header(
        &self,
        command: u16,
        flags: u16,
        cookie: u64,
        offset: u64,
        length: u64,
    ) -> Vec<u8> {
        let magic: u32 = if self.extended { 0x21e4_1c71 } else { 0x2560_9513 };
        let mut bytes = magic.to_be_bytes().to_vec();
        bytes.extend(flags.to_be_bytes());
        bytes.extend(command.to_be_bytes());
        bytes.extend(cookie.to_be_bytes());
        bytes.extend(offset.to_be_bytes());
        if self.extended {
            bytes.extend(length.to_be_bytes());
        } else {
            bytes.extend(u32::try_from(length).unwrap().to_be_bytes());
        }
        bytes
    }

    /// The next reply or chunk; `data` is what a simple reply carries if it is no error.
    pub(crate) fn reply(&mut self, data: usize) -> Reply {
        let magic = u32_at(&self.take(4), 0);
        match magic {
            0x6744_6698 => {
                let rest = self.take(12);
                let error = u32_at(&rest, 0);
                let payload = if error == 0 { self.take(data) } else { Vec::new() };
                Reply { kind: None, done: true, cookie: u64_at(&rest, 4), error, payload }
            }
            0x668e_33ef => {
                let rest = self.take(16);
                let payload = self.take(u32_at(&rest, 12) as usize);
                chunk(&rest, payload)
            }
            0x6e8a_278c => {
                let rest = self.take(28);
                let payload = self.take(u64_at(&rest, 20) as usize);
                chunk(&rest, payload)
            }
            _ => panic!("reply magic {magic:#x}"),
        }
    }

    /// The error of the next reply.
    pub(crate) fn error_of(&mut self, command: u16, flags: u16, offset: u64, length: u64) -> u32 {
        self.request(command, flags, 77, offset, length);
        let reply = self.reply(0);
        assert_eq!((reply.cookie, reply.done), (77, true));
        reply.error
    }

    /// Whether the connection still answers.
    pub(crate) fn lives(&mut self) -> bool {
        self.request(FLUSH, 0, 4711, 0, 0);
        let reply = self.reply(0);
        reply.cookie == 4711 && reply.error == 0
    }

    /// Waits for the server to hang up; what came before.
    pub(crate) fn end(&mut self) -> Vec<u8> {
        let mut rest = Vec::new();
        // Hanging up on unread bytes resets the connection.
        let _ = self.stream.read_to_end(&mut rest);
        rest
    }

    pub(crate) fn take(&mut self, count: usize) -> Vec<u8> {
        let mut bytes = vec![0; count];
        self.stream.read_exact(&mut bytes).unwrap();
        bytes
    }
}

fn chunk(rest: &[u8], payload: Vec<u8>) -> Reply {
    let kind = u16::from_be_bytes([rest[2], rest[3]]);
    let error = if kind >> 15 == 1 { u32_at(&payload, 0) } else { 0 };
    Reply { kind: Some(kind), done: rest[1] & 1 == 1, cookie: u64_at(rest, 4), error, payload }
}

pub(crate) fn info(name: &str, wanted: &[u16]) -> Vec<u8> {
    let mut data = u32::try_from(name.len()).unwrap().to_be_bytes().to_vec();
    data.extend(name.as_bytes());
    data.extend(u16::try_from(wanted.len()).unwrap().to_be_bytes());
    data.extend(wanted.iter().flat_map(|kind| kind.to_be_bytes()));
    data
}

pub(crate) fn meta(name: &str, queries: &[&str]) -> Vec<u8> {
    let mut data = u32::try_from(name.len()).unwrap().to_be_bytes().to_vec();
    data.extend(name.as_bytes());
    data.extend(u32::try_from(queries.len()).unwrap().to_be_bytes());
    for query in queries {
        data.extend(u32::try_from(query.len()).unwrap().to_be_bytes());
        data.extend(query.as_bytes());
    }
    data
}

pub(crate) fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes(bytes[at..at + 4].try_into().unwrap())
}

pub(crate) fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap())
}
