//! NBD requests after a handshake of each form.
#![no_main]

use dormouse_fuzz::nbd::serve;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let Some((form, requests)) = data.split_first() else { return };
    let option = |number: u8, data: &[u8]| {
        let length = u8::try_from(data.len()).expect("short options");
        [b"IHAVEOPT\0\0\0", &[number, 0, 0, 0, length][..], data].concat()
    };
    let mut client = vec![0, 0, 0, 3];
    match form % 3 {
        0 => {}
        1 => client.extend(option(8, b"")),
        _ => client.extend(option(11, b"")),
    }
    if form & 0x80 != 0 {
        client.extend(option(10, b"\0\0\0\x01a\0\0\0\x01\0\0\0\x0fbase:allocation"));
    }
    client.extend(option(7, b"\0\0\0\x01a\0\0"));
    client.extend(requests);
    serve(client);
});
