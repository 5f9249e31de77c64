//! What VMMs write below `capture/`: each folder there is a capture, whose files go into the store while
//! they are written and wait there for the commit that takes them.
//!
//! ```text
//! capture/ID/parent          the snapshot that the dump lies over; written by whoever makes it
//! capture/ID/memory          the guest's whole memory: what is not written is zero
//! capture/ID/memory-ranges   the same, as Cloud Hypervisor calls it
//! capture/ID/memory-diff     what changed since the parent: what is not written is as there
//! capture/ID/NAME            anything else is a state of that name
//! capture/ID/captured.json   what is there and durable; see `description`
//! ```
//!
//! Closing a file, or an fsync, makes it durable and fails if it cannot be. All of it is gone when the
//! process that mounts ends, but for what was committed.

mod description;
mod image;
mod taken;

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use dormouse_image::block::HoleMeaning;
use dormouse_serve::device::{DeviceError, DeviceErrorKind, DeviceResult};
use dormouse_serve::fuse::{
    Access, Creation, Entry, Kind, Opened, Sink, TreeError, TreeErrorKind, TreeResult,
};
use dormouse_store::name::{ImageName, Name, SnapRef};
use dormouse_store::store::{Snapshot, Store};

use super::snapshots::{Bytes, failed};
use super::tree::{folder, missing};
use image::{CapturedFile, OpenCapture};

use description::Captured;
pub(crate) use description::CapturedImage;
pub(crate) use taken::TakenCapture;

/// Captures at once. Each that is being written has a pipeline of some megabytes.
const CAPTURES_MAX: usize = 256;

/// The file that names the parent.
const PARENT: &str = "parent";

/// The file that tells what was captured.
pub(crate) const DESCRIPTION: &str = "captured.json";

/// The longest reference to a snapshot, and a line's end.
const PARENT_BYTES_MAX: usize = 256;

/// All captures of a mount.
#[derive(Debug)]
pub(super) struct Captures {
    store: Store,
    /// Numbers of captures and files, so that one of a name that was there before is another one; from
    /// the time on, for a successor of this process.
    next: AtomicU64,
    captures: Mutex<BTreeMap<Name, Arc<Capture>>>,
}

/// A folder into which a VMM writes.
#[derive(Debug)]
struct Capture {
    id: Name,
    number: u64,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    parent: Option<Snapshot>,
    parent_text: Vec<u8>,
    has_parent_file: bool,
    files: BTreeMap<Name, Arc<CapturedFile>>,
}

impl Captures {
    pub(super) fn new(store: Store) -> Captures {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let next = AtomicU64::new(u64::try_from(now.as_nanos()).unwrap_or(0) | 1);
        Captures { store, next, captures: Mutex::default() }
    }

    pub(super) fn root() -> Entry {
        Entry { permissions: 0o777, ..folder(SystemTime::UNIX_EPOCH) }
    }

    pub(super) fn ids(&self) -> Vec<Name> {
        self.all().keys().cloned().collect()
    }

    pub(super) fn folder(&self, id: &Name) -> TreeResult<Entry> {
        let capture = self.find(id)?;
        Ok(Entry { identity: capture.number, ..Captures::root() })
    }

    /// The names in a capture, and what tells each from others of its name.
    pub(super) fn names(&self, id: &Name) -> TreeResult<Vec<(String, u64)>> {
        let capture = self.find(id)?;
        let state = capture.state();
        let files = state.files.iter().map(|(name, file)| (name.to_string(), file.number()));
        let mut names: Vec<_> = files.collect();
        names.push((DESCRIPTION.to_owned(), capture.version(&state)));
        if state.has_parent_file {
            names.push((PARENT.to_owned(), capture.number));
        }
        Ok(names)
    }

    pub(super) fn file(&self, id: &Name, name: &str) -> TreeResult<Entry> {
        let capture = self.find(id)?;
        let state = capture.state();
        let entry = Entry {
            kind: Kind::File,
            // Whoever may write here must not read another's dump.
            permissions: 0o622,
            ..folder(SystemTime::UNIX_EPOCH)
        };
        match name {
            PARENT if state.has_parent_file => Ok(Entry {
                identity: capture.number,
                size_bytes: state.parent_text.len() as u64,
                ..entry
            }),
            DESCRIPTION => Ok(Entry {
                identity: capture.version(&state),
                size_bytes: self.describe(&state)?.len() as u64,
                permissions: 0o444,
                ..entry
            }),
            _ => {
                let file = state.find(name)?;
                Ok(Entry { identity: file.number(), size_bytes: file.size_bytes(), ..entry })
            }
        }
    }

    pub(super) fn open(&self, id: &Name, name: &str, access: Access) -> TreeResult<Opened> {
        let capture = self.find(id)?;
        let state = capture.state();
        match name {
            PARENT if state.has_parent_file => Ok(self.parent_file(&capture)),
            DESCRIPTION if access == Access::Write => Err(TreeErrorKind::ReadOnly.into()),
            DESCRIPTION => {
                if let Some((name, failure)) =
                    state.files.iter().find_map(|(name, file)| Some((name, file.failure()?)))
                {
                    let kind = match failure.kind() {
                        DeviceErrorKind::NoSpace => TreeErrorKind::NoSpace,
                        DeviceErrorKind::Invalid => TreeErrorKind::Invalid,
                        _ => TreeErrorKind::Io,
                    };
                    return Err(TreeError::new(kind, format!("{id}/{name} failed: {failure}")));
                }
                // One that is open may be written on, whoever closed a copy of it.
                let is_whole = |file: &CapturedFile| file.is_durable() && !file.is_open();
                if let Some((name, _)) = state.files.iter().find(|(_, file)| !is_whole(file)) {
                    let message = format!("{id}/{name} is being written");
                    return Err(TreeError::new(TreeErrorKind::Busy, message));
                }
                Ok(Opened::Image(Arc::new(Bytes(self.describe(&state)?))))
            }
            _ => {
                let file = state.find(name)?;
                if access == Access::Read && !file.is_durable() {
                    return Err(TreeErrorKind::Busy.into());
                }
                Ok(Opened::Sink(Arc::new(OpenCapture::new(Arc::clone(file)))))
            }
        }
    }

    pub(super) fn create(&self, id: &Name, name: &str, creation: Creation) -> TreeResult<Opened> {
        let capture = self.find(id)?;
        let mut state = capture.state();
        let is_there = match name {
            PARENT => state.has_parent_file,
            DESCRIPTION => true,
            _ => state.find(name).is_ok(),
        };
        if is_there && creation == Creation::Only {
            return Err(TreeErrorKind::AlreadyExists.into());
        }
        if is_there {
            drop(state);
            return self.open(id, name, Access::Write);
        }
        if name == PARENT {
            state.has_parent_file = true;
            return Ok(self.parent_file(&capture));
        }
        let name = Name::new(name).map_err(failed)?;
        let (image, holes) = match name.as_str() {
            "memory" | "memory-ranges" => (ImageName::Memory, HoleMeaning::Zero),
            "memory-diff" => (ImageName::Memory, HoleMeaning::Parent),
            _ => (ImageName::State(name.clone()), HoleMeaning::Zero),
        };
        if state.files.values().any(|file| *file.image() == image) {
            let message = format!("{id} has a file of {image} already");
            return Err(TreeError::new(TreeErrorKind::AlreadyExists, message));
        }
        let parent = state.parent.as_ref();
        let base = parent.filter(|parent| parent.manifest().image(&image).is_some());
        let base = base.map(|parent| parent.image(&image)).transpose().map_err(failed)?;
        if holes == HoleMeaning::Parent && base.is_none() {
            let message = format!(
                "a diff wants a parent that has memory: write its name to {id}/{PARENT} first"
            );
            return Err(TreeError::new(TreeErrorKind::Invalid, message));
        }
        let label = format!("{id}/{name}");
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        let file = CapturedFile::new(self.store.clone(), label, image, number, base, holes);
        let file = Arc::new(file);
        state.files.insert(name, Arc::clone(&file));
        Ok(Opened::Sink(Arc::new(OpenCapture::new(file))))
    }

    pub(super) fn make_folder(&self, id: &Name) -> TreeResult<()> {
        let mut captures = self.all();
        if captures.contains_key(id) {
            return Err(TreeErrorKind::AlreadyExists.into());
        }
        if captures.len() >= CAPTURES_MAX {
            return Err(TreeErrorKind::NoSpace.into());
        }
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        let capture = Capture { id: id.clone(), number, state: Mutex::default() };
        captures.insert(id.clone(), Arc::new(capture));
        Ok(())
    }

    pub(super) fn remove_folder(&self, id: &Name) -> TreeResult<()> {
        let mut captures = self.all();
        let capture = captures.get(id).ok_or_else(missing)?;
        if !capture.state().files.is_empty() {
            return Err(TreeErrorKind::NotEmpty.into());
        }
        captures.remove(id);
        Ok(())
    }

    pub(super) fn remove_file(&self, id: &Name, name: &str) -> TreeResult<()> {
        let capture = self.find(id)?;
        let mut state = capture.state();
        match name {
            PARENT if state.has_parent_file => {
                if state.has_diff() {
                    return Err(TreeErrorKind::Busy.into());
                }
                state.has_parent_file = false;
                state.parent = None;
                state.parent_text.clear();
            }
            // It is there as long as the folder is; `rm -r` must not fail for it.
            DESCRIPTION => {}
            _ => {
                let name = Name::new(name).map_err(|_| missing())?;
                // Whoever has it open goes on writing to nobody.
                state.files.remove(&name).ok_or_else(missing)?;
            }
        }
        Ok(())
    }

    fn describe(&self, state: &State) -> TreeResult<Vec<u8>> {
        let parent = state.parent.as_ref().map(|parent| parent.manifest().display_name());
        let images = state.files.values().filter_map(|file| file.captured()).collect();
        Captured::new(self.store.id(), parent, images)
            .to_bytes()
            .map_err(|error| TreeError::new(TreeErrorKind::Io, error))
    }

    fn parent_file(&self, capture: &Arc<Capture>) -> Opened {
        Opened::Sink(Arc::new(ParentFile {
            store: self.store.clone(),
            capture: Arc::clone(capture),
        }))
    }

    fn find(&self, id: &Name) -> TreeResult<Arc<Capture>> {
        self.all().get(id).cloned().ok_or_else(missing)
    }

    fn all(&self) -> MutexGuard<'_, BTreeMap<Name, Arc<Capture>>> {
        // A map that is changed by single insertions and removals. Taken before a capture's own.
        self.captures.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Capture {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes with what the description says.
    fn version(&self, state: &State) -> u64 {
        let files = state.files.values().map(|file| file.number().wrapping_add(file.version()));
        files.fold(self.number, |version, file| version.rotate_left(9) ^ file)
            ^ state.parent_text.iter().fold(0, |sum, byte| sum * 31 + u64::from(*byte))
    }
}

impl State {
    fn find(&self, name: &str) -> TreeResult<&Arc<CapturedFile>> {
        let name = Name::new(name).map_err(|_| missing())?;
        self.files.get(&name).ok_or_else(missing)
    }

    fn has_diff(&self) -> bool {
        self.files.keys().any(|name| name.as_str() == "memory-diff")
    }
}

/// The file that names the parent, which is looked for at each write.
struct ParentFile {
    store: Store,
    capture: Arc<Capture>,
}

impl ParentFile {
    fn set(&self, state: &mut State, text: Vec<u8>) -> DeviceResult<()> {
        let id = &self.capture.id;
        if state.has_diff() {
            tracing::warn!(%id, "the parent of a diff is not exchanged while there is one");
            return Err(DeviceErrorKind::Invalid.into());
        }
        let trimmed = String::from_utf8_lossy(&text).trim().to_owned();
        state.parent = match trimmed.as_str() {
            "" => None,
            name => {
                let snap: SnapRef = name.parse().map_err(|error| unusable(id, error))?;
                Some(self.store.snapshot(&snap).map_err(|error| unusable(id, error))?)
            }
        };
        state.parent_text = text;
        Ok(())
    }
}

fn unusable(id: &Name, error: dormouse_store::error::Error) -> DeviceError {
    tracing::warn!(%id, %error, "the parent cannot be used");
    DeviceError::new(DeviceErrorKind::Invalid, error)
}

impl Sink for ParentFile {
    fn size_bytes(&self) -> u64 {
        self.capture.state().parent_text.len() as u64
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> DeviceResult<usize> {
        let state = self.capture.state();
        let from = usize::try_from(offset).unwrap_or(usize::MAX);
        let rest = state.parent_text.get(from..).unwrap_or_default();
        let len = rest.len().min(buffer.len());
        buffer[..len].copy_from_slice(&rest[..len]);
        Ok(len)
    }

    fn write_at(&self, data: &[u8], offset: u64) -> DeviceResult<()> {
        let mut state = self.capture.state();
        let mut text = state.parent_text.clone();
        let from = usize::try_from(offset).unwrap_or(usize::MAX);
        let end = from.saturating_add(data.len());
        if end > PARENT_BYTES_MAX || from > text.len() {
            return Err(DeviceErrorKind::Invalid.into());
        }
        text.truncate(from);
        text.extend_from_slice(data);
        self.set(&mut state, text)
    }

    fn zero(&self, _: Range<u64>) -> DeviceResult<()> {
        Err(DeviceErrorKind::Invalid.into())
    }

    fn set_size(&self, size_bytes: u64) -> DeviceResult<()> {
        let mut state = self.capture.state();
        let mut text = state.parent_text.clone();
        match usize::try_from(size_bytes) {
            Ok(0) if text.is_empty() => Ok(()),
            Ok(len) if len <= text.len() => {
                text.truncate(len);
                self.set(&mut state, text)
            }
            _ => Err(DeviceErrorKind::Invalid.into()),
        }
    }

    fn flush(&self) -> DeviceResult<()> {
        Ok(())
    }
}
