//! What a server of a disk says: the handshake, then the answer to a read.
#![no_main]

use std::io::{self, Read, Write};

use dormouse_formats::disk::Client;
use libfuzzer_sys::fuzz_target;

struct Server<'a>(&'a [u8]);

impl Read for Server<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.0.read(buf)
    }
}

impl Write for Server<'_> {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        Ok(buf.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fuzz_target!(|data: &[u8]| {
    let Ok(mut client) = Client::begin(Server(data)) else { return };
    let mut buf = [0; 512];
    while client.read_at(&mut buf, 4096).is_ok() {}
});
