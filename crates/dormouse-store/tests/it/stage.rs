//! Images that are captured while they are written and wait for their commit.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;

use dormouse_image::block::HoleMeaning;
use dormouse_image::codec::Codec;
use dormouse_store::commit::{CommitRequest, StageRequest};
use dormouse_store::error::{ErrorKind, Result};
use dormouse_store::gc::GcOptions;
use dormouse_store::name::ImageName;
use dormouse_store::progress::Job;
use dormouse_store::reader::ImageReader;
use dormouse_store::source::{Source, Staged, WRITTEN_BYTES_MAX, WriteSource, Written};
use dormouse_store::store::Store;
use dormouse_store::verify::VerifyOptions;
use dormouse_testkit::sim_disk::{SimDisk, Survive};

use crate::commit::{Writes, blocks, name};
use crate::model::small_config;

/// Pieces as they were written; after them whoever writes is gone.
struct Pieces(VecDeque<Written>);

impl WriteSource for Pieces {
    fn next(&mut self, _: Vec<u8>) -> io::Result<Written> {
        self.0.pop_front().ok_or_else(|| io::ErrorKind::UnexpectedEof.into())
    }
}

fn data(block: u64, numbers: &[u32]) -> Written {
    Written::Data { offset: block * 4096, bytes: blocks(numbers) }
}

fn stage(
    store: &Store,
    base: Option<&ImageReader>,
    holes: HoleMeaning,
    pieces: Vec<Written>,
) -> Result<Staged> {
    let request = StageRequest {
        label: "a dump".to_owned(),
        writes: Box::new(Pieces(pieces.into())),
        base: base.cloned(),
        holes,
        codec: Codec::DEFAULT,
    };
    store.stage(request, Job::quiet())
}

fn contents(image: &ImageReader) -> Vec<u8> {
    let mut bytes = vec![0; image.size_bytes() as usize];
    image.read_at(&mut bytes, 0).unwrap();
    bytes
}

fn packs(disk: &SimDisk) -> usize {
    disk.paths().iter().filter(|path| path.ends_with(".pack")).count()
}

fn opened() -> (SimDisk, Store) {
    let disk = SimDisk::new(3);
    let store = Store::init_on(Arc::new(disk.clone()), small_config()).unwrap();
    (disk, store)
}

#[test]
fn what_is_staged_is_committed_without_being_stored_again() {
    let (disk, store) = opened();
    let end = Written::End { size_bytes: 6 * 4096 };
    let pieces = vec![data(0, &[1, 2]), data(4, &[0, 3]), end];
    let staged = stage(&store, None, HoleMeaning::Zero, pieces).unwrap();
    assert_eq!(contents(staged.image()), blocks(&[1, 2, 0, 0, 0, 3]));
    assert_eq!(staged.figures().new_bytes, 3 * 4096);
    // A collection spares it, a commit only names it.
    store.gc(&GcOptions::default(), Job::quiet()).unwrap();
    let state = Source::Bytes(blocks(&[3, 9]).into());
    let request = CommitRequest::new(name("vm"))
        .image(ImageName::Memory, Source::Staged(staged))
        .image(ImageName::State(name("vmstate")), state);
    let report = store.commit(request, Job::quiet()).unwrap();
    assert_eq!(report.manifest.figures.new_bytes, 4 * 4096, "block 3 is found again");
    assert_eq!(packs(&disk), 2);
    store.gc(&GcOptions::default(), Job::quiet()).unwrap();
    // It is durable, whatever the machine does.
    let store = {
        drop(store);
        let disk = disk.after_power_cut(Survive::Nothing);
        Store::open_on(Arc::new(disk), small_config()).unwrap()
    };
    let base = store.snapshot(&"vm".parse().unwrap()).unwrap().image(&ImageName::Memory).unwrap();
    assert_eq!(contents(&base), blocks(&[1, 2, 0, 0, 0, 3]));

    // A diff over it: zeros are written, the rest is as it was, and it ends within a block.
    let pieces = vec![data(1, &[0, 7]), Written::End { size_bytes: 6 * 4096 }];
    let diff = stage(&store, Some(&base), HoleMeaning::Parent, pieces).unwrap();
    assert_eq!(contents(diff.image()), blocks(&[1, 0, 7, 0, 0, 3]));
    assert_eq!((diff.figures().new_bytes, diff.figures().unchanged_bytes), (4096, 2 * 4096));
    // The same as a whole: nothing is stored twice, holes are zeros.
    let pieces = vec![data(0, &[1]), data(5, &[3]), Written::End { size_bytes: 6 * 4096 }];
    let whole = stage(&store, Some(&base), HoleMeaning::Zero, pieces).unwrap();
    assert_eq!(contents(whole.image()), blocks(&[1, 0, 0, 0, 0, 3]));
    assert_eq!(whole.figures().new_bytes, 0);
    let report =
        store.verify(&VerifyOptions { deep: true, ..VerifyOptions::default() }, Job::quiet());
    assert_eq!(report.unwrap().problems, []);
}

/// An image in three steps, of which the first two are staged: what was written over, and what is zero
/// at last, is not in it, and its figures are those of all three.
#[test]
fn what_lies_over_a_staged_image_makes_one_image_with_it() {
    let (disk, store) = opened();
    let pieces = vec![data(1, &[1, 2, 3, 4]), Written::End { size_bytes: 5 * 4096 }];
    let first = stage(&store, None, HoleMeaning::Zero, pieces).unwrap();
    let pieces = vec![data(0, &[5]), data(5, &[6, 1]), Written::End { size_bytes: 8 * 4096 }];
    let second = stage(&store, Some(first.image()), HoleMeaning::Parent, pieces).unwrap();
    let staged = second.over(&first);
    assert_eq!(contents(staged.image()), blocks(&[5, 1, 2, 3, 4, 6, 1, 0]));
    let layer = Arc::new(Writes {
        size_bytes: 8 * 4096,
        runs: vec![(0, Some(blocks(&[7]))), (2 * 4096, None), (3 * 4096, None)],
    });
    drop(first);
    let request = CommitRequest::new(name("vm"))
        .image(ImageName::Disk(name("root")), Source::Over { layer, staged });
    let report = store.commit(request, Job::quiet()).unwrap();
    let figures = report.manifest.figures;
    // Seven blocks were stored, one was found again; five are left that are not zero.
    assert_eq!((figures.raw_bytes, figures.nonzero_bytes), (8 * 4096, 5 * 4096));
    assert_eq!((figures.new_bytes, figures.elsewhere_bytes), (7 * 4096, 4096));
    assert_eq!((figures.unchanged_bytes, figures.zero_bytes), (0, 3 * 4096));
    assert_eq!(packs(&disk), 3);
    store.gc(&GcOptions::default(), Job::quiet()).unwrap();
    let image = store.snapshot(&"vm".parse().unwrap()).unwrap();
    let image = image.image(&ImageName::Disk(name("root"))).unwrap();
    assert_eq!(contents(&image), blocks(&[7, 1, 0, 0, 4, 6, 1, 0]));
    let report =
        store.verify(&VerifyOptions { deep: true, ..VerifyOptions::default() }, Job::quiet());
    assert_eq!(report.unwrap().problems, []);
}

#[test]
fn what_is_never_committed_is_collected_and_cannot_be_taken_afterwards() {
    let (disk, store) = opened();
    let pieces = vec![data(0, &[1, 2]), Written::End { size_bytes: 8192 }];
    let staged = stage(&store, None, HoleMeaning::Zero, pieces).unwrap();
    let (root, size, figures) =
        (staged.image().root(), staged.image().size_bytes(), *staged.figures());
    // Another process takes it while it is there.
    let other = store.staged_image("theirs", root.as_ref(), size, figures).unwrap();
    drop(staged);
    store.gc(&GcOptions::default(), Job::quiet()).unwrap();
    assert_eq!(contents(other.image()), blocks(&[1, 2]));
    drop(other);
    store.gc(&GcOptions::default(), Job::quiet()).unwrap();
    assert_eq!(packs(&disk), 0);
    let late = store.staged_image("late", root.as_ref(), size, figures).unwrap_err();
    assert_eq!(late.kind(), ErrorKind::NotFound);
    // One that is given up leaves nothing at all.
    let given_up = stage(&store, None, HoleMeaning::Zero, vec![data(0, &[5, 6])]).unwrap_err();
    assert_eq!(given_up.kind(), ErrorKind::Io);
    store.gc(&GcOptions::default(), Job::quiet()).unwrap();
    assert!(!disk.paths().iter().any(|path| path.starts_with("tmp/") || path.ends_with(".pack")));
}

#[test]
fn pieces_that_are_none_are_refused() {
    let (_, store) = opened();
    let odd = |offset, len| Written::Data { offset, bytes: vec![1; len] };
    let end = || Written::End { size_bytes: 1 << 20 };
    for pieces in [
        vec![odd(1, 4096), end()],
        vec![odd(0, 100), end()],
        vec![odd(0, 0), end()],
        vec![odd(4096, 4096), odd(0, 4096), end()],
        vec![odd(0, 8192), odd(4096, 4096), end()],
        vec![odd(4096, WRITTEN_BYTES_MAX), end()],
        vec![odd(0, 8192), Written::End { size_bytes: 4096 }],
    ] {
        let error = stage(&store, None, HoleMeaning::Zero, pieces).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidInput, "{error}");
    }
    let error = stage(&store, None, HoleMeaning::Zero, vec![odd(1 << 44, 4096), end()]);
    assert_eq!(error.unwrap_err().kind(), ErrorKind::Unsupported);
}
