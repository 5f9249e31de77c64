//! What a server of a disk says: the handshake, then the answer to a read.
#![no_main]

use dormouse_formats::disk::Client;
use dormouse_fuzz::foreign::Server;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let Ok(mut client) = Client::begin(Server(data)) else { return };
    let mut buf = [0; 512];
    while client.read_at(&mut buf, 4096).is_ok() {}
});
