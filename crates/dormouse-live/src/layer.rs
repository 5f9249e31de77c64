//! One layer: a sparse data file, the states of its blocks, and the log that keeps them.
//!
//! ```text
//! NUMBER.data      block b of the disk at byte 4096 × b, and a guard block behind the last one
//! NUMBER.states    the state log
//! ```
//!
//! The order that makes a flush durable: take the changed states, sync the data, append the
//! states, sync the log. States are taken first, so that none says dirty of bytes that the sync
//! may have missed. Data that no synced log knows of is no data. It costs space and nothing else,
//! and is punched when the layer is opened, if the file has more than its dirty blocks explain.
//!
//! The guard block is never written. Somebody who cuts the file short behind our back cuts it
//! off, and no later write makes the file as long again. A write to a cut file makes a hole of what
//! was lost, which would read as zeros; so each one looks at the length afterwards, and once one has
//! found it short nothing is read from the file any more.

use std::io;
use std::ops::Range;
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};

use dormouse_image::block::{BLOCK_BYTES_U64, blocks_in};

use crate::error::{Context, Error, ErrorKind, Result};
use crate::failures::Failures;
use crate::files::{BlockFile, Folder};
use crate::notes::{Note, Notes};
use crate::state_log::{BatchWriter, KnownStates, LOG_HEADER_BYTES, LogHeader, replay};
use crate::states::{BlockState, States};
use crate::sync::{AtomicBool, Mutex, MutexGuard};

/// File systems keep notes of where a file's blocks are, which count as blocks of the file: ext4 a
/// block for 340 extents, half of that where they came in no order. So many runs of dirty blocks
/// explain a block of notes.
const RUNS_PER_NOTE: u64 = 128;

/// Blocks of notes that any file may have.
const NOTES_MIN: u64 = 2;

/// A log may have this many times the bytes of its full form.
const COMPACT_FACTOR: u64 = 4;

/// A layer of an overlay.
#[derive(Debug)]
pub(crate) struct Layer {
    pub(crate) number: u64,
    pub(crate) states: States,
    pub(crate) data: Arc<dyn BlockFile>,
    blocks: u64,

    /// A log is not worth writing anew below this many bytes.
    log_bytes_min: u64,

    /// Whether the data was written to since the last flush.
    is_data_pending: AtomicBool,

    /// Whether a write found the data file cut short.
    is_cut: AtomicBool,

    /// Where changes of states are noted before they are answered.
    notes: Arc<Notes>,

    /// Guards the log file and what it says. Taken under the overlay's flush lock.
    log: Mutex<Log>,
}

#[derive(Debug)]
struct Log {
    file: Arc<dyn BlockFile>,
    known: KnownStates,
    end: u64,
    next_flush: u64,
    compact_at: u64,
    /// Kept from flush to flush for its memory.
    writer: BatchWriter,
    taken: Vec<(Range<u64>, BlockState)>,
}

pub(crate) fn data_name(number: u64) -> String {
    format!("{number}.data")
}

pub(crate) fn log_name(number: u64) -> String {
    format!("{number}.states")
}

fn new_log_name(number: u64) -> String {
    format!("{number}.states.new")
}

impl Layer {
    /// Makes an empty layer whose files are durable; their names are once the folder is synced.
    pub(crate) fn create(
        folder: &dyn Folder,
        number: u64,
        size_bytes: u64,
        log_bytes_min: u64,
        notes: &Arc<Notes>,
    ) -> Result<Layer> {
        let blocks = blocks_in(size_bytes);
        let (data, file) = Layer::create_files(folder, number, blocks)?;
        let log = Log::new(file, KnownStates::default(), LOG_HEADER_BYTES as u64, 1);
        Ok(Layer {
            number,
            states: States::new(blocks),
            data,
            blocks,
            log_bytes_min,
            is_data_pending: AtomicBool::new(false),
            is_cut: AtomicBool::new(false),
            notes: Arc::clone(notes),
            log: Mutex::new(log),
        })
    }

    /// Makes the files of an empty layer, its data and its log.
    pub(crate) fn create_files(
        folder: &dyn Folder,
        number: u64,
        blocks: u64,
    ) -> Result<(Arc<dyn BlockFile>, Arc<dyn BlockFile>)> {
        let context = || format!("cannot make layer {number}");
        let data = folder.create(&data_name(number)).context(context)?;
        data.set_len(data_bytes(blocks)).context(context)?;
        data.sync().context(context)?;
        let file = folder.create(&log_name(number)).context(context)?;
        let settled_bytes = LOG_HEADER_BYTES as u64;
        let header = LogHeader { layer: number, blocks, settled_bytes };
        file.write_all_at(&header.encode(), 0).context(context)?;
        file.sync().context(context)?;
        Ok((data, file))
    }

    /// Opens a layer as its last flush left it, with what was noted since.
    pub(crate) fn open(
        folder: &dyn Folder,
        number: u64,
        size_bytes: u64,
        log_bytes_min: u64,
        notes: &Arc<Notes>,
        noted: &[Note],
    ) -> Result<Layer> {
        let blocks = blocks_in(size_bytes);
        let data = folder
            .open(&data_name(number))
            .context(|| format!("cannot open the data of layer {number}"))?;
        let noted: Vec<&Note> = noted.iter().filter(|note| note.layer == number).collect();
        if !noted.is_empty() {
            settle_noted(&*data, notes, number)?;
        }
        let context = || format!("cannot open the states of layer {number}");
        let file = folder.open(&log_name(number)).context(context)?;
        // After a failed sync both may show bytes that never reached the medium.
        data.forget_clean_pages().context(context)?;
        file.forget_clean_pages().context(context)?;
        let len = file.len().context(context)?;
        let read = |buf: &mut [u8], offset: u64| file.read_exact_at(buf, offset);
        let (header, known, end) = replay(&read, len)?;
        if (header.layer, header.blocks) != (number, blocks) {
            let got = format!("layer {} of {} blocks", header.layer, header.blocks);
            return Err(Error::corrupt("state log", got, format!("{number} of {blocks}")));
        }
        if end.offset < len {
            // What a torn flush left must not be there when the log grows over it.
            file.set_len(end.offset).context(context)?;
        }
        // A process that was killed may not have come to this; what was read is relied on.
        file.sync().context(context)?;
        let states = States::new(blocks);
        let mut current = known.clone();
        for note in &noted {
            if note.blocks.end > blocks {
                let got = format!("blocks to {}", note.blocks.end);
                return Err(Error::corrupt("note of a live disk", got, format!("{blocks} blocks")));
            }
            current.set(note.blocks.clone(), note.state);
        }
        let (mut dirty, mut runs) = (0, 0);
        current.for_each_run(&mut |run, state| {
            if state == BlockState::Dirty {
                dirty += run.end - run.start;
                runs += 1;
            }
            states.restore(run, state);
        });
        for note in &noted {
            states.mark_changed(note.blocks.clone());
        }
        let log = Log::new(file, known, end.offset, end.next_flush);
        let layer = Layer {
            number,
            states,
            data,
            blocks,
            log_bytes_min,
            // Bytes of a process that was killed may be in memory only. The next flush syncs them.
            is_data_pending: AtomicBool::new(true),
            is_cut: AtomicBool::new(false),
            notes: Arc::clone(notes),
            log: Mutex::new(log),
        };
        layer.check_length()?;
        let explained = dirty + runs / RUNS_PER_NOTE + NOTES_MIN;
        let allocated = layer.data.allocated_bytes();
        let allocated =
            allocated.context(|| format!("cannot look at the data of layer {number}"))?;
        // Looking at each of a file's extents takes as long as anything else here together.
        if allocated > explained * BLOCK_BYTES_U64 {
            layer.punch_unknown()?;
        }
        Ok(layer)
    }

    /// Fills `part` from `offset`, where blocks are dirty; `UnexpectedEof` where the file was cut.
    pub(crate) fn read(&self, part: &mut [u8], offset: u64) -> io::Result<()> {
        self.data.read_exact_at(part, offset)?;
        // Afterwards: a write that makes the file longer says so before it returns.
        if self.is_cut.load(Ordering::Acquire) { Err(cut_short()) } else { Ok(()) }
    }

    /// Writes whole blocks, or a part of one that is dirty already; `UnexpectedEof` where the file
    /// was cut short before.
    pub(crate) fn write(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        let written = self.data.write_all_at(bytes, offset);
        // Set before any state is, and after a failed write, too: some of it may be in the file.
        self.is_data_pending.store(true, Ordering::Release);
        if self.data.len()? < data_bytes(self.blocks) {
            self.is_cut.store(true, Ordering::Release);
            return Err(cut_short());
        }
        written
    }

    /// Makes blocks zero and frees their space with one punch. The caller has their stripes.
    ///
    /// The state alone makes them zero, whatever is in the file. A file system that cannot punch,
    /// or has no room for the notes that takes, therefore costs space and nothing else.
    pub(crate) fn zero(&self, blocks: Range<u64>) -> io::Result<()> {
        if let Some(dirty) = self.states.dirty_hull(blocks.clone()) {
            let bytes = dirty.start * BLOCK_BYTES_U64..dirty.end * BLOCK_BYTES_U64;
            match self.data.punch(bytes) {
                Err(error)
                    if !matches!(
                        error.kind(),
                        io::ErrorKind::Unsupported | io::ErrorKind::StorageFull
                    ) =>
                {
                    return Err(error);
                }
                _ => {}
            }
        }
        self.mark(blocks, BlockState::Zero)
    }

    /// Sets the states of blocks whose bytes are in the file or freed, and notes it for whoever opens
    /// the disk when this process was killed. The caller has their stripes and room for a note; after
    /// an error nothing was set.
    pub(crate) fn mark(&self, blocks: Range<u64>, state: BlockState) -> io::Result<()> {
        if blocks.is_empty() || self.states.run(blocks.start, blocks.end) == (state, blocks.end) {
            return Ok(());
        }
        self.notes.note(self.number, blocks.clone(), state, || self.states.set(blocks, state))
    }

    /// Frees what a failed write may have left in blocks that are not dirty.
    pub(crate) fn forget_unwritten(&self, blocks: Range<u64>) {
        let mut at = blocks.start;
        while at < blocks.end {
            let (state, end) = self.states.run(at, blocks.end);
            if state != BlockState::Dirty {
                // No state refers to these bytes; the write's own error is the one to tell.
                let _ = self.data.punch(at * BLOCK_BYTES_U64..end * BLOCK_BYTES_U64);
            }
            at = end;
        }
    }

    /// Makes everything written so far durable. Flushes of an overlay come one by one.
    pub(crate) fn flush(&self, folder: &dyn Folder, failures: &Failures) -> Result<()> {
        let number = self.number;
        self.check_length().inspect_err(|error| failures.poison(&error.to_string()))?;
        let mut guard = self.log();
        let log = &mut *guard;
        log.taken.clear();
        let taken = &mut log.taken;
        self.states.take_changed(&mut |blocks, state| taken.push((blocks, state)));
        if self.is_data_pending.swap(false, Ordering::AcqRel) {
            self.data.sync().map_err(|error| {
                let message = format!("cannot sync the data of layer {number}");
                failures.poison(&message);
                // If they cannot be erased either, nothing of this file system can be believed.
                let _ = self.notes.forget();
                Error::io(message, error)
            })?;
        }
        if log.taken.is_empty() {
            return Ok(());
        }
        log.writer.begin(number, log.next_flush);
        for (blocks, state) in &log.taken {
            log.writer.push(blocks.clone(), *state);
        }
        let bytes = log.writer.finish();
        if let Err(error) = log.file.write_all_at(bytes, log.end) {
            for (blocks, _) in &log.taken {
                self.states.mark_changed(blocks.clone());
            }
            let message = format!("cannot write the states of layer {number}");
            if log.file.set_len(log.end).is_err() {
                failures.poison(&message);
            }
            return Err(Error::io(message, error));
        }
        log.file.sync().map_err(|error| {
            let message = format!("cannot sync the states of layer {number}");
            failures.poison(&message);
            Error::io(message, error)
        })?;
        log.end += bytes.len() as u64;
        log.next_flush += 1;
        for (blocks, state) in log.taken.drain(..) {
            log.known.set(blocks, state);
        }
        if log.end > log.compact_at {
            self.compact(log, folder, failures)?;
        }
        Ok(())
    }

    /// Fails if somebody cut the data file short.
    pub(crate) fn check_length(&self) -> Result<()> {
        let number = self.number;
        let context = || format!("cannot look at the data of layer {number}");
        let (got, expected) = (self.data.len().context(context)?, data_bytes(self.blocks));
        if got == expected {
            return Ok(());
        }
        let message = format!(
            "the data of layer {number} has {got} bytes instead of {expected}; \
             somebody else changed the file"
        );
        Err(Error::new(ErrorKind::Corrupt, message))
    }

    fn log(&self) -> MutexGuard<'_, Log> {
        // A flush that panicked left states marked as taken; no later one may claim them.
        self.log.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes the log anew if it outgrew its full form. Only the step from the old log to the new
    /// one can fail the flush: before it the old one serves as well.
    fn compact(&self, log: &mut Log, folder: &dyn Folder, failures: &Failures) -> Result<()> {
        log.known.optimize();
        log.compact_at = self.compact_at(log.known.full_bytes());
        if log.end <= log.compact_at {
            return Ok(());
        }
        let temporary = new_log_name(self.number);
        let Ok((file, end)) = self.write_full(log, folder, &temporary) else {
            // The flush itself is done; the next try is due when the log grew by as much again.
            log.compact_at = log.end.saturating_mul(2);
            let _ = folder.remove(&temporary);
            return Ok(());
        };
        let message = format!("cannot replace the states of layer {}", self.number);
        let renamed = folder.rename(&temporary, &log_name(self.number));
        if let Err(error) = renamed.and_then(|()| folder.sync()) {
            // Which of the two logs a power cut would leave is unknown from here on.
            failures.poison(&message);
            return Err(Error::io(message, error));
        }
        *log = Log { known: std::mem::take(&mut log.known), ..Log::empty(file, end, 2) };
        log.compact_at = self.compact_at(end);
        Ok(())
    }

    /// The length beyond which a log with this full form is written anew.
    fn compact_at(&self, full_bytes: u64) -> u64 {
        full_bytes.saturating_mul(COMPACT_FACTOR).max(self.log_bytes_min)
    }

    fn write_full(
        &self,
        log: &mut Log,
        folder: &dyn Folder,
        name: &str,
    ) -> Result<(Arc<dyn BlockFile>, u64)> {
        let context = || format!("cannot write {name}");
        match folder.remove(name) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(Error::io(context(), error));
            }
            _ => {}
        }
        log.writer.begin(self.number, 1);
        log.writer.push_full(&log.known, self.blocks)?;
        let batches = log.writer.finish();
        let settled_bytes = (LOG_HEADER_BYTES + batches.len()) as u64;
        let header = LogHeader { layer: self.number, blocks: self.blocks, settled_bytes };
        let file = folder.create(name).context(context)?;
        file.write_all_at(&header.encode(), 0).context(context)?;
        file.write_all_at(batches, LOG_HEADER_BYTES as u64).context(context)?;
        file.sync().context(context)?;
        Ok((file, settled_bytes))
    }

    /// Punches all data of blocks that are not dirty.
    fn punch_unknown(&self) -> Result<()> {
        let context = || format!("cannot punch the data of layer {}", self.number);
        let end = self.blocks * BLOCK_BYTES_U64;
        let mut at = 0;
        while let Some(data) = self.data.next_data(at..end).context(context)? {
            let last = blocks_in(data.end);
            let mut block = data.start / BLOCK_BYTES_U64;
            while block < last {
                let (state, stop) = self.states.run(block, last);
                if state != BlockState::Dirty {
                    match self.data.punch(block * BLOCK_BYTES_U64..stop * BLOCK_BYTES_U64) {
                        Err(error) if error.kind() == io::ErrorKind::Unsupported => return Ok(()),
                        punched => punched.context(context)?,
                    }
                }
                block = stop;
            }
            at = data.end;
        }
        Ok(())
    }
}

impl Log {
    fn new(file: Arc<dyn BlockFile>, known: KnownStates, end: u64, next_flush: u64) -> Log {
        Log { known, ..Log::empty(file, end, next_flush) }
    }

    fn empty(file: Arc<dyn BlockFile>, end: u64, next_flush: u64) -> Log {
        Log {
            file,
            known: KnownStates::default(),
            end,
            next_flush,
            compact_at: 0,
            writer: BatchWriter::default(),
            taken: Vec::new(),
        }
    }
}

/// Makes the bytes durable that a killed process noted: only then they are known to be there.
fn settle_noted(data: &dyn BlockFile, notes: &Notes, number: u64) -> Result<()> {
    data.sync().map_err(|error| {
        // The kernel may have dropped them; the next one to open the disk has what was flushed.
        let _ = notes.forget();
        let message = format!(
            "cannot sync the data of layer {number}, and what was written to it since its last \
             flush may be lost; open the disk again to have what was flushed"
        );
        Error::io(message, error)
    })
}

fn cut_short() -> io::Error {
    io::Error::new(io::ErrorKind::UnexpectedEof, "somebody else cut the file short")
}

/// The length of a data file: all blocks and the guard.
fn data_bytes(blocks: u64) -> u64 {
    (blocks + 1) * BLOCK_BYTES_U64
}
