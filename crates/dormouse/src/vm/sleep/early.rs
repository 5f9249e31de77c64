//! Memory that is copied while QEMU still writes its state, so that its guest waits for the longer of
//! the two and not for both.
//!
//! The guest is paused, but a device may write to its memory until the state has that device: what comes
//! in for a serial port, for example. QEMU logs such writes from before the first page passes, and passes
//! a page again that was written to since. So the copy begins with the first page, and **counts only if no
//! page passed twice**; else the memory is copied once more, when all is written.

use std::io;
use std::path::Path;
use std::sync::mpsc::{Sender, channel};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};
use dormouse_vmm::vmm::{MemoryTo, PAGE_BYTES, PageSink, PagesPassed, Saved};
use uuid::Uuid;

use super::Falling;
use crate::live::control::{Request, ask_within};
use crate::live::{EarlyCopy, LiveFolder, MemoryFrom};

/// How long a copy may take.
const COPY_TIMEOUT: Duration = Duration::from_secs(30);

/// Drops the pages that pass, and tells of the first.
#[derive(Debug)]
struct Passing {
    first: Option<Sender<()>>,
}

impl Passing {
    fn pass(&mut self) {
        if let Some(first) = self.first.take() {
            // Nobody listens any more where copying could not even begin.
            let _ = first.send(());
        }
    }
}

impl PageSink for Passing {
    fn page(&mut self, _offset: u64, _bytes: &[u8; PAGE_BYTES]) -> io::Result<()> {
        self.pass();
        Ok(())
    }

    fn zero(&mut self, _offset: u64) -> io::Result<()> {
        self.pass();
        Ok(())
    }
}

impl Falling<'_> {
    /// Has QEMU write its state without its memory, and whoever has the VM's disks copy that meanwhile.
    /// Sets the copy that counts, if there is one.
    pub(super) fn save_and_copy(&mut self, staging: &Path, memory: &MemoryFrom) -> Result<Saved> {
        let id = Uuid::new_v4();
        let early = EarlyCopy { id, memory: memory.clone() };
        let control = self.folder.control();
        let (first, begun) = channel();
        let (saved, copied) = thread::scope(|scope| {
            let copying = scope.spawn(move || -> Result<bool> {
                if begun.recv().is_err() {
                    return Ok(false);
                }
                let told = ask_within(&control, &Request::Copy(Box::new(early)), COPY_TIMEOUT)?;
                Ok(told.is_some_and(|told| told["is_copied"] == true))
            });
            let mut passing = Passing { first: Some(first) };
            let saved = self.vmm.save(staging, MemoryTo::Pages(&mut passing));
            drop(passing);
            let copied = copying.join();
            (saved, copied.unwrap_or_else(|_| Err(anyhow::anyhow!("copying panicked"))))
        });
        let copied = copied.unwrap_or_else(|error| {
            // It is copied when all is written, and what is wrong told then.
            tracing::debug!(error = &*error, "memory is not copied yet");
            false
        });
        let saved = saved?;
        let passed = saved.pages.context("QEMU's memory did not pass")?;
        self.copy = counts(copied, passed).then_some(id);
        tracing::debug!(was_copied = self.copy.is_some(), "QEMU has written its state");
        Ok(saved)
    }
}

/// Whether a copy has what was in memory when all was written.
fn counts(is_copied: bool, passed: PagesPassed) -> bool {
    is_copied && passed.each_once()
}

/// Has a copy forgotten that no commit came for.
pub(super) fn forget(folder: &LiveFolder) {
    if let Err(error) = ask_within(&folder.control(), &Request::DropCopy, COPY_TIMEOUT) {
        tracing::debug!(error = &*error, "a copy of memory stays until the next sleep");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_copy_counts_only_if_no_page_passed_twice() {
        let once = PagesPassed { data: 3, zero: 1, total: 4 };
        let twice = PagesPassed { data: 4, zero: 1, total: 4 };
        let none = PagesPassed { data: 0, zero: 0, total: 4 };
        assert!(counts(true, once));
        for (is_copied, passed) in [(false, once), (true, twice), (true, none)] {
            assert!(!counts(is_copied, passed), "{is_copied} {passed:?}");
        }
    }
}
