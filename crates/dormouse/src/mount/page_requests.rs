//! The pages of Cloud Hypervisors that restore by descriptors: the connection on which one asks comes from
//! whoever wakes it, and is answered here until it has all pages.
//!
//! A holder of the VM's own keeps the connection, what is noted of it, the memory and the VMM's pidfd, so
//! that a successor of this process goes on. A guest whose page cannot be had is stopped.

use std::collections::HashSet;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Instant;

use anyhow::{Context, Result};
use dormouse_store::name::Name;
use dormouse_store::reader::ImageReader;
use dormouse_store::store::Store;
use dormouse_sys::peer::Peer;
use dormouse_vmm::cloud_hypervisor::offload::{MemorySource, PageRequests, PagesOfSlot};

use crate::exit::{Fault, Kind};
use crate::live::LiveFolder;
use crate::live::memory::{Keeping, KeptPages, Successor};
use crate::vm::Record;

/// An image as the source of pages.
pub(crate) struct ImagePages(pub(crate) ImageReader);

impl MemorySource for ImagePages {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        self.0.read_at(buffer, offset).map_err(io::Error::other)
    }
}

/// What was read for guests that asked for it.
#[derive(Debug, Default)]
pub(super) struct Asked {
    /// Of those guests that have all by now.
    pub(super) pages: AtomicU64,
    pub(super) bytes: AtomicU64,
    pub(super) nanoseconds: AtomicU64,
}

/// The pages of an image, counted.
struct CountedPages {
    pages: ImagePages,
    asked: Arc<Asked>,
}

impl MemorySource for CountedPages {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        let begun = Instant::now();
        self.pages.read_at(buffer, offset)?;
        let nanoseconds = u64::try_from(begun.elapsed().as_nanos()).unwrap_or(u64::MAX);
        self.asked.bytes.fetch_add(buffer.len() as u64, Ordering::Relaxed);
        self.asked.nanoseconds.fetch_add(nanoseconds, Ordering::Relaxed);
        Ok(())
    }
}

/// All of a store.
#[derive(Debug)]
pub(super) struct Restores {
    store: Store,
    store_dir: PathBuf,
    /// The VMs whose pages are served.
    served: Arc<Mutex<HashSet<Name>>>,
    asked: Arc<Asked>,
}

impl Restores {
    pub(super) fn new(store: Store, store_dir: &Path) -> Restores {
        let (served, asked) = (Arc::default(), Arc::default());
        Restores { store, store_dir: store_dir.to_owned(), served, asked }
    }

    /// What was done for all VMs there were.
    pub(super) fn asked(&self) -> &Asked {
        &self.asked
    }

    /// Whether a VM has not all of its pages.
    pub(super) fn has(&self, live: &Name) -> bool {
        self.served().contains(live)
    }

    /// Serves the pages of a VM that wakes. The last descriptor is its VMM's pidfd.
    pub(super) fn begin(
        &self,
        live: &Name,
        slots: Vec<PagesOfSlot>,
        descriptors: Vec<OwnedFd>,
    ) -> Result<()> {
        let folder = LiveFolder::new(&self.store_dir, live);
        let keeping = Keeping::at(holder(&folder));
        keeping.start(&Successor::default())?;
        keeping.keep_pages(&slots, &descriptors).context("the guest's pages cannot be kept")?;
        self.serve(&folder, keeping, KeptPages { slots, descriptors })
    }

    /// Goes on with a VM that a predecessor served, if it did.
    pub(super) fn take_over(&self, folder: &LiveFolder) -> Result<()> {
        let keeping = Keeping::at(holder(folder));
        let Some(kept) = keeping.take_pages()? else { return Ok(()) };
        keeping.mind_us()?;
        self.serve(folder, keeping, kept)
    }

    fn serve(&self, folder: &LiveFolder, keeping: Keeping, kept: KeptPages) -> Result<()> {
        keeping.mind(Successor::default());
        let KeptPages { slots, mut descriptors } = kept;
        let pidfd = descriptors.pop().context("no VMM comes with the pages")?;
        let peer = Peer::from_pidfd(pidfd).context("the VMM is gone")?;
        let live = folder.live.clone();
        let served = self.image(folder).and_then(|image| {
            let requests = PageRequests::adopt(slots, descriptors)?;
            Ok((CountedPages { pages: image, asked: Arc::clone(&self.asked) }, requests))
        });
        let (image, requests) = served.inspect_err(|error| {
            tracing::error!(%live, error = &**error, "its pages cannot be served; it is stopped");
            stop(&live, &peer);
        })?;
        if !self.served().insert(live.clone()) {
            let message = format!("the pages of {live} are served already");
            return Err(Fault::new(Kind::Busy, message).into());
        }
        let (all, asked) = (Arc::clone(&self.served), Arc::clone(&self.asked));
        let serving = move || {
            match requests.serve(&image) {
                Ok(pages) => {
                    tracing::debug!(%live, asked = pages, "it has all pages");
                    asked.pages.fetch_add(pages, Ordering::Relaxed);
                }
                Err(error) => {
                    tracing::error!(%live, %error, "the guest is stopped");
                    stop(&live, &peer);
                }
            }
            if let Err(error) = keeping.forget_pages() {
                tracing::debug!(%live, error = &*error, "a keeper stays as long as the VMM");
            }
            all.lock().unwrap_or_else(PoisonError::into_inner).remove(&live);
        };
        let thread = thread::Builder::new().name("page-requests".to_owned()).spawn(serving);
        if let Err(error) = thread {
            self.served().remove(&folder.live);
            return Err(error).context("cannot start a thread");
        }
        Ok(())
    }

    fn image(&self, folder: &LiveFolder) -> Result<ImagePages> {
        let record = Record::read(folder.path())?;
        let woken = record.as_ref().and_then(Record::woken);
        let woken = woken.with_context(|| format!("the VM {} does not wake", folder.live))?;
        let image = woken.image.open(&self.store, &folder.live)?;
        Ok(ImagePages(image.context("memory that lies over no image")?))
    }

    fn served(&self) -> MutexGuard<'_, HashSet<Name>> {
        // Names come and go whole.
        self.served.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The socket of the process that keeps its descriptors.
fn holder(folder: &LiveFolder) -> PathBuf {
    folder.file("vmm/pages")
}

/// Stops a VM that nobody could go on with.
pub(super) fn give_up(folder: &LiveFolder) {
    let live = &folder.live;
    let kept = Keeping::at(holder(folder)).take_pages();
    let peer = kept.map(|kept| kept.and_then(|mut kept| kept.descriptors.pop()));
    match peer.map(|pidfd| pidfd.map(Peer::from_pidfd)) {
        Ok(None) => {}
        Ok(Some(Ok(peer))) => {
            tracing::error!(%live, "its pages cannot be served; its guest is stopped");
            stop(live, &peer);
        }
        // It has ended.
        Ok(Some(Err(error))) => tracing::debug!(%live, %error, "its VMM is gone"),
        Err(error) => {
            tracing::error!(%live, error = &*error, "its guest waits for its pages");
        }
    }
}

fn stop(live: &Name, peer: &Peer) {
    if let Err(error) = peer.kill() {
        tracing::error!(%live, %error, "and cannot be stopped");
    }
}
