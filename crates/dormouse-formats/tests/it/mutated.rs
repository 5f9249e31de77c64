//! The fuzzers' seeds of foreign parsers, changed at random: what `make fuzz` does for a minute each,
//! for a moment.

use std::fs;
use std::path::Path;

use dormouse_formats::disk::{Client, Info};
use dormouse_formats::e2b::build::BuildMetadata;
use dormouse_formats::e2b::header::Header as E2bHeader;
use dormouse_formats::qemu::mapped_ram_maps;
use dormouse_formats::replay::check_plain;
use dormouse_formats::wrenn::{Header as WrennHeader, RootMeta};
use dormouse_testkit::foreign::random::Random;

use crate::accepted::{Server, check_disk_runs, check_map};

const ROUNDS: usize = 4000;

/// Calls `read` with each seed of a fuzz target, then with changed ones; how many it accepted.
fn changed(target: &str, read: &mut dyn FnMut(&[u8]) -> bool) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/seeds").join(target);
    let seeds: Vec<Vec<u8>> = fs::read_dir(&folder)
        .unwrap()
        .map(|entry| fs::read(entry.unwrap().path()).unwrap())
        .filter(|seed| !seed.is_empty())
        .collect();
    assert!(seeds.iter().any(|seed| read(seed)), "no seed of {target} is accepted");
    let mut random = Random::new(target.len() as u64);
    for round in 0..ROUNDS {
        let mut bytes = seeds[round % seeds.len()].clone();
        for _ in 0..=random.below(3) {
            // Most of what is looked at is at the beginning.
            let near = if random.below(2) == 0 { bytes.len().min(256) } else { bytes.len() };
            let at = random.below(near);
            match random.below(4) {
                0 => bytes[at] ^= 1 << random.below(8),
                1 => bytes[at] = [0, 1, 0x7f, 0x80, 0xff][random.below(5)],
                2 => bytes.truncate(at.max(1)),
                _ => bytes.insert(at, b'0' + random.below(10) as u8),
            }
        }
        read(&bytes);
    }
}

/// The import's parser and the comparison's share nothing, and say the same of every page.
#[test]
fn headers_that_are_accepted_are_read_alike_by_both_parsers() {
    changed("wrenn_header", &mut |bytes| {
        let Ok(header) = WrennHeader::parse(bytes) else { return false };
        check_map(&header.map);
        check_plain(bytes, &header.map).unwrap();
        true
    });
    changed("e2b_header", &mut |bytes| {
        let Ok(header) = E2bHeader::parse(bytes) else { return false };
        check_map(&header.map);
        check_plain(bytes, &header.map).unwrap();
        true
    });
}

#[test]
fn what_other_programs_wrote_is_read_or_refused() {
    changed("wrenn_meta", &mut |bytes| RootMeta::parse(bytes).is_ok());
    changed("e2b_metadata", &mut |bytes| BuildMetadata::parse(bytes).is_ok());
    changed("mapped_ram", &mut |bytes| {
        let Ok(maps) = mapped_ram_maps(&bytes.to_vec()) else { return false };
        maps.iter().for_each(check_map);
        assert_eq!(maps[1].size_bytes(), bytes.len() as u64);
        true
    });
}

#[test]
fn runs_of_a_disk_are_whole_blocks_in_order() {
    changed("qemu_img", &mut |bytes| {
        let mut accepted = Info::parse(bytes, "/disk").is_ok();
        for (size_bytes, has_lower) in [(0, false), (512, true), (1 << 20, true), (1 << 20, false)]
        {
            accepted |= check_disk_runs(bytes, size_bytes, has_lower);
        }
        accepted
    });
}

#[test]
fn a_server_that_says_something_else_is_an_error() {
    changed("nbd_replies", &mut |bytes| {
        let Ok(mut client) = Client::begin(Server(bytes)) else { return false };
        let mut buf = [0; 512];
        let mut reads = 0;
        while client.read_at(&mut buf, 4096).is_ok() {
            reads += 1;
        }
        reads > 0
    });
}
