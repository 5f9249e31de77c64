//! A tree of files for the FUSE server, over devices in memory and on disk, and a folder to mount it on.

use std::fs::{self, File};
use std::ops::{ControlFlow, Range};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use dormouse_serve::device::{BlockDevice, DeviceResult, Durability, HOLE, Run, ZERO, ZeroMode};
use dormouse_serve::fuse::{
    Access, Entry, Item, Kind, Mount, MountOptions, Opened, Tree, TreeErrorKind, TreeResult,
};
use tempfile::TempDir;

use crate::memory::Memory;

pub(crate) const OPTIONS: MountOptions =
    MountOptions { threads: 4, read_ahead_threads: 1, allow_other: false };

/// `images/…` never change, `disks/…` are written to.
#[derive(Default)]
pub(crate) struct Files {
    pub(crate) images: Mutex<Vec<(String, Arc<Memory>)>>,
    pub(crate) disks: Mutex<Vec<(String, Arc<dyn BlockDevice>)>>,
    pub(crate) memories: Mutex<Vec<(String, Arc<dyn BlockDevice>)>>,
    pub(crate) opens: AtomicU64,
}

enum Found {
    Folder,
    Image(Arc<Memory>),
    Disk(Arc<dyn BlockDevice>),
    Memory(Arc<dyn BlockDevice>),
}

fn named<T: Clone>(files: &Mutex<Vec<(String, T)>>, name: &str) -> Option<T> {
    files.lock().unwrap().iter().find(|(one, _)| one == name).map(|(_, file)| file.clone())
}

impl Files {
    fn find(&self, path: &str) -> TreeResult<Found> {
        let found = match path.split_once('/') {
            None if ["", "images", "disks", "memories"].contains(&path) => Some(Found::Folder),
            Some(("images", name)) => named(&self.images, name).map(Found::Image),
            Some(("disks", name)) => named(&self.disks, name).map(Found::Disk),
            Some(("memories", name)) => named(&self.memories, name).map(Found::Memory),
            _ => None,
        };
        found.ok_or_else(|| TreeErrorKind::NotFound.into())
    }
}

impl Tree for Files {
    fn entry(&self, path: &str) -> TreeResult<Entry> {
        let found = self.find(path)?;
        let (kind, size_bytes, permissions) = match &found {
            Found::Folder => (Kind::Folder, 0, 0o755),
            Found::Image(device) => (Kind::File, device.size_bytes(), 0o644),
            Found::Disk(device) | Found::Memory(device) => (Kind::File, device.size_bytes(), 0o666),
        };
        Ok(Entry {
            kind,
            identity: 0,
            size_bytes,
            allocated_bytes: size_bytes / 2,
            modified: SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000_000),
            permissions,
            is_fixed: matches!(found, Found::Image(_)),
        })
    }

    fn list(&self, path: &str, visit: &mut dyn FnMut(Item<'_>)) -> TreeResult<()> {
        let mut show = |kind, name: &str| visit(Item { name, kind, identity: 0 });
        match path {
            "" => ["images", "disks", "memories"].iter().for_each(|name| show(Kind::Folder, name)),
            "images" => {
                let images = self.images.lock().unwrap();
                images.iter().for_each(|(name, _)| show(Kind::File, name));
            }
            "disks" => {
                let disks = self.disks.lock().unwrap();
                disks.iter().for_each(|(name, _)| show(Kind::File, name));
            }
            "memories" => {
                let memories = self.memories.lock().unwrap();
                memories.iter().for_each(|(name, _)| show(Kind::File, name));
            }
            _ => return Err(TreeErrorKind::NotFound.into()),
        }
        Ok(())
    }

    fn open(&self, path: &str, _: Access) -> TreeResult<Opened> {
        self.opens.fetch_add(1, Ordering::SeqCst);
        match self.find(path)? {
            Found::Folder => Err(TreeErrorKind::Invalid.into()),
            Found::Image(device) => Ok(Opened::Image(device)),
            Found::Disk(device) => Ok(Opened::Disk(device)),
            Found::Memory(device) => Ok(Opened::Memory(device)),
        }
    }
}

/// A file as a device, which outlives whoever serves it.
pub(crate) struct FileDevice(pub(crate) File);

impl BlockDevice for FileDevice {
    fn size_bytes(&self) -> u64 {
        self.0.metadata().unwrap().len()
    }

    fn is_read_only(&self) -> bool {
        false
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> DeviceResult<()> {
        Ok(self.0.read_exact_at(buffer, offset)?)
    }

    fn write_at(&self, data: &[u8], offset: u64, _: Durability) -> DeviceResult<()> {
        Ok(self.0.write_all_at(data, offset)?)
    }

    fn zero(&self, range: Range<u64>, _: ZeroMode, _: Durability) -> DeviceResult<()> {
        let zeros = vec![0; usize::try_from(range.end - range.start).unwrap()];
        Ok(self.0.write_all_at(&zeros, range.start)?)
    }

    fn extents(
        &self,
        _: &str,
        range: Range<u64>,
        sink: &mut dyn FnMut(Run) -> ControlFlow<()>,
    ) -> DeviceResult<()> {
        let mut bytes = vec![0; usize::try_from(range.end - range.start).unwrap()];
        self.read_at(&mut bytes, range.start)?;
        for block in bytes.chunks(4096) {
            let flags = if block.iter().all(|&byte| byte == 0) { HOLE | ZERO } else { 0 };
            if sink(Run { length: block.len() as u64, flags }).is_break() {
                break;
            }
        }
        Ok(())
    }
}

/// A tree that is mounted, until the end of the test.
pub(crate) struct Mounted {
    pub(crate) files: Arc<Files>,
    pub(crate) mount: Option<Mount>,
    pub(crate) place: Place,
}

impl Mounted {
    pub(crate) fn new() -> Mounted {
        let files = Arc::new(Files::default());
        let place = Place::new();
        let mount =
            Mount::new(Arc::clone(&files) as Arc<dyn Tree>, place.path(), &OPTIONS).unwrap();
        Mounted { files, mount: Some(mount), place }
    }

    pub(crate) fn image(&self, name: &str, bytes: Vec<u8>) -> (PathBuf, Arc<Memory>) {
        let mut image = Memory::new(bytes);
        image.read_only = true;
        let image = Arc::new(image);
        self.files.images.lock().unwrap().push((name.to_owned(), Arc::clone(&image)));
        (self.place.path().join("images").join(name), image)
    }

    pub(crate) fn disk(&self, name: &str, bytes: Vec<u8>) -> (PathBuf, Arc<Memory>) {
        let disk = Arc::new(Memory::new(bytes));
        self.files.disks.lock().unwrap().push((name.to_owned(), Arc::clone(&disk) as _));
        (self.place.path().join("disks").join(name), disk)
    }

    pub(crate) fn memory(&self, name: &str, bytes: Vec<u8>) -> (PathBuf, Arc<Memory>) {
        let memory = Arc::new(Memory::new(bytes));
        self.files.memories.lock().unwrap().push((name.to_owned(), Arc::clone(&memory) as _));
        (self.place.path().join("memories").join(name), memory)
    }
}

/// A folder to mount on; what is mounted there at the end is taken away, whoever did it.
pub(crate) struct Place(TempDir);

impl Place {
    pub(crate) fn new() -> Place {
        let dir = TempDir::new().unwrap();
        fs::create_dir(dir.path().join("mnt")).unwrap();
        Place(dir)
    }

    pub(crate) fn path(&self) -> &'static Path {
        // Tests end before their processes do; a path is a few bytes.
        Box::leak(self.0.path().join("mnt").into_boxed_path())
    }

    pub(crate) fn beside(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let flags = rustix::mount::UnmountFlags::DETACH;
        // Mostly nothing is mounted there any more.
        let _ = rustix::mount::unmount(self.path(), flags);
    }
}
