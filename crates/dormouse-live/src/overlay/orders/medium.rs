//! Files in memory that know what was synced. Each operation lets other threads come in between,
//! and a write of a block does so between its sectors, too.

use std::collections::BTreeMap;
use std::io;
use std::ops::Range;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};

use crate::files::{BlockFile, BootId, Folder, FolderLock};
use crate::sync::AtomicBool;

/// What reads and writes are cut into: half a block is enough to see one torn.
const PIECE_BYTES: usize = 2048;

type Names = BTreeMap<String, Arc<MemFile>>;

/// A folder as it is, and as a power cut would leave it; and how many there were.
#[derive(Debug, Default)]
pub(super) struct MemFolder(Mutex<Both<Names>>, u8);

/// A file as it is, and as a power cut would leave it.
#[derive(Debug, Default)]
struct MemFile(Mutex<Both<Bytes>>);

#[derive(Debug, Default)]
struct Both<T> {
    now: T,
    synced: T,
}

/// Bytes up to the last one that was written, and the length.
#[derive(Clone, Debug, Default)]
struct Bytes {
    bytes: Vec<u8>,
    len: usize,
}

/// Another thread may go on here. An atomic, as shuttle prefers others after a yield.
fn turn() {
    AtomicBool::new(false).load(Ordering::SeqCst);
}

fn index(offset: u64) -> usize {
    usize::try_from(offset).unwrap()
}

impl MemFolder {
    /// What is there if the power is cut now: all that was synced and nothing else.
    pub(super) fn after_power_cut(&self) -> MemFolder {
        let names = self.0.lock().unwrap().synced.clone();
        let files = names.into_iter().map(|(name, file)| {
            let left = file.0.lock().unwrap().synced.clone();
            (name, Arc::new(MemFile(Mutex::new(Both { now: left.clone(), synced: left }))))
        });
        let names: Names = files.collect();
        MemFolder(Mutex::new(Both { now: names.clone(), synced: names }), self.1 + 1)
    }
}

#[derive(Debug)]
struct Locked;

impl FolderLock for Locked {}

impl Folder for MemFolder {
    fn create(&self, name: &str) -> io::Result<Arc<dyn BlockFile>> {
        turn();
        let file = Arc::new(MemFile::default());
        let before = self.0.lock().unwrap().now.insert(name.to_owned(), file.clone());
        assert!(before.is_none(), "{name} was there");
        Ok(file)
    }

    fn open(&self, name: &str) -> io::Result<Arc<dyn BlockFile>> {
        let found = self.0.lock().unwrap().now.get(name).cloned();
        found.map(|file| file as Arc<dyn BlockFile>).ok_or_else(|| io::ErrorKind::NotFound.into())
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        turn();
        let names = &mut self.0.lock().unwrap().now;
        let file = names.remove(from).ok_or(io::ErrorKind::NotFound)?;
        names.insert(to.to_owned(), file);
        Ok(())
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        turn();
        let removed = self.0.lock().unwrap().now.remove(name);
        removed.map(|_| ()).ok_or_else(|| io::ErrorKind::NotFound.into())
    }

    fn sync(&self) -> io::Result<()> {
        turn();
        let mut names = self.0.lock().unwrap();
        names.synced = names.now.clone();
        Ok(())
    }

    fn list(&self) -> io::Result<Vec<String>> {
        Ok(self.0.lock().unwrap().now.keys().cloned().collect())
    }

    fn boot_id(&self) -> io::Result<BootId> {
        Ok(BootId([self.1; 16]))
    }

    fn lock(&self) -> io::Result<Option<Box<dyn FolderLock>>> {
        Ok(Some(Box::new(Locked)))
    }
}

impl BlockFile for MemFile {
    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        for (piece, at) in buf.chunks_mut(PIECE_BYTES).zip((index(offset)..).step_by(PIECE_BYTES)) {
            turn();
            let file = &self.0.lock().unwrap().now;
            if at + piece.len() > file.len {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            let there = file.bytes.get(at..).unwrap_or_default();
            let count = there.len().min(piece.len());
            piece[..count].copy_from_slice(&there[..count]);
            piece[count..].fill(0);
        }
        Ok(())
    }

    fn write_all_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        for (piece, at) in bytes.chunks(PIECE_BYTES).zip((index(offset)..).step_by(PIECE_BYTES)) {
            turn();
            let file = &mut self.0.lock().unwrap().now;
            let end = at + piece.len();
            if file.bytes.len() < end {
                file.bytes.resize(end, 0);
            }
            file.bytes[at..end].copy_from_slice(piece);
            file.len = file.len.max(end);
        }
        turn();
        Ok(())
    }

    fn punch(&self, range: Range<u64>) -> io::Result<()> {
        turn();
        let file = &mut self.0.lock().unwrap().now;
        let end = index(range.end).min(file.bytes.len());
        if let Some(bytes) = file.bytes.get_mut(index(range.start)..end) {
            bytes.fill(0);
        }
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        turn();
        let mut file = self.0.lock().unwrap();
        file.synced = file.now.clone();
        Ok(())
    }

    fn forget_clean_pages(&self) -> io::Result<()> {
        Ok(())
    }

    fn len(&self) -> io::Result<u64> {
        Ok(self.0.lock().unwrap().now.len as u64)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        let file = &mut self.0.lock().unwrap().now;
        file.len = index(len);
        file.bytes.truncate(index(len));
        Ok(())
    }

    fn next_data(&self, range: Range<u64>) -> io::Result<Option<Range<u64>>> {
        let end = range.end.min(self.0.lock().unwrap().now.bytes.len() as u64);
        Ok((range.start < end).then_some(range.start..end))
    }

    fn allocated_bytes(&self) -> io::Result<u64> {
        self.len()
    }
}
