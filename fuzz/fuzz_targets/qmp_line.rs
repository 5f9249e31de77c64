//! Lines of QEMU's machine protocol: any bytes are a message or an error.
#![no_main]

use dormouse_vmm::qemu::message::{Message, parse};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    match parse(data) {
        Ok(Message::Event { name, .. }) => {
            let text = String::from_utf8_lossy(data);
            assert!(name.is_empty() || text.contains("event"), "an event out of nothing");
        }
        Ok(_) | Err(_) => {}
    }
});
