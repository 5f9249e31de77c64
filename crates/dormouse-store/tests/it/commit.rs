//! Commits and reads: what goes in comes out, and what is stored already is not stored again.

use std::sync::Arc;

use dormouse_image::block::{BLOCK_BYTES, HoleMeaning};
use dormouse_store::commit::{CommitReport, CommitRequest, NewImage, Parent};
use dormouse_store::error::ErrorKind;
use dormouse_store::name::{ImageName, Name};
use dormouse_store::progress::Job;
use dormouse_store::reader::ExportTarget;
use dormouse_store::source::{LayerRun, LayerSource, Source};
use dormouse_store::store::{Config, Store};
use dormouse_testkit::sim_disk::SimDisk;

/// Blocks that are different for different numbers; 0 is the zero block.
pub(crate) fn blocks(numbers: &[u32]) -> Vec<u8> {
    numbers
        .iter()
        .flat_map(|&number| {
            let mut block = vec![0; BLOCK_BYTES];
            if number != 0 {
                block[..4].copy_from_slice(&number.to_le_bytes());
                block[4000..4004].copy_from_slice(&number.to_le_bytes());
            }
            block
        })
        .collect()
}

pub(crate) fn name(text: &str) -> Name {
    Name::new(text).unwrap()
}

fn bytes(numbers: &[u32]) -> Source {
    Source::Bytes(blocks(numbers).into())
}

pub(crate) fn store() -> Store {
    Store::init_on(Arc::new(SimDisk::new(1)), Config { threads: 2, ..Config::STANDARD }).unwrap()
}

fn commit(store: &Store, request: CommitRequest) -> CommitReport {
    store.commit(request, Job::quiet()).unwrap()
}

fn read(store: &Store, snap: &str, image: ImageName) -> Vec<u8> {
    let snapshot = store.snapshot(&snap.parse().unwrap()).unwrap();
    let image = snapshot.image(&image).unwrap();
    let mut bytes = vec![0xaa; usize::try_from(image.size_bytes()).unwrap()];
    image.read_at(&mut bytes, 0).unwrap();
    bytes
}

/// What was prefetched is read without decoding anything, whatever the borders of blocks and leaves.
#[test]
fn what_was_prefetched_is_not_decoded_again() {
    let store = store();
    let numbers: Vec<u32> =
        (0..20_000).map(|number| if number % 50 < 8 { 0 } else { number }).collect();
    let request = CommitRequest::new(name("vm")).image(ImageName::Memory, bytes(&numbers));
    commit(&store, request);
    let image = store.snapshot(&"vm".parse().unwrap()).unwrap().image(&ImageName::Memory).unwrap();
    for range in [
        40_000..40_100,
        36_000..270_001,
        (32 << 20) - 5000..(32 << 20) + 9000,
        81_910_000..u64::MAX,
    ] {
        let before = store.decoded_frames();
        image.prefetch(range.clone()).unwrap();
        let decoded = store.decoded_frames();
        assert!(decoded > before, "{range:?}");
        let len = range.end.min(image.size_bytes()) - range.start;
        image.read_at(&mut vec![0; usize::try_from(len).unwrap()], range.start).unwrap();
        assert_eq!(store.decoded_frames(), decoded, "{range:?}");
    }
    let end = image.size_bytes();
    image.prefetch(end..end + 10).unwrap();
}

#[test]
fn what_goes_in_comes_out() {
    let store = store();
    let disk = ImageName::Disk(name("root"));
    let state = ImageName::State(name("vmstate"));
    let report = commit(
        &store,
        CommitRequest::new(name("vm"))
            .image(ImageName::Memory, bytes(&[9, 0, 1, 2, 3, 0, 0, 9]))
            .image(disk.clone(), bytes(&[1, 2, 3, 4]))
            .image(state.clone(), Source::Bytes(b"state of the vmm"[..].into())),
    );
    assert_eq!(report.manifest.display_name(), "vm@1");
    let figures = report.manifest.figures;
    assert_eq!(figures.new_bytes, 6 * 4096, "1 to 4, 9 and the state");
    assert_eq!(figures.self_bytes, 4 * 4096, "1 to 3 and the second 9");
    assert_eq!(figures.from_disks_bytes, 3 * 4096);
    assert!(figures.stored_bytes > 0, "also blocks that do not fill a frame are counted");
    assert_eq!(figures.zero_bytes, 3 * 4096);
    assert_eq!(read(&store, "vm", ImageName::Memory), blocks(&[9, 0, 1, 2, 3, 0, 0, 9]));
    assert_eq!(read(&store, "vm@1", disk), blocks(&[1, 2, 3, 4]));
    assert_eq!(read(&store, "vm@1", state), b"state of the vmm");
}

#[test]
fn a_second_commit_stores_only_what_is_new() {
    let store = store();
    let disk = ImageName::Disk(name("root"));
    commit(&store, CommitRequest::new(name("vm")).image(disk.clone(), bytes(&[1, 2, 3, 4, 5])));
    let report = commit(
        &store,
        CommitRequest::new(name("vm")).image(disk.clone(), bytes(&[1, 9, 3, 0, 2, 2])),
    );
    let figures = report.manifest.figures;
    assert_eq!(figures.unchanged_bytes, 2 * 4096);
    assert_eq!(figures.new_bytes, 4096);
    assert_eq!(figures.elsewhere_bytes, 2 * 4096);
    assert_eq!(figures.changed_bytes, 4 * 4096, "blocks 1, 3, 4 and the new 5");
    assert_eq!(read(&store, "vm@2", disk.clone()), blocks(&[1, 9, 3, 0, 2, 2]));
    assert_eq!(read(&store, "vm@1", disk.clone()), blocks(&[1, 2, 3, 4, 5]));
    // Another name, no parent: everything is found in the index.
    let other = CommitRequest::new(name("other")).image(disk, bytes(&[5, 4, 3, 2, 1]));
    assert_eq!(commit(&store, other).manifest.figures.new_bytes, 0);
}

/// The story that made a peer give up incremental memory: a page that the guest zeroed came back
/// with its old content, because a hole in the diff and a zero in it were taken for the same.
#[test]
fn a_page_zeroed_by_the_guest_does_not_come_back() {
    let folder = tempfile::tempdir().unwrap();
    let diff = folder.path().join("diff");
    let file = std::fs::File::create(&diff).unwrap();
    // Block 0 untouched, block 1 zeroed, block 2 changed, block 3 untouched.
    std::os::unix::fs::FileExt::write_all_at(&file, &blocks(&[0, 7]), 4096).unwrap();
    file.set_len(4 * 4096).unwrap();
    let store = store();
    commit(&store, CommitRequest::new(name("vm")).image(ImageName::Memory, bytes(&[1, 2, 3, 4])));
    let request = |parent| CommitRequest {
        parent,
        images: vec![NewImage {
            image: ImageName::Memory,
            source: Source::File(diff.clone()),
            holes: HoleMeaning::Parent,
        }],
        ..CommitRequest::new(name("vm"))
    };
    let refused = store.commit(request(Parent::Auto), Job::quiet()).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Refused, "a diff wants its parent named");
    commit(&store, request(Parent::Snapshot("vm@1".parse().unwrap())));
    assert_eq!(read(&store, "vm@2", ImageName::Memory), blocks(&[1, 0, 7, 4]));
    // And as a diff it goes out again, the zero as data.
    let out = folder.path().join("out");
    let (old, new) =
        (store.snapshot(&"vm@1".parse().unwrap()), store.snapshot(&"vm@2".parse().unwrap()));
    let (old, new) = (old.unwrap(), new.unwrap());
    let report = new
        .image(&ImageName::Memory)
        .unwrap()
        .export_diff(&old.image(&ImageName::Memory).unwrap(), &out, ExportTarget::New, Job::quiet())
        .unwrap();
    assert_eq!(report.written_bytes, 2 * 4096);
    assert_eq!(std::fs::read(&out).unwrap(), std::fs::read(&diff).unwrap());
}

#[test]
fn growth_and_shrinkage_leave_nothing_stale() {
    let store = store();
    let disk = ImageName::Disk(name("root"));
    let mut sizes = vec![];
    for (number, len) in
        [5000, 3 * 4096, 4097, 40 << 20, 100, 70 << 20, 0, 8192].into_iter().enumerate()
    {
        let mut content: Vec<u8> = vec![0; len];
        content.iter_mut().step_by(1000).for_each(|byte| *byte = u8::try_from(number + 1).unwrap());
        let request = CommitRequest::new(name("vm"))
            .image(disk.clone(), Source::Bytes(content.clone().into()));
        commit(&store, request);
        sizes.push(content);
    }
    for (number, content) in sizes.iter().enumerate() {
        assert_eq!(read(&store, &format!("vm@{}", number + 1), disk.clone()), *content);
    }
}

/// Writes over an image, as a live disk has them.
#[derive(Debug)]
pub(crate) struct Writes {
    pub(crate) size_bytes: u64,
    pub(crate) runs: Vec<(u64, Option<Vec<u8>>)>,
}

impl LayerSource for Writes {
    fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> std::io::Result<()> {
        let (start, bytes) = self
            .runs
            .iter()
            .filter_map(|(start, bytes)| Some((*start, bytes.as_ref()?)))
            .find(|(start, bytes)| (*start..start + bytes.len() as u64).contains(&offset))
            .ok_or(std::io::ErrorKind::InvalidInput)?;
        let from = usize::try_from(offset - start).unwrap();
        buf.copy_from_slice(&bytes[from..from + buf.len()]);
        Ok(())
    }

    fn for_each_run(
        &self,
        visit: &mut dyn FnMut(std::ops::Range<u64>, LayerRun) -> std::io::Result<()>,
    ) -> std::io::Result<()> {
        for (start, bytes) in &self.runs {
            match bytes {
                Some(bytes) => visit(*start..start + bytes.len() as u64, LayerRun::Data)?,
                None => visit(*start..start + 4096, LayerRun::Zero)?,
            }
        }
        Ok(())
    }
}

/// The base of a live disk is the snapshot that it was made of, whatever the commit's parent is.
#[test]
fn a_layer_lies_over_its_own_base() {
    let store = store();
    let disk = ImageName::Disk(name("root"));
    commit(&store, CommitRequest::new(name("vm")).image(disk.clone(), bytes(&[1, 2, 3, 4])));
    commit(&store, CommitRequest::new(name("vm")).image(disk.clone(), bytes(&[9, 9, 9, 9])));
    let base = store.snapshot(&"vm@1".parse().unwrap()).unwrap().image(&disk).unwrap();
    let runs = vec![(4096, None), (8192, Some(blocks(&[7, 8]))), (5 * 4096, Some(blocks(&[1])))];
    let layer = Arc::new(Writes { size_bytes: 6 * 4096, runs });
    let source = Source::Layer { layer, base: Some(base) };
    let report = commit(&store, CommitRequest::new(name("vm")).image(disk.clone(), source));
    assert_eq!(read(&store, "vm@3", disk.clone()), blocks(&[1, 0, 7, 8, 0, 1]));
    assert_eq!(report.manifest.figures.new_bytes, 2 * 4096);
    let runs = vec![(0, Some(blocks(&[5])))];
    let source = Source::Layer { layer: Arc::new(Writes { size_bytes: 8192, runs }), base: None };
    commit(&store, CommitRequest::new(name("blank")).image(disk.clone(), source));
    assert_eq!(read(&store, "blank", disk), blocks(&[5, 0]));
}

/// A layer that was written to while it was read.
#[derive(Debug)]
struct Unsteady(Writes);

impl LayerSource for Unsteady {
    fn size_bytes(&self) -> u64 {
        self.0.size_bytes()
    }

    fn label(&self) -> String {
        "the foreign file".to_owned()
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> std::io::Result<()> {
        self.0.read_at(buf, offset)
    }

    fn check_unchanged(&self) -> std::io::Result<()> {
        Err(std::io::Error::other("it is longer now"))
    }

    fn for_each_run(
        &self,
        visit: &mut dyn FnMut(std::ops::Range<u64>, LayerRun) -> std::io::Result<()>,
    ) -> std::io::Result<()> {
        self.0.for_each_run(visit)
    }
}

#[test]
fn a_layer_that_changed_while_it_was_read_is_not_published() {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::init(&folder.path().join("store"), Config::STANDARD).unwrap();
    let writes = Writes { size_bytes: 8192, runs: vec![(0, Some(vec![7; 4096]))] };
    let source = Source::Layer { layer: Arc::new(Unsteady(writes)), base: None };
    let request = CommitRequest::new(Name::new("vm").unwrap()).image(ImageName::Memory, source);
    let error = store.commit(request, Job::quiet()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Refused);
    assert_eq!(error.to_string(), "the foreign file changed while it was read");
    assert!(store.list(None).unwrap().snapshots.is_empty());
}
