//! The guest in a double: a small VMM's memory and some disks, worked on while it runs.
//!
//! One lock for all of it. A guest whose page is not served holds it, so that its VMM's calls hang
//! as those of a real one do.

use std::fs::File;
use std::io::Write;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::disk::{Disk, DiskState};
use crate::vmm::{
    Backing, Config, Cpus, EXIT_SETUP, Mix, PAGE_BYTES, PageKind, RegionConfig, Vmm, fail,
};

/// A disk had not what was written to it.
pub const EXIT_WRONG_DISK: i32 = 6;

/// Operations between two looks at whether to go on.
const BATCH_OPERATIONS: u64 = 40;
/// And how long it rests then, so that fifty of them can be on one machine.
const REST: Duration = Duration::from_millis(5);
/// Batches for each line of the guest's serial line.
const BATCHES_PER_LINE: u64 = 20;

/// What a guest is, and where it stands; with what its oracle knows, all that a state needs.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct GuestState {
    pub(super) seed: u64,
    pub(super) region_bytes: Vec<u64>,
    pub(super) cpus: usize,
    pub(super) disks: Vec<DiskState>,
    /// Batches of work so far.
    pub(super) count: u64,
}

/// A guest that is there.
#[derive(Clone)]
pub(super) struct Guest {
    inner: Arc<Mutex<Inner>>,
}

pub(super) struct Inner {
    pub(super) vmm: Vmm,
    pub(super) state: GuestState,
    pub(super) disks: Vec<Disk>,
    pub(super) is_running: bool,
}

impl Guest {
    /// Makes one: as it boots, or with what its oracle knew.
    pub(super) fn start(
        state: GuestState,
        backing: Backing,
        oracle: Option<&[u8]>,
        console: Option<PathBuf>,
    ) -> Result<Guest> {
        let variation = u64::from(std::process::id()) << 20;
        let region =
            |bytes: &u64| RegionConfig { pages: bytes / PAGE_BYTES as u64, kind: PageKind::Small };
        let config = Config {
            seed: state.seed,
            variation,
            regions: state.region_bytes.iter().map(region).collect(),
            backing,
            threads: state.cpus,
            cpus: Cpus::Threads,
            mix: Mix::KEEPING,
            hang_ms: Config::HANG_MS,
        };
        let vmm = Vmm::start_from(&config, oracle)?;
        let open = |disk: &DiskState| Disk::open(disk.clone(), state.seed, variation);
        let disks = state.disks.iter().map(open).collect::<Result<_>>()?;
        let inner = Inner { vmm, state, disks, is_running: false };
        let guest = Guest { inner: Arc::new(Mutex::new(inner)) };
        let working = guest.clone();
        let console = console.map(|path| File::options().append(true).open(path)).transpose()?;
        std::thread::Builder::new()
            .name("guest".to_owned())
            .spawn(move || working.work(console))
            .context("cannot start a guest")?;
        Ok(guest)
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn work(&self, mut console: Option<File>) {
        loop {
            let mut inner = self.lock();
            if inner.is_running {
                if let Err(error) = inner.vmm.work(BATCH_OPERATIONS) {
                    fail(EXIT_SETUP, &format!("{error:#}"));
                }
                for disk in &mut inner.disks {
                    sound(disk.step());
                }
                inner.state.count += 1;
                let count = inner.state.count;
                if count.is_multiple_of(BATCHES_PER_LINE)
                    && let Some(console) = &mut console
                {
                    // Nobody needs to read a guest's console.
                    drop(writeln!(console, "count {}", count / BATCHES_PER_LINE));
                }
            }
            drop(inner);
            std::thread::sleep(REST);
        }
    }
}

impl Inner {
    /// Where it stands, its disks drained.
    pub(super) fn saved(&mut self) -> GuestState {
        for disk in &mut self.disks {
            sound(disk.drain());
        }
        let disks = self.disks.iter().map(|disk| disk.state.clone()).collect();
        GuestState { disks, ..self.state.clone() }
    }

    /// Reads pages of a list in JSON, and says in JSON what each took.
    pub(super) fn touch(&mut self, pages: &Value) -> Result<Value> {
        let pages = Vec::<u64>::deserialize(pages).context("no list of pages")?;
        Ok(serde_json::to_value(self.vmm.touch(pages)?)?)
    }

    /// Checks everything.
    pub(super) fn verify(&mut self) -> Result<()> {
        self.vmm.verify()?;
        for disk in &mut self.disks {
            sound(disk.drain().and_then(|()| disk.verify()));
        }
        Ok(())
    }

    /// Reads pages one after the other, `each` takes them.
    pub(super) fn dump(&self, mut each: impl FnMut(u64, &[u8]) -> Result<()>) -> Result<()> {
        const PIECE_PAGES: u64 = 256;
        let memory = &self.vmm.guest.memory;
        for range in memory.page_ranges() {
            let mut page = range.start;
            while page < range.end {
                let count = usize::try_from((range.end - page).min(PIECE_PAGES))?;
                let mut bytes = vec![0; count * PAGE_BYTES];
                memory.dump(page, &mut bytes)?;
                each(page, &bytes)?;
                page += count as u64;
            }
        }
        Ok(())
    }
}

/// Ends the process where a disk is wrong.
fn sound(result: Result<()>) {
    if let Err(error) = result {
        fail(EXIT_WRONG_DISK, &format!("{error:#}"));
    }
}
