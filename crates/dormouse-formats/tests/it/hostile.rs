//! Headers made to hurt: bounded time and memory, and an error.

use std::time::Instant;

use dormouse_formats::e2b::header::Header;
use dormouse_formats::error::Error;
use dormouse_testkit::foreign::e2b::{Head, builds_section};
use dormouse_testkit::foreign::lz4;

const HEAD: Head =
    Head { version: 5, block: 4096, size: 1 << 30, generation: 1, build: [1; 16], base: [1; 16] };

fn with_block(version: u64, len: u32, frame: &[u8]) -> Result<Header, Error> {
    let mut bytes = Vec::new();
    for number in [version, HEAD.block, HEAD.size, HEAD.generation] {
        bytes.extend(number.to_le_bytes());
    }
    bytes.extend(HEAD.build);
    bytes.extend(HEAD.base);
    bytes.push(0);
    bytes.extend(len.to_le_bytes());
    bytes.extend(frame);
    let begin = Instant::now();
    let parsed = Header::parse(&bytes);
    assert!(begin.elapsed().as_secs() < 10, "a small header took {:?}", begin.elapsed());
    parsed
}

#[test]
fn counts_and_lengths_that_promise_too_much_are_refused_before_anything_is_made() {
    let no_builds = builds_section(&Default::default());
    let block = |parts: &[&[u8]]| parts.concat();
    let cases: Vec<(u64, Vec<u8>, &str)> = vec![
        (5, block(&[&u32::MAX.to_le_bytes()]), "4294967295 builds; at most 65535"),
        (5, block(&[&no_builds, &u32::MAX.to_le_bytes()]), "4294967295 builds; at most 65535"),
        (5, block(&[&no_builds, &[0; 4], &7_000_000_u32.to_le_bytes()]), "7000000 runs; at most 0"),
        (4, block(&[&no_builds, &u32::MAX.to_le_bytes()]), "4294967295 records; expected at most"),
        (4, block(&[&no_builds, &8_u32.to_le_bytes()]), "expected 320 of records"),
        (
            5,
            block(&[
                &1_u32.to_le_bytes(),
                &[7; 16],
                &[0; 40],
                &1_u32.to_le_bytes(),
                &u32::MAX.to_le_bytes(),
            ]),
            "4294967295 frames; at most 1048576",
        ),
        (
            5,
            block(&[&1_u32.to_le_bytes(), &[7; 16], &[0; 40], &[0; 4], &1_u32.to_le_bytes()]),
            "1 frames; at most 0",
        ),
        (
            5,
            block(&[
                &1_u32.to_le_bytes(),
                &[7; 16],
                &[0; 40],
                &1_u32.to_le_bytes(),
                &1_u32.to_le_bytes(),
                &[0; 16],
                &i32::MAX.to_le_bytes(),
                &1_i32.to_le_bytes(),
            ]),
            "a frame of 2147483647 bytes in 1; at most",
        ),
    ];
    for (version, block, why) in cases {
        let frame = lz4::frame(&block, 0x74);
        let error = with_block(version, block.len() as u32, &frame).unwrap_err();
        assert!(error.to_string().contains(why), "got: {error}\nexpected: {why}");
    }
}

#[test]
fn a_block_is_as_long_as_it_says_or_refused() {
    let frame = lz4::frame(&[0; 100], 0x74);
    for (len, why) in [
        (99, "it has at least 100 bytes; expected 99"),
        (101, "it has 100 bytes; expected 101"),
        (u32::MAX, "a block of 4294967295 bytes; at most 268435456"),
    ] {
        let error = with_block(5, len, &frame).unwrap_err();
        assert!(error.to_string().contains(why), "got: {error}\nexpected: {why}");
    }
    for at in 0..frame.len() {
        let mut bad = frame.clone();
        bad[at] ^= 0x10;
        let _ = with_block(5, 100, &bad);
        let _ = with_block(4, 100, &frame[..at]);
    }
}

/// 64 MiB of zeros in a block that says it has 1 MiB: no more than that is decoded.
#[test]
fn a_bomb_is_decoded_no_further_than_its_header_says() {
    let bomb = lz4_flex_bomb(64 << 20);
    let error = with_block(5, 1 << 20, &bomb).unwrap_err();
    assert!(error.to_string().contains("at least 1048577 bytes; expected 1048576"), "{error}");
}

/// Blocks of LZ4 that repeat one byte: 255 to 1.
fn lz4_flex_bomb(len: usize) -> Vec<u8> {
    let mut frame = lz4::frame(b"", 0x70);
    frame.truncate(7);
    let mut block = vec![0x1f, 0x00, 0x01, 0x00];
    block.extend(vec![0xff; (4 << 20) / 255 - 1]);
    block.push(0);
    // The last five bytes of a block are literals.
    block.extend([0x50, 0, 0, 0, 0, 0]);
    for _ in 0..len / (4 << 20) {
        frame.extend((block.len() as u32).to_le_bytes());
        frame.extend(&block);
        frame.extend(lz4::xxh32(&block).to_le_bytes());
    }
    frame.extend([0; 4]);
    frame
}
