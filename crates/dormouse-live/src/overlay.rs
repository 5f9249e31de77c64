//! The overlay: a writable disk over a base that never changes.
//!
//! ```text
//! overlay          the description: size, base, layers
//! NUMBER.data      blocks of a layer, sparse, each at its own offset
//! NUMBER.states    which of them count, and which are zero
//! notes.0, .1      changes that were answered and not flushed
//! owner.lock       locked by the process that has the disk
//! ```
//!
//! Requests are cut into groups of 4 MiB, and whoever changes blocks holds the locks of their
//! stripes, 64 blocks each. The stack of layers is looked up *under* these locks. That is what
//! lets [`Overlay::seal`] put another stack in place at any time without stopping anybody: a
//! request that still works on the old top holds its stripes, and whoever comes to these stripes
//! after it sees the new top and, below it, what that request did. Reading takes no lock.
//!
//! Order of locks: administration, flush, stripes in ascending order, a layer's log, notes, failures.

mod flush;
#[cfg(test)]
mod orders;
mod seal;
mod write;

use std::fmt;
use std::io;
use std::ops::Range;
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};

use dormouse_image::block::blocks_in;

use crate::base::Base;
use crate::description::{DESCRIPTION_BYTES_MAX, Description};
use crate::error::{Context, Error, ErrorKind, Result};
use crate::failures::Failures;
use crate::files::{Folder, FolderLock};
use crate::layer::{Layer, data_name, log_name};
use crate::notes::Notes;
use crate::stack::Stack;
use crate::states::StateCounts;
use crate::sync::{ArcSwap, AtomicBool, AtomicU64, Mutex, MutexGuard};

pub use crate::stack::{DiskRun, RunSource};
pub use seal::{Sealed, SealedRun};
pub use write::Zeroing;

/// The file with the description.
const DESCRIPTION_NAME: &str = "overlay";

/// The description before it has its name.
const NEW_DESCRIPTION_NAME: &str = "overlay.new";

/// Locks for stripes; stripes this many apart share one. A multiple of the stripes in a group,
/// so that the locks of a group follow one another. Fewer where orders of threads are tried out:
/// waiting for all of them would be most of what a thread does.
const STRIPE_LOCKS: usize = if cfg!(test) { 16 } else { 256 };

/// What zero blocks inside plain writes become.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ZeroBlocks {
    /// They are found and take no space.
    Found,

    /// They are written like all others.
    Written,
}

/// How an overlay behaves while it is open; nothing of it is stored.
#[derive(Clone, Copy, Debug)]
pub struct OverlayConfig {
    /// What zero blocks inside plain writes become.
    pub zero_blocks: ZeroBlocks,

    /// Bytes below which a state log is not written anew, however little it says.
    pub log_bytes_min: u64,
}

impl OverlayConfig {
    /// Zero blocks are found, and logs of 64 KiB are none too long.
    pub const STANDARD: OverlayConfig =
        OverlayConfig { zero_blocks: ZeroBlocks::Found, log_bytes_min: 64 << 10 };
}

/// What a new overlay lies over.
#[derive(Clone, Debug)]
pub struct NewOverlay {
    /// Bytes of the disk: at least those of the base; what is more is zero.
    pub size_bytes: u64,

    /// What shows through.
    pub base: Arc<dyn Base>,

    /// The caller's name for the base, kept for [`Overlay::open`].
    pub base_label: String,
}

/// A guest's writable disk over a base. All methods may be called from any number of threads.
///
/// Dropping it flushes nothing.
pub struct Overlay {
    folder: Arc<dyn Folder>,
    config: OverlayConfig,
    size_bytes: u64,

    /// Replaced under the lock of the administration only, looked up under those of stripes.
    stack: ArcSwap<Stack>,

    /// Each guards the blocks of every 256th stripe against other writers.
    stripes: Box<[Mutex<()>]>,

    failures: Arc<Failures>,

    /// What is not flushed, for whoever opens the disk when this process was killed.
    notes: Arc<Notes>,

    /// The round of flushing that began last.
    round: AtomicU64,

    /// Lets flushes come one by one; holds the last round that succeeded.
    flushed: Mutex<u64>,

    /// Guards the description and the set of layers. Held while layers are made and folded,
    /// which no request waits for.
    administration: Mutex<Administration>,

    /// Whether sealed layers are being committed.
    is_committing: Arc<AtomicBool>,

    /// Let go when the overlay is dropped, after all else.
    _lock: Box<dyn FolderLock>,
}

#[derive(Debug)]
struct Administration {
    description: Description,
}

/// How an overlay is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Status {
    /// Bytes of the disk.
    pub size_bytes: u64,

    /// The caller's name for the base.
    pub base_label: String,

    /// Layers, the one that is written to included.
    pub layers: usize,

    /// Blocks of all layers; a block that several have counts for each.
    pub blocks: StateCounts,

    /// Bytes that the data files take.
    pub allocated_bytes: u64,

    /// Bytes of memory that the states take.
    pub memory_bytes: usize,

    /// Ranges that failed and were not made good.
    pub failed_ranges: usize,

    /// Why flushes and seals fail, until it is made good.
    pub problem: Option<String>,

    /// Whether only reading works until the overlay is opened again.
    pub is_poisoned: bool,

    /// Whether a commit is under way.
    pub is_committing: bool,
}

impl Overlay {
    /// Makes an overlay in a folder that has none; it is durable on return.
    pub fn create(
        folder: Arc<dyn Folder>,
        new: NewOverlay,
        config: OverlayConfig,
    ) -> Result<Overlay> {
        let lock = lock(&*folder)?;
        let names = folder.list().context(|| "cannot list the folder of a live disk".to_owned())?;
        if names.iter().any(|name| name == DESCRIPTION_NAME) {
            let message = "there is a live disk already";
            return Err(Error::new(ErrorKind::AlreadyExists, message));
        }
        check_base(&*new.base, new.size_bytes)?;
        remove_leftovers(&*folder, &names, &[])?;
        let description = Description {
            size_bytes: new.size_bytes,
            base_label: new.base_label,
            layers: vec![1],
            next_layer: 2,
        };
        description.encode()?;
        let notes = Notes::create(&*folder)?;
        let layer = Layer::create(&*folder, 1, new.size_bytes, config.log_bytes_min, &notes)?;
        publish(&*folder, &description).map_err(Unpublished::into_error)?;
        let stack =
            Stack { layers: vec![Arc::new(layer)], base: new.base, size_bytes: new.size_bytes };
        Ok(Overlay::new(folder, lock, config, description, stack, notes))
    }

    /// Opens an overlay as its last flush left it, or, if the kernel is still the one that its last
    /// process ran on, with all that this process had answered; `find_base` gets its description.
    ///
    /// Of what was not flushed or answered, each sector of 512 bytes has its old bytes or newer ones.
    pub fn open(
        folder: Arc<dyn Folder>,
        config: OverlayConfig,
        find_base: impl FnOnce(&Description) -> Result<Arc<dyn Base>>,
    ) -> Result<Overlay> {
        let lock = lock(&*folder)?;
        // A process that was killed may not have come to this. Flushes from now on rely on the
        // names as they are seen here, and files are removed that older ones may refer to.
        folder.sync().context(|| "cannot sync the folder of a live disk".to_owned())?;
        let description = Overlay::describe(&*folder)?;
        let size_bytes = description.size_bytes;
        let base = find_base(&description)?;
        check_base(&*base, size_bytes)?;
        // The description may have been renamed and not be durable; layers that only the one before
        // it names go next.
        folder.sync().context(|| "cannot sync the folder of a live disk".to_owned())?;
        let names = folder.list().context(|| "cannot list the folder of a live disk".to_owned())?;
        remove_leftovers(&*folder, &names, &description.layers)?;
        let (notes, noted) = Notes::open(&*folder)?;
        let layers = description.layers.iter();
        let layers = layers
            .map(|number| {
                let min = config.log_bytes_min;
                Layer::open(&*folder, *number, size_bytes, min, &notes, &noted).map(Arc::new)
            })
            .collect::<Result<_>>()?;
        let stack = Stack { layers, base, size_bytes };
        Ok(Overlay::new(folder, lock, config, description, stack, notes))
    }

    /// Forgets all that was written to an overlay that is not open: it is as its base again. The
    /// layers may be damaged; the description must be sound.
    ///
    /// A crash at any moment leaves the overlay as it was, or as its base. `lock` is the folder's.
    pub fn discard(folder: &dyn Folder, lock: &dyn FolderLock) -> Result<()> {
        // Held by the caller as long as the files change.
        let _ = lock;
        let sync = || folder.sync().context(|| "cannot sync the folder of a live disk".to_owned());
        let list = || folder.list().context(|| "cannot list the folder of a live disk".to_owned());
        // The description may have been renamed and not be durable; see `open`.
        sync()?;
        let mut description = Overlay::describe(folder)?;
        remove_leftovers(folder, &list()?, &description.layers)?;
        let number = description.next_layer;
        description.next_layer += 1;
        description.layers = vec![number];
        // Notes speak of numbers that are used up.
        Layer::create_files(folder, number, blocks_in(description.size_bytes))?;
        publish(folder, &description).map_err(Unpublished::into_error)?;
        remove_leftovers(folder, &list()?, &description.layers)
    }

    /// Reads the description of an overlay that may be open elsewhere.
    pub fn describe(folder: &dyn Folder) -> Result<Description> {
        let context = || "cannot read the description of a live disk".to_owned();
        let file = folder.open(DESCRIPTION_NAME).context(context)?;
        let len = file.len().context(context)?;
        if len > DESCRIPTION_BYTES_MAX {
            let expected = format!("at most {DESCRIPTION_BYTES_MAX}");
            return Err(Error::corrupt("live disk", format!("{len} bytes"), expected));
        }
        let mut bytes = vec![0; usize::try_from(len).unwrap_or(0)];
        file.read_exact_at(&mut bytes, 0).context(context)?;
        Description::parse(&bytes)
    }

    /// Bytes of the disk.
    pub fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    /// Fills `buf` from `offset`.
    ///
    /// Bytes that others write at the same time are old or new, sector by sector. After an error
    /// nothing in `buf` may be used.
    pub fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.range(offset, buf.len() as u64)?;
        self.stack.load().read_at(buf, offset, &self.failures)
    }

    /// Calls `visit` with runs that cover `range` in order, cut to it; neighbours may be alike.
    pub fn for_each_run(
        &self,
        range: Range<u64>,
        visit: &mut dyn FnMut(Range<u64>, DiskRun) -> Result<()>,
    ) -> Result<()> {
        let range = self.range(range.start, range.end.saturating_sub(range.start))?;
        self.stack.load_full().for_each_run(range, visit)
    }

    /// Calls `visit` with runs that cover `range` in order, cut to it, and where they are stored.
    pub fn for_each_source(
        &self,
        range: Range<u64>,
        visit: &mut dyn FnMut(Range<u64>, RunSource) -> Result<()>,
    ) -> Result<()> {
        let range = self.range(range.start, range.end.saturating_sub(range.start))?;
        self.stack.load_full().for_each_source(range, visit)
    }

    /// Has the base make later reads of `range` quicker where they go to it.
    pub fn prefetch(&self, range: Range<u64>) -> Result<()> {
        let range = self.range(range.start, range.end.saturating_sub(range.start))?;
        let stack = self.stack.load_full();
        stack.for_each_base_range(range, &mut |part| stack.base.prefetch(part))
    }

    /// Whether reading `range` probably waits for the base. Cheap, and may be wrong.
    pub fn read_will_wait(&self, range: Range<u64>) -> bool {
        let stack = self.stack.load();
        let mut waits = false;
        let told = stack.for_each_base_range(range, &mut |part| {
            waits = waits || stack.base.read_will_wait(part);
            Ok(())
        });
        // Looking at states cannot fail; if it could, reading would tell.
        waits && told.is_ok()
    }

    /// How the overlay is. Looks at all states.
    pub fn status(&self) -> Result<Status> {
        let base_label = self.administration().description.base_label.clone();
        let stack = self.stack.load_full();
        let mut status = Status {
            size_bytes: self.size_bytes,
            base_label,
            layers: stack.layers.len(),
            blocks: StateCounts::default(),
            allocated_bytes: 0,
            memory_bytes: 0,
            failed_ranges: self.failures.count(),
            problem: self.failures.check().err().map(|error| error.to_string()),
            is_poisoned: self.failures.check_poison().is_err(),
            is_committing: self.is_committing.load(Ordering::Acquire),
        };
        for layer in &stack.layers {
            let counts = layer.states.counts();
            status.blocks.dirty += counts.dirty;
            status.blocks.zero += counts.zero;
            status.memory_bytes += layer.states.memory_bytes();
            let allocated = layer.data.allocated_bytes();
            status.allocated_bytes +=
                allocated.context(|| format!("cannot look at layer {}", layer.number))?;
        }
        Ok(status)
    }

    fn new(
        folder: Arc<dyn Folder>,
        lock: Box<dyn FolderLock>,
        config: OverlayConfig,
        description: Description,
        stack: Stack,
        notes: Arc<Notes>,
    ) -> Overlay {
        Overlay {
            folder,
            config,
            size_bytes: description.size_bytes,
            stack: ArcSwap::from_pointee(stack),
            stripes: (0..STRIPE_LOCKS).map(|_| Mutex::new(())).collect(),
            failures: Arc::default(),
            notes,
            round: AtomicU64::new(0),
            flushed: Mutex::new(0),
            administration: Mutex::new(Administration { description }),
            is_committing: Arc::new(AtomicBool::new(false)),
            _lock: lock,
        }
    }

    /// The range of a request, if it lies on the disk.
    fn range(&self, offset: u64, len: u64) -> Result<Range<u64>> {
        match offset.checked_add(len) {
            Some(end) if end <= self.size_bytes => Ok(offset..end),
            _ => Err(Error::new(
                ErrorKind::InvalidInput,
                format!(
                    "{len} bytes at {offset} are not all on the disk, which has {}",
                    self.size_bytes
                ),
            )),
        }
    }

    fn administration(&self) -> MutexGuard<'_, Administration> {
        // The description is replaced whole, whoever panicked.
        self.administration.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn flushed(&self) -> MutexGuard<'_, u64> {
        self.flushed.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for Overlay {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Overlay").field("size_bytes", &self.size_bytes).finish_non_exhaustive()
    }
}

/// Why a description was not published, and whether it may be on the medium all the same.
#[derive(Debug)]
struct Unpublished {
    error: Error,
    is_in_doubt: bool,
}

impl Unpublished {
    fn into_error(self) -> Error {
        self.error
    }
}

/// Makes the names in the folder durable, and then the description.
fn publish(folder: &dyn Folder, description: &Description) -> std::result::Result<(), Unpublished> {
    let context = || "cannot write the description of a live disk".to_owned();
    let sure = |error| Unpublished { error, is_in_doubt: false };
    let write = || -> Result<()> {
        let bytes = description.encode()?;
        match folder.remove(NEW_DESCRIPTION_NAME) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(Error::io(context(), error));
            }
            _ => {}
        }
        let file = folder.create(NEW_DESCRIPTION_NAME).context(context)?;
        file.write_all_at(&bytes, 0).context(context)?;
        file.sync().context(context)?;
        // The layers' names must be there before the description that names them.
        folder.sync().context(context)
    };
    write().map_err(sure)?;
    folder.rename(NEW_DESCRIPTION_NAME, DESCRIPTION_NAME).context(context).map_err(sure)?;
    let synced = folder.sync().context(context);
    synced.map_err(|error| Unpublished { error, is_in_doubt: true })
}

fn lock(folder: &dyn Folder) -> Result<Box<dyn FolderLock>> {
    let lock = folder.lock().context(|| "cannot lock a live disk".to_owned())?;
    lock.ok_or_else(|| Error::new(ErrorKind::Busy, "another process has the live disk"))
}

fn check_base(base: &dyn Base, size_bytes: u64) -> Result<()> {
    if base.size_bytes() <= size_bytes {
        return Ok(());
    }
    Err(Error::new(
        ErrorKind::InvalidInput,
        format!("a disk of {size_bytes} bytes is shorter than its base of {}", base.size_bytes()),
    ))
}

/// Removes files of layers that are not in the description, and half-made ones.
fn remove_leftovers(folder: &dyn Folder, names: &[String], layers: &[u64]) -> Result<()> {
    for name in names {
        let is_ours = match name.split_once('.') {
            Some((number, "data" | "states" | "states.new")) => number.parse::<u64>().is_ok(),
            _ => name == NEW_DESCRIPTION_NAME,
        };
        let is_named =
            layers.iter().any(|layer| *name == data_name(*layer) || *name == log_name(*layer));
        if is_ours && !is_named {
            folder.remove(name).context(|| format!("cannot remove {name}"))?;
        }
    }
    Ok(())
}

/// Removes the files of layers that no description names. What stays is removed when the overlay
/// is opened next.
fn remove_layers(folder: &dyn Folder, layers: &[Arc<Layer>]) {
    for layer in layers {
        // Nothing refers to them, and a failure costs space only.
        let _ = folder.remove(&data_name(layer.number));
        let _ = folder.remove(&log_name(layer.number));
    }
}
