//! Commits whose files fail at every sync: nothing is lost, and whatever base a power cut would
//! leave in the description is held.

use std::fs;
use std::sync::atomic::{AtomicI64, Ordering};

use dormouse_live::error::Result as LiveResult;
use dormouse_live::files::{BlockFile, BootId, Folder, FolderLock, RealFolder};
use dormouse_live::overlay::{Overlay, OverlayConfig};
use dormouse_store::gc::GcOptions;
use dormouse_store::store::{Config, Durable, Store};

use super::super::{LiveDisk, LiveFolder, NewBase};
use super::*;

const SIZE: usize = 1 << 20;

/// A folder whose syncs fail from a given one on, until it is mended.
#[derive(Debug)]
struct Failing {
    inner: RealFolder,

    /// Syncs that still succeed.
    left: AtomicI64,
}

impl Folder for Failing {
    fn create(&self, name: &str) -> io::Result<Arc<dyn BlockFile>> {
        self.inner.create(name)
    }

    fn open(&self, name: &str) -> io::Result<Arc<dyn BlockFile>> {
        self.inner.open(name)
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        self.inner.rename(from, to)
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        self.inner.remove(name)
    }

    fn sync(&self) -> io::Result<()> {
        if self.left.fetch_sub(1, Ordering::SeqCst) <= 0 {
            return Err(io::Error::from_raw_os_error(5));
        }
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

struct Case {
    _dir: tempfile::TempDir,
    store: Store,
    folder: LiveFolder,
    id: Name,
}

impl Case {
    fn new() -> Case {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::init(&dir.path().join("store"), Config::STANDARD).unwrap();
        let id: Name = "root".parse().unwrap();
        let mut request = CommitRequest::new("vm".parse().unwrap());
        request.images.push(NewImage {
            image: ImageName::Disk(id.clone()),
            source: Source::Bytes(content(1).into()),
            holes: HoleMeaning::Zero,
        });
        store.commit(request, Job::quiet()).unwrap();
        let folder = LiveFolder::new(&dir.path().join("store"), &"box".parse().unwrap());
        let snapshot = store.snapshot(&"vm@1".parse().unwrap()).unwrap();
        let image = snapshot.image(&ImageName::Disk(id.clone())).unwrap();
        let from = NewBase::Image(&image, "vm@1:disk/root".to_owned());
        LiveDisks::create(&store, &folder, &id, from, SIZE as u64, Durable::AtOnce).unwrap();
        Case { _dir: dir, store, folder, id }
    }

    fn open(&self) -> (LiveDisks, Arc<Failing>) {
        let inner = RealFolder::new(self.folder.disk(&self.id));
        let files = Arc::new(Failing { inner, left: AtomicI64::new(i64::MAX) });
        let overlay = self.overlay(Arc::clone(&files) as Arc<dyn Folder>).unwrap();
        let disk = LiveDisk { id: self.id.clone(), overlay: Arc::new(overlay) };
        let folder = self.folder.clone();
        (LiveDisks { folder, disks: vec![disk], in_doubt: Default::default() }, files)
    }

    fn overlay(&self, files: Arc<dyn Folder>) -> LiveResult<Overlay> {
        Overlay::open(files, OverlayConfig::STANDARD, |description| {
            super::super::base::open(&self.store, &self.folder.live, &description.base_label)
        })
    }

    fn commit(&self, live: &LiveDisks) -> Result<String> {
        let wanted = LiveCommit::new(Scope::All, "vm".parse().unwrap());
        let committed = commit(&self.store, live, None, &wanted, &mut |_| {}, Job::quiet())?;
        Ok(committed.report.manifest.display_name())
    }

    fn held_roots(&self) -> usize {
        let pin = fs::read_to_string(self.folder.path.join("pin")).unwrap();
        pin.lines().filter(|line| line.starts_with("root ")).count()
    }

    /// Leaves nothing in the store but what the live VM holds.
    fn forget_snapshots(&self) {
        for manifest in self.store.list(None).unwrap().snapshots {
            self.store.remove(&manifest.display_name().parse().unwrap()).unwrap();
        }
        self.store.gc(&GcOptions { dry_run: false }, Job::quiet()).unwrap();
    }
}

/// Blocks that differ from each other and from those of other seeds.
fn content(seed: u8) -> Vec<u8> {
    let block = |at: usize| u64::try_from(at / 4096).unwrap_or(0) << 8 | u64::from(seed);
    (0..SIZE).step_by(8).flat_map(|at| (block(at) * 0x9e37_79b9).to_le_bytes()).collect()
}

fn read(overlay: &Overlay) -> Vec<u8> {
    let mut bytes = vec![0; SIZE];
    overlay.read_at(&mut bytes, 0).unwrap();
    bytes
}

/// A commit syncs the disk's folder four times: twice for the seal, twice for the rebase. Whichever
/// fails, the disk goes on, and the next commit has everything.
#[test]
fn a_commit_that_fails_at_any_sync_loses_nothing() {
    for left in 0..4 {
        let case = Case::new();
        let (live, files) = case.open();
        let overlay = &live.disks[0].overlay;
        let mut expected = content(1);
        expected[8192..12288].fill(7);
        overlay.write_at(&[7; 4096], 8192).unwrap();
        files.left.store(left, Ordering::SeqCst);
        case.commit(&live).unwrap_err();
        assert!(read(overlay) == expected, "sync {left}");
        assert!(case.held_roots() >= 1);
        overlay.write_at(&[8; 4096], 65536).unwrap();
        expected[65536..69632].fill(8);
        files.left.store(i64::MAX, Ordering::SeqCst);
        overlay.flush().unwrap();
        let name = case.commit(&live).unwrap();
        assert!(read(overlay) == expected, "sync {left}");
        assert_eq!(case.held_roots(), 1, "sync {left}");
        assert_eq!(overlay.status().unwrap().layers, 1, "folded back and committed");
        let snapshot = case.store.snapshot(&name.parse().unwrap()).unwrap();
        let mut committed = vec![0; SIZE];
        let image = snapshot.image(&ImageName::Disk(case.id.clone())).unwrap();
        image.read_at(&mut committed, 0).unwrap();
        assert!(committed == expected, "sync {left}");
        drop((snapshot, image, live));
        case.forget_snapshots();
        let (live, _) = case.open();
        assert!(read(&live.disks[0].overlay) == expected, "sync {left}");
    }
}

/// The rebase's last sync of the folder fails: a power cut leaves the old description or the new
/// one. Both bases are held, and with both the disk has all that was flushed.
#[test]
fn a_rebase_in_doubt_keeps_both_bases() {
    for survives in ["the new description", "the old description"] {
        let case = Case::new();
        let (live, files) = case.open();
        let overlay = &live.disks[0].overlay;
        let mut expected = content(1);
        expected[8192..12288].fill(7);
        overlay.write_at(&[7; 4096], 8192).unwrap();
        overlay.flush().unwrap();
        // Up to the seal's last sync, to have the description that the rebase replaces.
        files.left.store(3, Ordering::SeqCst);
        case.commit(&live).unwrap_err();
        assert_eq!(case.held_roots(), 2);
        let path = case.folder.disk(&case.id).join("overlay");
        let new = fs::read(&path).unwrap();
        let label = |bytes: &[u8]| {
            dormouse_live::description::Description::parse(bytes).unwrap().base_label
        };
        assert!(label(&new).contains("vm@2:disk/root"), "{}", label(&new));
        // Another disk is made meanwhile; what is held stays.
        LiveDisks::create(
            &case.store,
            &case.folder,
            &"data".parse().unwrap(),
            NewBase::Blank,
            4096,
            Durable::AtOnce,
        )
        .unwrap();
        assert_eq!(case.held_roots(), 2);
        // The next seal is described with the old base; its commit fails before it rebases.
        files.left.store(2, Ordering::SeqCst);
        case.commit(&live).unwrap_err();
        let old = fs::read(&path).unwrap();
        assert!(label(&old).contains("vm@1:disk/root"), "{}", label(&old));
        assert!(case.held_roots() >= 2);
        overlay.flush().unwrap();
        assert!(read(overlay) == expected);
        drop(live);
        case.forget_snapshots();
        if survives == "the new description" {
            // The new one without layers above the rebased one has what was committed then.
            let mut description = dormouse_live::description::Description::parse(&new).unwrap();
            description.next_layer = 100;
            fs::write(&path, description.encode().unwrap()).unwrap();
        }
        let files = Arc::new(RealFolder::new(case.folder.disk(&case.id)));
        let reopened = case.overlay(files).unwrap();
        assert!(read(&reopened) == expected, "{survives}");
    }
}
