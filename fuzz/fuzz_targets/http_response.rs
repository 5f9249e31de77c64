//! Responses of a VMM's API: in pieces as at once, and never more than a body may have.
#![no_main]

use dormouse_vmm::http::response::{BODY_BYTES_MAX, Decoder, Response};
use libfuzzer_sys::fuzz_target;

fn decode<'a>(pieces: impl Iterator<Item = &'a [u8]>) -> Option<Option<Response>> {
    let mut decoder = Decoder::new();
    for piece in pieces {
        match decoder.push(piece) {
            Ok(Some(response)) => return Some(Some(response)),
            Ok(None) => {}
            Err(_) => return None,
        }
    }
    decoder.end().ok()
}

fuzz_target!(|data: &[u8]| {
    let (Some(size), Some(bytes)) = (data.first(), data.get(1..)) else { return };
    let at_once = decode(std::iter::once(bytes));
    let in_pieces = decode(bytes.chunks(usize::from(*size) + 1));
    if let (Some(at_once), Some(in_pieces)) = (&at_once, &in_pieces) {
        assert_eq!(at_once, in_pieces);
    }
    if let Some(Some(response)) = in_pieces {
        assert!(response.body.len() <= BODY_BYTES_MAX && response.body.len() <= bytes.len());
    }
});
