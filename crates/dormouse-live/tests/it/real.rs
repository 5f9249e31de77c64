//! Files of this machine: space on ext4 and tmpfs, and a file system that is full.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use dormouse_live::base::{BlankBase, FileBase};
use dormouse_live::error::ErrorKind;
use dormouse_live::files::{BlockFile, BootId, Folder, FolderLock, RealFolder};
use dormouse_live::overlay::{NewOverlay, Overlay, OverlayConfig, ZeroBlocks, Zeroing};

use crate::model::pattern;

const B: u64 = 4096;
const MIB: u64 = 1 << 20;

fn folders() -> Vec<tempfile::TempDir> {
    assert!(Path::new("/dev/shm").is_dir(), "these tests need /dev/shm");
    vec![tempfile::tempdir().unwrap(), tempfile::tempdir_in("/dev/shm").unwrap()]
}

fn blank(folder: &Path, config: OverlayConfig) -> Overlay {
    let new =
        NewOverlay { size_bytes: 64 * MIB, base: Arc::new(BlankBase), base_label: String::new() };
    Overlay::create(Arc::new(RealFolder::new(folder)), new, config).unwrap()
}

/// Bytes of the data file on the file system, to be right at once and not after a sync.
fn allocated(disk: &Overlay) -> u64 {
    disk.status().unwrap().allocated_bytes
}

/// ext4 needs a block of its own to remember many extents.
const NOTES_BYTES: u64 = 16 << 10;

#[test]
fn zeros_take_no_space() {
    for folder in folders() {
        let disk = blank(folder.path(), OverlayConfig::STANDARD);
        disk.write_at(&vec![0; 1 << 20], 0).unwrap();
        assert!(allocated(&disk) <= NOTES_BYTES, "zeros on a blank disk");

        disk.write_at(&pattern(0, 4 << 20, 1), 0).unwrap();
        disk.flush().unwrap();
        assert!(allocated(&disk) >= 4 * MIB);
        // Zero blocks inside a larger write: every second of 16 blocks.
        let mut mixed = pattern(0, 1 << 20, 2);
        mixed.chunks_mut(8 * 4096).for_each(|chunk| chunk[..4 * 4096].fill(0));
        disk.write_at(&mixed, 0).unwrap();
        let after = allocated(&disk);
        assert!(after <= 4 * MIB - MIB / 2 + NOTES_BYTES, "{after} in {folder:?}");
        disk.trim(MIB, 2 * MIB).unwrap();
        disk.write_zeroes(3 * MIB, MIB, Zeroing::Free).unwrap();
        let after = allocated(&disk);
        assert!(after <= MIB / 2 + NOTES_BYTES, "{after} in {folder:?}");
        let mut read = vec![1; 4 << 20];
        disk.read_at(&mut read, 0).unwrap();
        assert_eq!(read[..1 << 20], mixed);
        assert!(read[1 << 20..].iter().all(|byte| *byte == 0));

        disk.write_zeroes(8 * MIB, MIB, Zeroing::Keep).unwrap();
        assert!(allocated(&disk) >= MIB + MIB / 2, "space that is kept is taken");
        let counts = disk.status().unwrap().blocks;
        assert_eq!(counts.dirty, 128 + 256);
        assert_eq!(counts.zero, 128 + 768);
    }
}

#[test]
fn zeros_are_written_where_that_is_wanted() {
    let folder = tempfile::tempdir_in("/dev/shm").unwrap();
    let disk = blank(
        folder.path(),
        OverlayConfig { zero_blocks: ZeroBlocks::Written, ..OverlayConfig::STANDARD },
    );
    disk.write_at(&vec![0; 1 << 20], 0).unwrap();
    assert!(allocated(&disk) >= MIB);
    assert_eq!(disk.status().unwrap().blocks.dirty, 256);
}

/// The rules of writes that cover a block in part, over each state a block can be in.
#[test]
fn partial_writes_keep_the_rest() {
    for folder in folders() {
        let image = folder.path().join("image.raw");
        let base = pattern(0, 6 * 4096 + 100, 9);
        std::fs::write(&image, &base).unwrap();
        let live = folder.path().join("live");
        std::fs::create_dir(&live).unwrap();
        let new = NewOverlay {
            size_bytes: 10 * B,
            base: Arc::new(FileBase::open(&image).unwrap()),
            base_label: "image".to_owned(),
        };
        let disk = Overlay::create(Arc::new(RealFolder::new(&live)), new, OverlayConfig::STANDARD)
            .unwrap();
        let mut model = base;
        model.resize(10 * 4096, 0);
        let mut write = |offset: usize, bytes: &[u8]| {
            disk.write_at(bytes, offset as u64).unwrap();
            model[offset..offset + bytes.len()].copy_from_slice(bytes);
            let mut read = vec![1; model.len()];
            disk.read_at(&mut read, 0).unwrap();
            assert_eq!(read, model, "after {} bytes at {offset}", bytes.len());
            disk.status().unwrap().blocks
        };
        let counts = write(100, b"untouched");
        assert_eq!((counts.dirty, counts.zero), (1, 0));
        write(200, b"dirty");
        let counts = write(4096, &[0; 4096]);
        assert_eq!((counts.dirty, counts.zero), (1, 1));
        let counts = write(4096 + 50, &[0; 300]);
        assert_eq!((counts.dirty, counts.zero), (1, 1), "zeros over zeros");
        let counts = write(4096 + 50, b"zero");
        assert_eq!((counts.dirty, counts.zero), (2, 0));
        write(6 * 4096 + 50, b"over the end of the base");
        let counts = write(8 * 4096 - 3, b"past it");
        assert_eq!((counts.dirty, counts.zero), (5, 0));
        let counts = write(9 * 4096 + 1, &[0; 7]);
        assert_eq!((counts.dirty, counts.zero), (5, 1), "zeros over the zeros of a grown disk");
        write(2 * 4096 - 1, &pattern(0, 2 * 4096 + 2, 3));
    }
}

/// A small tmpfs, mounted for one test.
struct SmallDisk(PathBuf);

impl SmallDisk {
    fn mount(folder: &Path) -> SmallDisk {
        let mounted = std::process::Command::new("mount")
            .args(["-t", "tmpfs", "-o", "size=4m", "tmpfs"])
            .arg(folder)
            .status();
        assert!(mounted.unwrap().success(), "this test mounts a tmpfs and has to run as root");
        SmallDisk(folder.to_owned())
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let unmounted = std::process::Command::new("umount").arg("-l").arg(&self.0).status();
        assert!(unmounted.unwrap().success());
    }
}

#[test]
fn a_full_tmpfs() {
    let folder = tempfile::tempdir().unwrap();
    let _mounted = SmallDisk::mount(folder.path());
    let disk = blank(folder.path(), OverlayConfig::STANDARD);
    let failed = disk.write_at(&pattern(0, 8 << 20, 1), 0).unwrap_err();
    assert_eq!(failed.kind(), ErrorKind::NoSpace);
    // What the failed write had taken is free again, so that there is room for states.
    assert_eq!(disk.flush().unwrap_err().kind(), ErrorKind::Unresolved);
    assert_eq!(disk.seal().unwrap_err().kind(), ErrorKind::Unresolved);
    disk.trim(0, 8 * MIB).unwrap();
    disk.flush().unwrap();
    disk.write_at(&pattern(0, 1 << 20, 1), 5).unwrap();
    disk.flush().unwrap();
    drop(disk.seal().unwrap());
    let mut read = vec![0; 1 << 20];
    disk.read_at(&mut read, 5).unwrap();
    assert_eq!(read, pattern(0, 1 << 20, 1));
}

/// Makes notes those of another life of the kernel, as the next boot would find them.
fn forget_notes(folder: &std::path::Path) {
    for name in ["notes.0", "notes.1"] {
        let path = folder.join(name);
        let mut bytes = std::fs::read(&path).unwrap();
        bytes[16] ^= 1;
        let sum = dormouse_image::digest::checksum(&[&bytes[..56]]);
        bytes[56..64].copy_from_slice(&sum.to_le_bytes());
        std::fs::write(&path, bytes).unwrap();
    }
}

/// What was answered is there for the next process, flushed or not.
#[test]
fn unflushed_blocks_outlive_their_process() {
    for folder in folders() {
        let mut expected = vec![0; 4 << 20];
        for round in 0..3 {
            let files = Arc::new(RealFolder::new(folder.path()));
            let disk = match round {
                0 => blank(folder.path(), OverlayConfig::STANDARD),
                _ => Overlay::open(files, OverlayConfig::STANDARD, |_| Ok(Arc::new(BlankBase)))
                    .unwrap(),
            };
            let mut read = vec![1; 4 << 20];
            disk.read_at(&mut read, 0).unwrap();
            assert!(read == expected, "round {round} in {folder:?}");
            for step in 0..300 {
                let (at, len) = ((round * 300 + step) * 7919 % (3 << 20), 1 + step * 37 % 9000);
                if step % 5 == 0 {
                    disk.trim(at as u64, len as u64).unwrap();
                    expected[at..at + len].fill(0);
                } else {
                    let bytes = pattern(at, len, 3);
                    disk.write_at(&bytes, at as u64).unwrap();
                    expected[at..at + len].copy_from_slice(&bytes);
                }
            }
        }
    }
}

/// After a power cut what no flush covered is nobody's, and takes no space once the disk is open again.
#[test]
fn unflushed_blocks_are_freed_when_the_disk_is_opened() {
    for folder in folders() {
        let disk = blank(folder.path(), OverlayConfig::STANDARD);
        disk.write_at(&pattern(0, 1 << 20, 1), 0).unwrap();
        disk.flush().unwrap();
        disk.write_at(&pattern(0, 8 << 20, 1), MIB).unwrap();
        assert!(allocated(&disk) >= 9 * MIB);
        drop(disk);
        forget_notes(folder.path());
        let folder = Arc::new(RealFolder::new(folder.path()));
        let disk =
            Overlay::open(folder, OverlayConfig::STANDARD, |_| Ok(Arc::new(BlankBase))).unwrap();
        assert!(allocated(&disk) <= MIB + NOTES_BYTES);
        let mut read = vec![1; 2 << 20];
        disk.read_at(&mut read, 0).unwrap();
        assert_eq!(read[..1 << 20], pattern(0, 1 << 20, 1));
        assert!(read[1 << 20..].iter().all(|byte| *byte == 0));
    }
}

/// Counts how often holes are looked for in the files of a folder.
#[derive(Debug)]
struct Counting {
    inner: RealFolder,
    looks: Arc<AtomicU64>,
}

#[derive(Debug)]
struct CountingFile {
    inner: Arc<dyn BlockFile>,
    looks: Arc<AtomicU64>,
}

impl Counting {
    fn counted(&self, file: Arc<dyn BlockFile>) -> Arc<dyn BlockFile> {
        Arc::new(CountingFile { inner: file, looks: Arc::clone(&self.looks) })
    }
}

impl Folder for Counting {
    fn create(&self, name: &str) -> io::Result<Arc<dyn BlockFile>> {
        Ok(self.counted(self.inner.create(name)?))
    }

    fn open(&self, name: &str) -> io::Result<Arc<dyn BlockFile>> {
        Ok(self.counted(self.inner.open(name)?))
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        self.inner.rename(from, to)
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        self.inner.remove(name)
    }

    fn sync(&self) -> io::Result<()> {
        self.inner.sync()
    }

    fn list(&self) -> io::Result<Vec<String>> {
        self.inner.list()
    }

    fn boot_id(&self) -> io::Result<BootId> {
        self.inner.boot_id()
    }

    fn lock(&self) -> io::Result<Option<Box<dyn FolderLock>>> {
        self.inner.lock()
    }
}

impl BlockFile for CountingFile {
    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.inner.read_exact_at(buf, offset)
    }

    fn write_all_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.inner.write_all_at(bytes, offset)
    }

    fn punch(&self, range: std::ops::Range<u64>) -> io::Result<()> {
        self.inner.punch(range)
    }

    fn sync(&self) -> io::Result<()> {
        self.inner.sync()
    }

    fn forget_clean_pages(&self) -> io::Result<()> {
        self.inner.forget_clean_pages()
    }

    fn len(&self) -> io::Result<u64> {
        self.inner.len()
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.inner.set_len(len)
    }

    fn next_data(&self, range: std::ops::Range<u64>) -> io::Result<Option<std::ops::Range<u64>>> {
        self.looks.fetch_add(1, Ordering::Relaxed);
        self.inner.next_data(range)
    }

    fn allocated_bytes(&self) -> io::Result<u64> {
        self.inner.allocated_bytes()
    }
}

/// A disk with 50,000 blocks here and there took 190 ms to open, nearly all of it for looking at
/// each of its file's extents in search of blocks that no log knows of.
#[test]
fn scattered_blocks_are_not_looked_at_one_by_one_when_the_disk_is_opened() {
    const RUNS: u64 = 5000;
    for dir in folders() {
        let disk = blank(dir.path(), OverlayConfig::STANDARD);
        // In no order, as guests write: the file system's notes are as long as they get.
        let place = |number: u64| number * 1237 % RUNS * 3 * B;
        let bytes = pattern(0, 4096, 1);
        (0..RUNS).for_each(|number| disk.write_at(&bytes, place(number)).unwrap());
        disk.flush().unwrap();
        drop(disk);
        let looks = Arc::new(AtomicU64::new(0));
        let open = || {
            let inner = RealFolder::new(dir.path());
            let folder = Arc::new(Counting { inner, looks: Arc::clone(&looks) });
            Overlay::open(folder, OverlayConfig::STANDARD, |_| Ok(Arc::new(BlankBase))).unwrap()
        };
        let disk = open();
        assert_eq!(looks.load(Ordering::Relaxed), 0, "in {dir:?}");
        assert_eq!(disk.status().unwrap().blocks.dirty, RUNS);
        let flushed = allocated(&disk);
        // Where there is more than that it is found, wherever it is.
        disk.write_at(&pattern(0, 1 << 20, 1), 48 * MIB).unwrap();
        drop(disk);
        forget_notes(dir.path());
        let disk = open();
        assert!(looks.load(Ordering::Relaxed) > RUNS / 2, "in {dir:?}");
        assert!(allocated(&disk) <= flushed + NOTES_BYTES, "in {dir:?}");
    }
}

/// The log stays near its full form, however long a disk is written and flushed.
#[test]
fn the_state_log_is_compacted() {
    let folder = tempfile::tempdir_in("/dev/shm").unwrap();
    let disk = blank(folder.path(), OverlayConfig::STANDARD);
    let log = folder.path().join("1.states");
    let mut longest = 0;
    for round in 0..200_u64 {
        for block in (round % 2..4000).step_by(7) {
            if round % 3 == 0 {
                disk.trim(block * B, B).unwrap();
            } else {
                disk.write_at(&pattern(0, 4096, 1), block * B).unwrap();
            }
        }
        disk.flush().unwrap();
        longest = longest.max(std::fs::metadata(&log).unwrap().len());
    }
    assert!(longest < 70 << 10, "{longest}");
    let mut before = vec![0; 64 << 20];
    disk.read_at(&mut before, 0).unwrap();
    let counts = disk.status().unwrap().blocks;
    drop(disk);
    let folder = Arc::new(RealFolder::new(folder.path()));
    let disk = Overlay::open(folder, OverlayConfig::STANDARD, |_| Ok(Arc::new(BlankBase))).unwrap();
    let mut after = vec![1; 64 << 20];
    disk.read_at(&mut after, 0).unwrap();
    assert!(before == after);
    assert_eq!(disk.status().unwrap().blocks, counts);
}
