//! A whole NBD client, from its flags on.
#![no_main]

use dormouse_fuzz::nbd::serve;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| serve(data.to_vec()));
