//! Prefetching and reading ahead: into the frame cache, within its budget, each frame once.

use std::thread;
use std::time::{Duration, Instant};

use dormouse_image::block::HoleMeaning;
use dormouse_store::commit::{CommitRequest, NewImage};
use dormouse_store::name::ImageName;
use dormouse_store::progress::Job;
use dormouse_store::reader::{Effort, ImageReader, ReadAhead};
use dormouse_store::source::Source;
use dormouse_store::store::{Config, Store};

const SIZE: u64 = 16 << 20;

/// Frames of 64 KiB, if none are shared.
const FRAMES: u64 = SIZE / (64 << 10);

fn content() -> Vec<u8> {
    (0..SIZE / 8).flat_map(|word| (word / 512 * 0x9e37_79b9 + word % 7).to_le_bytes()).collect()
}

/// A store that was just opened, so that nothing is cached, and an image in it.
fn cold(dir: &tempfile::TempDir, frame_cache_bytes: u64) -> (Store, ImageReader) {
    let path = dir.path().join("store");
    if !path.exists() {
        let store = Store::init(&path, Config::STANDARD).unwrap();
        let mut request = CommitRequest::new("vm".parse().unwrap());
        request.images.push(NewImage {
            image: ImageName::Memory,
            source: Source::Bytes(content().into()),
            holes: HoleMeaning::Zero,
        });
        request.images.push(NewImage {
            image: "state/vmstate".parse().unwrap(),
            source: Source::Bytes(vec![1].into()),
            holes: HoleMeaning::Zero,
        });
        store.commit(request, Job::quiet()).unwrap();
    }
    let config = Config { frame_cache_bytes, ..Config::STANDARD };
    let store = Store::open(&path, config).unwrap();
    let snapshot = store.snapshot(&"vm".parse().unwrap()).unwrap();
    let image = snapshot.image(&ImageName::Memory).unwrap();
    (store, image)
}

#[test]
fn what_is_prefetched_is_decoded_once_and_cached() {
    let dir = tempfile::tempdir().unwrap();
    let (store, image) = cold(&dir, 64 << 20);
    assert!(!image.is_cached(0..4096));
    image.prefetch(4096..1 << 20).unwrap();
    assert!(image.is_cached(4096..1 << 20));
    assert!(!image.is_cached(0..2 << 20));
    let decoded = store.decoded_frames();
    let mut bytes = vec![0; (1 << 20) - 4096];
    image.read_at(&mut bytes, 4096).unwrap();
    assert!(bytes == content()[4096..1 << 20]);
    assert_eq!(store.decoded_frames(), decoded);
    // A range past the end is cut.
    image.prefetch(SIZE - 4096..SIZE + (1 << 20)).unwrap();
    assert!(image.is_cached(SIZE - 1..SIZE));
}

/// Eight readers want the same cold image at once; each frame has one decoder.
#[test]
fn a_frame_that_many_want_is_decoded_once() {
    let dir = tempfile::tempdir().unwrap();
    let (store, image) = cold(&dir, 64 << 20);
    let expected = content();
    thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                let mut bytes = vec![0; 1 << 20];
                for at in (0..SIZE).step_by(1 << 20) {
                    image.read_at(&mut bytes, at).unwrap();
                    assert!(bytes == expected[usize::try_from(at).unwrap()..][..1 << 20]);
                }
            });
        }
    });
    assert_eq!(store.decoded_frames(), FRAMES);
}

#[test]
fn a_sequential_reader_finds_what_comes_next() {
    let dir = tempfile::tempdir().unwrap();
    let (_store, image) = cold(&dir, 64 << 20);
    let ahead = ReadAhead::new(image.clone());
    let mut bytes = vec![0; 256 << 10];
    for step in 0..4_u64 {
        ahead.read_at(&mut bytes, step * (256 << 10)).unwrap();
    }
    let begun = Instant::now();
    while !image.is_cached(1 << 20..5 << 18) {
        assert!(begun.elapsed() < Duration::from_secs(30), "nothing was read ahead");
        thread::sleep(Duration::from_millis(1));
    }
    assert!(!image.is_cached(SIZE - (4 << 20)..SIZE), "that far ahead was nobody asked");
}

/// The cache is smaller than the image: all is read, and no more is kept than the budget allows.
#[test]
fn reading_ahead_stays_within_the_budget() {
    let dir = tempfile::tempdir().unwrap();
    let (_store, image) = cold(&dir, 2 << 20);
    let ahead = ReadAhead::new(image.clone());
    let expected = content();
    let mut bytes = vec![0; 64 << 10];
    for at in (0..SIZE).step_by(64 << 10) {
        ahead.read_at(&mut bytes, at).unwrap();
        assert!(bytes == expected[usize::try_from(at).unwrap()..][..64 << 10]);
    }
    image.prefetch(0..SIZE).unwrap();
    let cached = (0..SIZE).step_by(64 << 10).filter(|&at| image.is_cached(at..at + 4096)).count();
    assert!(cached > 0 && cached * (64 << 10) <= 2 << 20, "{cached} frames");
}

/// One thread looks for all guests at what is at hand. If it read a map node for that, all would wait
/// for the disk.
#[test]
fn a_look_at_what_is_decoded_waits_for_the_disk() {
    let dir = tempfile::tempdir().unwrap();
    let (_store, warm) = cold(&dir, 64 << 20);
    warm.prefetch(0..1 << 20).unwrap();
    let (_other, image) = cold(&dir, 64 << 20);
    std::fs::rename(dir.path().join("store/packs"), dir.path().join("elsewhere")).unwrap();
    let mut pieces = Vec::new();
    image.pieces(0..SIZE, Effort::Decoded, &mut pieces).unwrap();
    assert!(pieces.is_empty(), "{pieces:?}");
    image.pieces(0..4096, Effort::Block(0), &mut pieces).unwrap_err();
    warm.pieces(0..SIZE, Effort::Decoded, &mut pieces).unwrap();
    assert_eq!(pieces.iter().map(|piece| piece.len).sum::<u64>(), 1 << 20);
}
