//! Copy-on-write stores of dm-snapshot.

use std::fs;

use dormouse_formats::error::ErrorKind;
use dormouse_formats::format::Format;
use dormouse_formats::import::LookOptions;
use dormouse_store::commit::Parent;
use dormouse_testkit::foreign::dm_snapshot::write;
use dormouse_testkit::foreign::random::{PAGE, Random};

use crate::world::{World, assert_same, chain};

#[test]
fn stores_of_several_chunk_sizes_and_areas_are_read() {
    // 256 exceptions fill an area of 4 KiB chunks: none, some, exactly one area, several.
    for (sectors, pages, writes) in
        [(8, 100, 0), (8, 300, 40), (8, 256, 5000), (8, 900, 5000), (16, 700, 300), (256, 700, 9)]
    {
        let world = World::new();
        let mut random = Random::new(u64::from(sectors) + writes as u64);
        let mut origin = random.device(pages);
        // A disk is sectors, not pages.
        origin.truncate(origin.len() - 1536);
        let mut disk = origin.clone();
        let whole = disk.len() / PAGE * PAGE;
        random.work(&mut disk[..whole], writes);
        if writes == 5000 {
            // Every chunk differs.
            disk.iter_mut().step_by(512).for_each(|byte| *byte ^= 0x55);
        }
        fs::write(world.path("origin"), &origin).unwrap();
        let changed = write(&world.path("cow"), &origin, &disk, sectors, 3).unwrap();
        if writes == 5000 {
            assert_eq!(changed, pages, "a full rewrite");
        }
        let options = LookOptions { origin: Some(world.path("origin")), ..LookOptions::default() };
        let done =
            world.import_over(Format::DmSnapshot, &world.path("cow"), &options, Parent::Auto);
        done.unwrap();
        assert_same(&world.bytes("vm", "root"), &disk, "disk");
    }
}

#[test]
fn damaged_and_foreign_stores_are_refused() {
    let world = World::new();
    let origin = Random::new(1).device(300);
    let mut disk = origin.clone();
    Random::new(2).work(&mut disk, 100);
    fs::write(world.path("origin"), &origin).unwrap();
    write(&world.path("good"), &origin, &disk, 8, 3).unwrap();
    let good = fs::read(world.path("good")).unwrap();
    let patched = |at: usize, value: &[u8]| {
        let mut bytes = good.clone();
        bytes[at..at + value.len()].copy_from_slice(value);
        bytes
    };
    let chunks = (good.len() / 4096) as u64;
    let cases = [
        (patched(0, b"snap"), ErrorKind::Corrupt, "magic".to_owned()),
        (patched(4, &[0]), ErrorKind::Refused, "marked invalid".to_owned()),
        (patched(8, &[2]), ErrorKind::Unsupported, "version 2; expected 1".to_owned()),
        (patched(12, &[1]), ErrorKind::Unsupported, "chunks of 1 sectors".to_owned()),
        (patched(12, &[9]), ErrorKind::Unsupported, "chunks of 9 sectors".to_owned()),
        (
            patched(4096 + 8, &chunks.to_le_bytes()),
            ErrorKind::Corrupt,
            format!(
                "at byte 4096: chunk {}",
                u64::from_le_bytes(good[4096..4104].try_into().unwrap())
            ),
        ),
        (
            patched(4096 + 8, &1_u64.to_le_bytes()),
            ErrorKind::Corrupt,
            "exceptions and no data".to_owned(),
        ),
        (
            patched(4096, &good[4096 + 16..4096 + 24]),
            ErrorKind::Corrupt,
            "lies at chunk".to_owned(),
        ),
        (
            patched(4096, &9999_u64.to_le_bytes()),
            ErrorKind::Corrupt,
            "is it another one?".to_owned(),
        ),
        (good[..10].to_vec(), ErrorKind::Corrupt, "it ends after 2 more bytes".to_owned()),
        (good[..4096].to_vec(), ErrorKind::Corrupt, "expected area 0".to_owned()),
    ];
    for (bytes, kind, why) in cases {
        fs::write(world.path("bad"), bytes).unwrap();
        let options = LookOptions { origin: Some(world.path("origin")), ..LookOptions::default() };
        let error = world
            .import_over(Format::DmSnapshot, &world.path("bad"), &options, Parent::Auto)
            .unwrap_err();
        assert!(chain(&error).contains(&why), "got: {}\nexpected: {why}", chain(&error));
        assert_eq!(error.kind(), kind, "{why}");
    }
}
