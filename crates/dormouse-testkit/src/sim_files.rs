//! A folder of random-access files in memory that forgets and tears what was not synced.
//!
//! What a power cut may leave, exactly as little as [`BlockFile`] and [`Folder`] promise:
//!
//! - of a file, each sector of 512 bytes by itself as of the last good sync, or as any of the
//!   writes and punches since left it; and its length as of the last good sync or any since;
//! - of the folder, the names as of its last sync and any subset of the changes since, in their
//!   order. A rename is one change.
//!
//! A failed sync loses its pages: what it should have written is on the medium or not, and no
//! later sync writes it. A failed write may have written a part. Faults are those of
//! [`sim_disk`](crate::sim_disk).
//!
//! ```
//! use dormouse_live::files::Folder;
//! use dormouse_testkit::sim_disk::Survive;
//! use dormouse_testkit::sim_files::SimFolder;
//!
//! let folder = SimFolder::new(1);
//! let file = folder.create("data")?;
//! file.write_all_at(&[7; 512], 4096)?;
//! file.sync()?;
//! assert!(folder.after_power_cut(Survive::Nothing).names().is_empty(), "its name was not synced");
//!
//! folder.sync()?;
//! file.punch(4096..8192)?;
//! let left = folder.after_power_cut(Survive::Nothing).open("data")?;
//! let mut sector = [0; 512];
//! left.read_exact_at(&mut sector, 4096)?;
//! assert_eq!(sector, [7; 512]);
//! # Ok::<(), std::io::Error>(())
//! ```

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use dormouse_live::files::{BlockFile, BootId, Folder, FolderLock};

use crate::sim_disk::faults::{Effect, Faults, StepKind};
use crate::sim_disk::random::SplitMix64;
use crate::sim_disk::{LastStep, Survive};

/// What the medium writes whole or not at all.
const SECTOR_BYTES: u64 = 512;

/// [`SECTOR_BYTES`] as the length of a buffer.
const SECTOR_LEN: usize = 512;

/// The unit of holes, as of ext4, XFS and tmpfs.
const PAGE_BYTES: u64 = 4096;

/// `EIO` of Linux, which has no [`io::ErrorKind`].
const EIO: i32 = 5;

/// The bytes of a sector; `None` is a hole.
type Sector = Option<Box<[u8; SECTOR_LEN]>>;

/// A simulated folder. Clones are further handles to the same one.
///
/// Operations are counted to say when a fault happens: each call that may change something,
/// whether it succeeds or not. Reading does not count.
#[derive(Clone)]
pub struct SimFolder {
    /// Guards everything.
    state: Arc<Mutex<State>>,
}

struct State {
    faults: Faults,
    random: SplitMix64,
    files: BTreeMap<u64, SimContent>,
    next_file: u64,
    seen: BTreeMap<String, u64>,
    settled: BTreeMap<String, u64>,
    /// Changes of names since the last sync; each happens whole or not at all.
    pending: Vec<Vec<(String, Option<u64>)>>,
    is_locked: bool,
    /// How often the power was cut or the file system mounted anew.
    boots: u128,
}

#[derive(Clone, Default)]
struct SimContent {
    sectors: BTreeMap<u64, Versions>,
    len: u64,
    settled_len: u64,
    /// Lengths since the last sync.
    lens: Vec<u64>,
    is_len_dirty: bool,
    broken: Vec<Range<u64>>,
}

/// A sector on the medium, and what it was made since.
#[derive(Clone, Default)]
struct Versions {
    settled: Sector,
    pending: Vec<Sector>,
    /// Whether the next sync writes the last of `pending` out.
    is_dirty: bool,
}

impl SimFolder {
    /// An empty folder; the seed decides how far torn and failed operations get.
    pub fn new(seed: u64) -> SimFolder {
        SimFolder::with_state(State {
            faults: Faults::default(),
            random: SplitMix64::new(seed),
            files: BTreeMap::new(),
            next_file: 0,
            seen: BTreeMap::new(),
            settled: BTreeMap::new(),
            pending: Vec::new(),
            is_locked: false,
            boots: 0,
        })
    }

    /// The operations so far, including the one that a power cut interrupted.
    pub fn operations(&self) -> u64 {
        self.state().faults.operations()
    }

    /// Cuts the power during the `n`-th operation from now and says what becomes of that one;
    /// everything after it fails. The next operation is 1, and 0 cuts the power at once.
    pub fn cut_after_with(&self, n: u64, last: LastStep) {
        self.state().faults.cut_after(n, last);
    }

    /// Kills the process during the `n`-th operation from now and says what becomes of that one; it
    /// does nothing after it. The kernel keeps what it has.
    pub fn kill_after_with(&self, n: u64, last: LastStep) {
        self.state().faults.kill_after(n, last);
    }

    /// Lets another process go on with what the kernel has, names and bytes; nobody has the lock.
    pub fn after_death_of_process(&self) {
        let mut state = self.state();
        state.faults.revive();
        state.is_locked = false;
    }

    /// Whether the power is off.
    pub fn is_off(&self) -> bool {
        self.state().faults.is_off()
    }

    /// A folder holding one of the states in which a power cut now could leave this one, with no
    /// lock held and no faults to come but broken ranges. This folder stays as it is.
    pub fn after_power_cut(&self, survive: Survive) -> SimFolder {
        let state = self.state();
        let seed = match survive {
            Survive::Nothing | Survive::Everything => 0,
            Survive::Random(seed) => seed,
        };
        let mut random = SplitMix64::new(seed);
        let mut names = state.settled.clone();
        let quarters = random.up_to(4);
        for change in &state.pending {
            if survives(survive, quarters, &mut random) {
                apply(change, &mut names);
            }
        }
        let files = names.values().map(|file| {
            let content = state.files[file].after_power_cut(survive, &mut random);
            (*file, content)
        });
        let files = files.collect();
        SimFolder::with_state(State {
            faults: Faults::default(),
            random,
            files,
            next_file: state.next_file,
            seen: names.clone(),
            settled: names,
            pending: Vec::new(),
            is_locked: false,
            boots: state.boots + 1,
        })
    }

    /// Lets the `n`-th operation from now fail with `kind`, and only that one; the next is 1.
    pub fn fail_at(&self, n: u64, kind: io::ErrorKind) {
        self.state().faults.fail_at(n, kind);
    }

    /// Lets every operation from the `n`-th on fail with `kind`; the next is 1. If that is
    /// `StorageFull`, syncing, punching, removing and overwriting go on working.
    pub fn fail_from(&self, n: u64, kind: io::ErrorKind) {
        self.state().faults.fail_from(n, kind);
    }

    /// Takes back every fault to come: cuts and failures, not broken ranges.
    pub fn clear_faults(&self) {
        self.state().faults.clear();
    }

    /// Lets every read that touches these bytes of a file fail with `EIO`, until they are
    /// written again.
    pub fn break_range(&self, name: &str, range: Range<u64>) -> io::Result<()> {
        self.state().named(name)?.broken.push(range);
        Ok(())
    }

    /// Lets all that was broken be read again.
    pub fn mend(&self) {
        for file in self.state().files.values_mut() {
            file.broken.clear();
        }
    }

    /// Cuts a file short behind its owner's back.
    pub fn truncate(&self, name: &str, len: u64) -> io::Result<()> {
        let mut state = self.state();
        let file = state.named(name)?;
        file.set_len(len);
        file.sync();
        Ok(())
    }

    /// The names as the running system sees them, sorted.
    pub fn names(&self) -> Vec<String> {
        self.state().seen.keys().cloned().collect()
    }

    fn with_state(state: State) -> SimFolder {
        SimFolder { state: Arc::new(Mutex::new(state)) }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // A test thread that panicked has shown its fault already.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn file(&self, id: u64) -> Arc<dyn BlockFile> {
        Arc::new(SimFile { folder: self.clone(), id })
    }
}

impl fmt::Debug for SimFolder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SimFolder").finish_non_exhaustive()
    }
}

impl Folder for SimFolder {
    fn create(&self, name: &str) -> io::Result<Arc<dyn BlockFile>> {
        let id = self.state().step(StepKind::Make, |state, _| {
            if state.seen.contains_key(name) {
                return Err(io::ErrorKind::AlreadyExists.into());
            }
            let id = state.next_file;
            state.next_file += 1;
            state.files.insert(id, SimContent::default());
            state.change(vec![(name.to_owned(), Some(id))]);
            Ok(id)
        })?;
        Ok(self.file(id))
    }

    fn open(&self, name: &str) -> io::Result<Arc<dyn BlockFile>> {
        let mut state = self.state();
        state.faults.power()?;
        state.named(name)?;
        Ok(self.file(state.seen[name]))
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        self.state().step(StepKind::Make, |state, _| {
            let Some(id) = state.seen.get(from).copied() else {
                return Err(io::ErrorKind::NotFound.into());
            };
            state.change(vec![(from.to_owned(), None), (to.to_owned(), Some(id))]);
            Ok(())
        })
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        self.state().step(StepKind::Roomless, |state, _| {
            if !state.seen.contains_key(name) {
                return Err(io::ErrorKind::NotFound.into());
            }
            state.change(vec![(name.to_owned(), None)]);
            Ok(())
        })
    }

    fn sync(&self) -> io::Result<()> {
        self.state().step(StepKind::Roomless, |state, effect| {
            let count = match effect {
                Effect::Part => state.random.up_to(state.pending.len()),
                Effect::Nothing | Effect::Whole => state.pending.len(),
            };
            for change in state.pending.drain(..count) {
                apply(&change, &mut state.settled);
            }
            Ok(())
        })
    }

    fn list(&self) -> io::Result<Vec<String>> {
        self.state().faults.power()?;
        Ok(self.names())
    }

    fn boot_id(&self) -> io::Result<BootId> {
        Ok(BootId(self.state().boots.to_le_bytes()))
    }

    fn lock(&self) -> io::Result<Option<Box<dyn FolderLock>>> {
        let mut state = self.state();
        state.faults.power()?;
        if state.faults.take_death() {
            state.boots += 1;
        }
        if std::mem::replace(&mut state.is_locked, true) {
            return Ok(None);
        }
        Ok(Some(Box::new(SimLock { folder: self.clone() })))
    }
}

impl State {
    fn step<T>(
        &mut self,
        kind: StepKind,
        run: impl FnOnce(&mut State, Effect) -> io::Result<T>,
    ) -> io::Result<T> {
        let admission = self.faults.admit(kind);
        match (admission.effect, admission.error) {
            (Effect::Nothing, Some(error)) => Err(error),
            (effect, Some(error)) => {
                // The fault hides whatever the operation would have answered.
                let _ = run(self, effect);
                Err(error)
            }
            (effect, None) => run(self, effect),
        }
    }

    fn named(&mut self, name: &str) -> io::Result<&mut SimContent> {
        let id = self.seen.get(name).ok_or(io::ErrorKind::NotFound)?;
        self.files.get_mut(id).ok_or_else(|| io::ErrorKind::NotFound.into())
    }

    fn content(&mut self, id: u64) -> &mut SimContent {
        self.files.get_mut(&id).expect("files are kept for as long as the folder")
    }

    fn change(&mut self, change: Vec<(String, Option<u64>)>) {
        apply(&change, &mut self.seen);
        self.pending.push(change);
    }

    /// How much of `len` bytes or sectors an operation gets done.
    fn part(&mut self, effect: Effect, len: u64) -> u64 {
        match effect {
            Effect::Part => self.random.up_to(usize::try_from(len).unwrap_or(usize::MAX)) as u64,
            Effect::Nothing | Effect::Whole => len,
        }
    }
}

#[derive(Debug)]
struct SimLock {
    folder: SimFolder,
}

impl FolderLock for SimLock {}

impl Drop for SimLock {
    fn drop(&mut self) {
        self.folder.state().is_locked = false;
    }
}

#[derive(Debug)]
struct SimFile {
    folder: SimFolder,
    id: u64,
}

impl BlockFile for SimFile {
    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        let mut state = self.folder.state();
        state.faults.power()?;
        state.content(self.id).read(buf, offset)
    }

    fn write_all_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        let mut state = self.folder.state();
        let kind = if state.content(self.id).has(offset..offset + bytes.len() as u64) {
            StepKind::Overwrite
        } else {
            StepKind::Write
        };
        state.step(kind, |state, effect| {
            let mut len = state.part(effect, bytes.len() as u64);
            if len < bytes.len() as u64 {
                // Sectors are not torn, whatever is done of the write.
                len = ((offset + len) / SECTOR_BYTES * SECTOR_BYTES).saturating_sub(offset);
            }
            let bytes = &bytes[..usize::try_from(len).unwrap_or(0)];
            state.content(self.id).write(bytes, offset);
            Ok(())
        })
    }

    fn punch(&self, range: Range<u64>) -> io::Result<()> {
        self.folder.state().step(StepKind::Roomless, |state, effect| {
            let sectors = range.start / SECTOR_BYTES..range.end / SECTOR_BYTES;
            let aligned =
                range.start.is_multiple_of(PAGE_BYTES) && range.end.is_multiple_of(PAGE_BYTES);
            assert!(aligned, "{range:?} does not free whole pages");
            let count = state.part(effect, sectors.end - sectors.start);
            state.content(self.id).punch(sectors.start..sectors.start + count);
            Ok(())
        })
    }

    fn sync(&self) -> io::Result<()> {
        self.folder.state().step(StepKind::Sync, |state, effect| {
            let content = state.content(self.id);
            match effect {
                Effect::Part => content.fail_sync(),
                Effect::Nothing | Effect::Whole => content.sync(),
            }
            Ok(())
        })
    }

    fn forget_clean_pages(&self) -> io::Result<()> {
        let mut state = self.folder.state();
        state.faults.power()?;
        let State { files, random, .. } = &mut *state;
        files.entry(self.id).or_default().forget_clean(random);
        Ok(())
    }

    fn len(&self) -> io::Result<u64> {
        let mut state = self.folder.state();
        state.faults.power()?;
        Ok(state.content(self.id).len)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.folder.state().step(StepKind::Roomless, |state, _| {
            state.content(self.id).set_len(len);
            Ok(())
        })
    }

    fn next_data(&self, range: Range<u64>) -> io::Result<Option<Range<u64>>> {
        let mut state = self.folder.state();
        state.faults.power()?;
        Ok(state.content(self.id).next_data(range))
    }

    fn allocated_bytes(&self) -> io::Result<u64> {
        let mut state = self.folder.state();
        state.faults.power()?;
        let content = state.content(self.id);
        let mut bytes = 0;
        let mut at = 0;
        while let Some(data) = content.next_data(at..u64::MAX) {
            bytes += data.end - data.start;
            at = data.end;
        }
        Ok(bytes)
    }
}

impl SimContent {
    fn read(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        let end = offset.saturating_add(buf.len() as u64);
        if self.broken.iter().any(|bad| bad.start < end && offset < bad.end) {
            return Err(io::Error::from_raw_os_error(EIO));
        }
        if end > self.len {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        buf.fill(0);
        for_each_sector(offset..end, |number, within, part| {
            if let Some(bytes) = self.sectors.get(&number).and_then(|it| it.seen().as_ref()) {
                buf[part].copy_from_slice(&bytes[within]);
            }
        });
        Ok(())
    }

    fn write(&mut self, bytes: &[u8], offset: u64) {
        let end = offset + bytes.len() as u64;
        self.broken.retain(|bad| end <= bad.start || bad.end <= offset);
        for_each_sector(offset..end, |number, within, part| {
            let sector = self.sectors.entry(number).or_default();
            let mut new = sector.seen().clone().unwrap_or_else(|| Box::new([0; SECTOR_LEN]));
            new[within].copy_from_slice(&bytes[part]);
            sector.push(Some(new));
        });
        if end > self.len {
            self.len_changed(end);
        }
    }

    fn punch(&mut self, sectors: Range<u64>) {
        for (_, sector) in self.sectors.range_mut(sectors) {
            sector.push(None);
        }
    }

    fn set_len(&mut self, len: u64) {
        let last = len / SECTOR_BYTES;
        self.punch(len.div_ceil(SECTOR_BYTES)..u64::MAX);
        if len < self.len
            && let Some(sector) = self.sectors.get_mut(&last)
            && let Some(mut bytes) = sector.seen().clone()
        {
            bytes[usize::try_from(len % SECTOR_BYTES).unwrap_or(0)..].fill(0);
            sector.push(Some(bytes));
        }
        self.len_changed(len);
    }

    fn len_changed(&mut self, len: u64) {
        self.len = len;
        self.lens.push(len);
        self.is_len_dirty = true;
    }

    fn sync(&mut self) {
        for sector in self.sectors.values_mut().filter(|sector| sector.is_dirty) {
            sector.settled = sector.pending.pop().unwrap_or_default();
            sector.pending.clear();
            sector.is_dirty = false;
        }
        self.sectors.retain(|_, sector| sector.settled.is_some() || !sector.pending.is_empty());
        if self.is_len_dirty {
            self.settled_len = self.len;
            self.lens.clear();
            self.is_len_dirty = false;
        }
    }

    /// Linux marks the pages clean, so that no later sync writes them out.
    fn fail_sync(&mut self) {
        self.sectors.values_mut().for_each(|sector| sector.is_dirty = false);
        self.is_len_dirty = false;
    }

    /// What a failed sync left undecided is decided by reading the medium. A file grows there no
    /// later than its bytes can be read: if its length was lost, so were all bytes past the old one.
    fn forget_clean(&mut self, random: &mut SplitMix64) {
        let is_len_undecided = !self.is_len_dirty && !self.lens.is_empty();
        let loses_len = is_len_undecided && random.up_to(1) == 0;
        if is_len_undecided && !loses_len {
            self.settled_len = self.len;
            self.lens.clear();
        }
        let settled_len = self.settled_len;
        for (number, sector) in self.sectors.iter_mut().filter(|(_, sector)| !sector.is_dirty) {
            let is_past = (number + 1) * SECTOR_BYTES > settled_len;
            let most = if loses_len && is_past { 0 } else { sector.pending.len() };
            let version = random.up_to(most);
            if version > 0 {
                sector.settled = sector.pending.swap_remove(version - 1);
            }
            sector.pending.clear();
        }
    }

    /// Whether all of a range is in the file and takes space.
    fn has(&self, range: Range<u64>) -> bool {
        let mut sectors = range.start / SECTOR_BYTES..range.end.div_ceil(SECTOR_BYTES);
        let is_there = |number| self.sectors.get(&number).is_some_and(|it| it.seen().is_some());
        range.end <= self.len && sectors.all(is_there)
    }

    fn next_data(&self, range: Range<u64>) -> Option<Range<u64>> {
        let first = range.start / SECTOR_BYTES;
        let mut pages = self
            .sectors
            .range(first..)
            .filter(|(_, sector)| sector.seen().is_some())
            .map(|(number, _)| number * SECTOR_BYTES / PAGE_BYTES);
        let page = pages.next()?;
        let mut end = page + 1;
        for page in pages {
            if page > end {
                break;
            }
            end = end.max(page + 1);
        }
        let data = (page * PAGE_BYTES).max(range.start)..(end * PAGE_BYTES).min(range.end);
        (data.start < data.end).then_some(data)
    }

    fn after_power_cut(&self, survive: Survive, random: &mut SplitMix64) -> SimContent {
        let len = match survive {
            Survive::Nothing => self.settled_len,
            Survive::Everything => self.len,
            Survive::Random(_) => match random.up_to(self.lens.len()) {
                0 => self.settled_len,
                version => self.lens[version - 1],
            },
        };
        let quarters = random.up_to(4);
        let mut left = SimContent { len, settled_len: len, ..SimContent::default() };
        left.broken.clone_from(&self.broken);
        for (number, sector) in &self.sectors {
            let kept = if sector.pending.is_empty() {
                &sector.settled
            } else if survive == Survive::Everything {
                sector.seen()
            } else if survives(survive, quarters, random) {
                &sector.pending[random.up_to(sector.pending.len() - 1)]
            } else {
                &sector.settled
            };
            let start = number * SECTOR_BYTES;
            if start < len
                && let Some(bytes) = kept
            {
                let mut bytes = bytes.clone();
                let inside = usize::try_from((len - start).min(SECTOR_BYTES)).unwrap_or(0);
                bytes[inside..].fill(0);
                let versions = Versions { settled: Some(bytes), ..Versions::default() };
                left.sectors.insert(*number, versions);
            }
        }
        left
    }
}

impl Versions {
    fn seen(&self) -> &Sector {
        self.pending.last().unwrap_or(&self.settled)
    }

    fn push(&mut self, sector: Sector) {
        self.pending.push(sector);
        self.is_dirty = true;
    }
}

fn apply(change: &[(String, Option<u64>)], names: &mut BTreeMap<String, u64>) {
    for (name, file) in change {
        match file {
            Some(file) => names.insert(name.clone(), *file),
            None => names.remove(name),
        };
    }
}

fn survives(survive: Survive, quarters: usize, random: &mut SplitMix64) -> bool {
    match survive {
        Survive::Nothing => false,
        Survive::Everything => true,
        Survive::Random(_) => random.up_to(3) < quarters,
    }
}

/// Calls `visit` with each sector of a range, the bytes in the sector, and those in the buffer.
fn for_each_sector(range: Range<u64>, mut visit: impl FnMut(u64, Range<usize>, Range<usize>)) {
    let mut at = range.start;
    while at < range.end {
        let number = at / SECTOR_BYTES;
        let end = range.end.min((number + 1) * SECTOR_BYTES);
        let index = |offset: u64| usize::try_from(offset).unwrap_or(usize::MAX);
        let within = index(at - number * SECTOR_BYTES)..index(end - number * SECTOR_BYTES);
        visit(number, within, index(at - range.start)..index(end - range.start));
        at = end;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn byte(file: &Arc<dyn BlockFile>, offset: u64) -> u8 {
        let mut byte = [0; 1];
        file.read_exact_at(&mut byte, offset).unwrap();
        byte[0]
    }

    /// Each sector of what was not synced is some version, and every version comes up.
    #[test]
    fn sectors_survive_by_themselves() {
        let folder = SimFolder::new(3);
        let file = folder.create("f").unwrap();
        file.write_all_at(&[1; 8192], 0).unwrap();
        file.sync().unwrap();
        folder.sync().unwrap();
        file.write_all_at(&[2; 4096], 0).unwrap();
        file.punch(0..4096).unwrap();
        file.write_all_at(&[3; 100], 700).unwrap();
        let mut seen = std::collections::BTreeSet::new();
        for seed in 0..200 {
            let left = folder.after_power_cut(Survive::Random(seed)).open("f").unwrap();
            assert_eq!(byte(&left, 4096), 1);
            seen.insert((byte(&left, 0), byte(&left, 700)));
        }
        for first in [0, 1, 2] {
            for second in [0, 1, 2, 3] {
                assert!(seen.contains(&(first, second)), "{first} {second} in {seen:?}");
            }
        }
        assert_eq!(seen.len(), 12);
        assert_eq!(byte(&file, 0), 0);
        assert_eq!(file.allocated_bytes().unwrap(), 8192);
    }

    #[test]
    fn a_failed_sync_loses_its_pages() {
        let folder = SimFolder::new(3);
        let file = folder.create("f").unwrap();
        folder.sync().unwrap();
        file.set_len(8192).unwrap();
        file.sync().unwrap();
        file.write_all_at(&[2; 4096], 0).unwrap();
        folder.fail_at(1, io::ErrorKind::Other);
        file.sync().unwrap_err();
        file.sync().unwrap();
        let left = folder.after_power_cut(Survive::Nothing).open("f").unwrap();
        assert_eq!((byte(&left, 0), byte(&file, 0)), (0, 2));
        file.forget_clean_pages().unwrap();
        let seen = byte(&file, 0);
        let left = folder.after_power_cut(Survive::Nothing).open("f").unwrap();
        assert_eq!(byte(&left, 0), seen);
    }
}
