//! Notes: changes of block states that no flush has made durable, for whoever opens the disk after
//! this process was killed.
//!
//! A guest outlives the process that serves its disk, and relies on every write that was answered.
//! The bytes of such a write are in the page cache, which the death of a process does not touch; only
//! the states were in its memory. So each change of states is noted before its request is answered,
//! with a plain write into a file beside the layers that is never synced. In a later life of the
//! kernel notes are void: after a power cut nobody knows which bytes reached the medium.
//!
//! ```text
//! notes.0   notes.1   each: header │ record │ record … │ torn or older
//! ```
//!
//! What makes notes right:
//!
//! - A state is set and noted in one step, under the lock here, and *every* change of any layer is.
//!   Done again in their order they therefore end in the states as they were, whatever of them the
//!   logs have already; each block's last change is among them, or in a log.
//! - A flush begins the other file before it takes the changed states. So all that is in the older
//!   file is durable when the flush has succeeded, and no earlier is that file begun anew.
//! - Bytes are written before their state is noted, so that a note never speaks of missing ones.
//! - Once a sync of data failed, the kernel may have dropped bytes that notes speak of. They are
//!   forgotten then, and a successor syncs the data before it believes them.
//! - A file without a header has no records either, before it gets one: epochs begin at 1 again when
//!   notes were forgotten, and records of the first 1 must not pass for some of the second.
//!
//! Room is reserved before stripes are locked, where one may still flush to get it; so a change that
//! was begun never waits for a flush, and on a full file system blocks can still be given up.

mod format;

use std::io;
use std::ops::Range;
use std::sync::{Arc, PoisonError};

use crate::error::{Context, Result};
use crate::files::{BlockFile, BootId, Folder};
use crate::states::BlockState;
use crate::sync::{Mutex, MutexGuard};

pub use format::{NOTE_BYTES, NOTES_BYTES_MAX, NOTES_HEADER_BYTES, Note, NotesHeader};

const NAMES: [&str; 2] = ["notes.0", "notes.1"];

const NOTE_BYTES_U64: u64 = NOTE_BYTES as u64;
const HEADER_BYTES: u64 = NOTES_HEADER_BYTES as u64;
const BYTES_MAX: u64 = NOTES_BYTES_MAX as u64;

/// Bytes that each file has from the beginning, and by which it grows: room for all notes of the
/// largest group of a request, even if the file system is full by then.
const GROWTH_LEN: usize = if cfg!(test) { 4 << 10 } else { 64 << 10 };

/// [`GROWTH_LEN`] as an offset.
const GROWTH_BYTES: u64 = GROWTH_LEN as u64;

static ZEROS: [u8; GROWTH_LEN] = [0; GROWTH_LEN];

/// The notes of an overlay.
#[derive(Debug)]
pub(crate) struct Notes {
    files: [Arc<dyn BlockFile>; 2],
    boot: BootId,

    /// Guards the files and the step from one state to the next. Taken under stripes and under a
    /// layer's log. It is held over a write of 32 bytes into the page cache: the order of records is
    /// the order of changes.
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    /// The file that is written to.
    current: usize,
    epoch: u64,

    /// Where the next record goes.
    end: u64,

    /// Bytes of each file that have room on the medium.
    room: [u64; 2],

    /// Notes that requests under way may still write.
    reserved: u64,

    /// Whether all that the other file says is durable.
    is_other_settled: bool,

    /// Whether a record may be there whose change was not made.
    is_broken: bool,
}

/// Room for some notes, until it is dropped.
#[derive(Debug)]
pub(crate) struct Room<'a> {
    notes: &'a Notes,
    count: u64,
}

impl Notes {
    /// Begins the notes of a new disk.
    pub(crate) fn create(folder: &dyn Folder) -> Result<Arc<Notes>> {
        for name in NAMES {
            match folder.remove(name) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(error).context(|| format!("cannot remove {name}"));
                }
                _ => {}
            }
        }
        Notes::open(folder).map(|(notes, _)| notes)
    }

    /// Opens the notes of a disk, and tells what a process of this life of the kernel left, in order.
    pub(crate) fn open(folder: &dyn Folder) -> Result<(Arc<Notes>, Vec<Note>)> {
        let boot = folder.boot_id().context(|| "cannot tell this boot from others".to_owned())?;
        let (first, first_room) = open_file(folder, NAMES[0])?;
        let (second, second_room) = open_file(folder, NAMES[1])?;
        let files = [first, second];
        let mut found = Vec::new();
        for (index, file) in files.iter().enumerate() {
            let bytes = read_file(&**file).context(|| format!("cannot read {}", NAMES[index]))?;
            let Some(header) = NotesHeader::parse(&bytes, boot)? else {
                erase(&**file, &bytes).context(|| format!("cannot erase {}", NAMES[index]))?;
                continue;
            };
            found.push((header.epoch, index, header.parse_notes(&bytes[NOTES_HEADER_BYTES..])?));
        }
        found.sort_unstable_by_key(|(epoch, ..)| *epoch);
        let (current, epoch, end) = match found.last() {
            Some((epoch, index, notes)) => {
                (*index, *epoch, HEADER_BYTES + notes.len() as u64 * NOTE_BYTES_U64)
            }
            None => {
                let header = NotesHeader { boot, epoch: 1 };
                let begun = files[0].write_all_at(&header.encode(), 0);
                begun.context(|| format!("cannot begin {}", NAMES[0]))?;
                (0, 1, HEADER_BYTES)
            }
        };
        let state = State {
            current,
            epoch,
            end,
            room: [first_room, second_room],
            reserved: 0,
            is_other_settled: found.len() < 2,
            is_broken: false,
        };
        let left = found.into_iter().flat_map(|(_, _, notes)| notes).collect();
        Ok((Arc::new(Notes { files, boot, state: Mutex::new(state) }), left))
    }

    /// Reserves room for `count` notes; `None` if there is none before the next flush.
    pub(crate) fn reserve(&self, count: u64) -> Option<Room<'_>> {
        let mut state = self.state();
        let wanted = state.end + (state.reserved + count) * NOTE_BYTES_U64;
        let current = state.current;
        if wanted > BYTES_MAX || self.grow(&mut state, current, wanted).is_err() {
            return None;
        }
        state.reserved += count;
        Some(Room { notes: self, count })
    }

    /// Notes that blocks of a layer are in a state from now on, and sets it with `set`. After an error
    /// nothing was set.
    pub(crate) fn note(
        &self,
        layer: u64,
        blocks: Range<u64>,
        state: BlockState,
        set: impl FnOnce(),
    ) -> io::Result<()> {
        let mut guard = self.state();
        if guard.is_broken {
            return Err(io::Error::other("notes of changes cannot be written"));
        }
        let (file, at) = (&self.files[guard.current], guard.end);
        if at + NOTE_BYTES_U64 > guard.room[guard.current] {
            return Err(io::ErrorKind::StorageFull.into());
        }
        let header = NotesHeader { boot: self.boot, epoch: guard.epoch };
        let number = (at - HEADER_BYTES) / NOTE_BYTES_U64;
        let record = header.encode_note(number, &Note { layer, blocks, state });
        if let Err(error) = file.write_all_at(&record, at) {
            // It may be there all the same, and must not count once the state has changed again.
            guard.is_broken = file.write_all_at(&[0; NOTE_BYTES], at).is_err();
            return Err(error);
        }
        guard.end += NOTE_BYTES_U64;
        set();
        Ok(())
    }

    /// A flush begins, and has not taken the changed states yet.
    pub(crate) fn begin_flush(&self) {
        let mut state = self.state();
        if !state.is_other_settled || state.end == HEADER_BYTES {
            return;
        }
        let other = state.current ^ 1;
        let wanted = HEADER_BYTES + state.reserved * NOTE_BYTES_U64;
        let header = NotesHeader { boot: self.boot, epoch: state.epoch + 1 };
        let begun = self
            .grow(&mut state, other, wanted)
            .and_then(|()| self.files[other].write_all_at(&header.encode(), 0));
        // If it cannot be begun the current file goes on; whoever finds it full will say so.
        if begun.is_ok() {
            state.current = other;
            state.epoch = header.epoch;
            state.end = HEADER_BYTES;
            state.is_other_settled = false;
        }
    }

    /// The flush that began last has succeeded.
    pub(crate) fn end_flush(&self) {
        self.state().is_other_settled = true;
    }

    /// Whether nothing can be noted any more.
    pub(crate) fn is_broken(&self) -> bool {
        self.state().is_broken
    }

    /// Makes all notes void, as bytes that they speak of may be lost.
    pub(crate) fn forget(&self) -> io::Result<()> {
        let mut state = self.state();
        state.is_broken = true;
        let forgotten = self.files.each_ref().map(|file| {
            let erased = file.write_all_at(&[0; NOTES_HEADER_BYTES], 0);
            erased.or_else(|_| file.set_len(0))
        });
        forgotten.into_iter().collect()
    }

    /// Gives a file room for `wanted` bytes.
    fn grow(&self, state: &mut State, index: usize, wanted: u64) -> io::Result<()> {
        while state.room[index] < wanted {
            let at = state.room[index];
            // Written, not only made longer: a hole needs room when it is filled.
            let bytes = GROWTH_BYTES.min(BYTES_MAX.saturating_sub(at));
            let zeros = &ZEROS[..usize::try_from(bytes).unwrap_or(0)];
            if zeros.is_empty() {
                return Err(io::ErrorKind::StorageFull.into());
            }
            self.files[index].write_all_at(zeros, at)?;
            state.room[index] += bytes;
        }
        Ok(())
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // A record that was written and not counted is written over.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Room<'_> {
    fn drop(&mut self) {
        self.notes.state().reserved -= self.count;
    }
}

/// Opens or makes a file of notes, and tells how many bytes of it have room.
fn open_file(folder: &dyn Folder, name: &str) -> Result<(Arc<dyn BlockFile>, u64)> {
    let context = || format!("cannot open {name}");
    let file = match folder.open(name) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => folder.create(name),
        opened => opened,
    };
    let file = file.context(context)?;
    let len = file.len().context(context)?.min(BYTES_MAX);
    if len >= GROWTH_BYTES {
        return Ok((file, len));
    }
    // Bytes past the end alone, as what is before them may be a predecessor's.
    let zeros = &ZEROS[usize::try_from(len).unwrap_or(0)..];
    file.write_all_at(zeros, len).context(context)?;
    Ok((file, GROWTH_BYTES))
}

/// Overwrites what a file without a header has. In place: what has room keeps it.
fn erase(file: &dyn BlockFile, bytes: &[u8]) -> io::Result<()> {
    for (at, part) in (0..).step_by(GROWTH_LEN).zip(bytes.chunks(GROWTH_LEN)) {
        if part.iter().any(|byte| *byte != 0) {
            file.write_all_at(&ZEROS[..part.len()], at)?;
        }
    }
    Ok(())
}

fn read_file(file: &dyn BlockFile) -> io::Result<Vec<u8>> {
    let len = file.len()?.min(BYTES_MAX);
    let mut bytes = vec![0; usize::try_from(len).unwrap_or(0)];
    file.read_exact_at(&mut bytes, 0)?;
    Ok(bytes)
}
