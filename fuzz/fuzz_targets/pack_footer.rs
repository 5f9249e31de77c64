//! A whole pack: as it comes, and with its checksums made to match.
#![no_main]

use dormouse_fuzz::{read_everything, sign};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    read_everything(data);
    let mut signed = data.to_vec();
    sign(&mut signed);
    read_everything(&signed);
});
