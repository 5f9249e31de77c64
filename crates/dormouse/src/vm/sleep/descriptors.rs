//! A sleep of a Cloud Hypervisor by descriptors: its memory goes from them into the commit, and lies in
//! no file in between.
//!
//! - **The VMM may forget its guest when the snapshot is durable, and not before**: its last command is
//!   answered when the commit returned. If that failed it is told so, and keeps its guest, paused.
//! - Descriptors reach the process that has the disks beside the request for the commit. A number and
//!   a path in `/proc` could be another process's by the time they are opened.
//! - Whoever is killed in between leaves a paused guest: the VMM hears of no success. The commit goes
//!   on or not, and what came of it decides, as for every other sleep.

use std::fs;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, Error, Result, anyhow};
use dormouse_store::progress::Job;
use dormouse_vmm::cloud_hypervisor::offload::{PRESERVES_SOURCE, Received, Source};
use dormouse_vmm::cloud_hypervisor::{CloudHypervisor, STATE};
use dormouse_vmm::deadline::Timeouts;
use dormouse_vmm::launch::Transfer;
use dormouse_vmm::vmm::Saved;
use serde_json::Value;

use super::{Falling, Slept, Then, Title, still_restores, store};
use crate::live::{DescribedSlot, MemoryFrom};
use crate::vm::api_of;
use crate::vm::wake::{MIGRATION_CONFIG, write_private};

impl Falling<'_> {
    /// Whether it does. A version that ends when it has handed its guest over writes files for a guest
    /// that is to go on.
    pub(super) fn goes_by_descriptors(&self) -> bool {
        let is_wanted = self.record.guest.launch.transfer == Transfer::Descriptors;
        is_wanted && (self.then == Then::End || self.vmm.version() >= PRESERVES_SOURCE)
    }

    /// The rest of a sleep, once the guest is paused.
    pub(super) fn fall_by_descriptors(&mut self, title: Title<'_>, job: Job<'_>) -> Result<Slept> {
        let source = match self.then {
            Then::End => Source::Ends,
            Then::GoOn => Source::Stays,
        };
        let mut ch = CloudHypervisor::connect(&api_of(self.folder), Timeouts::STANDARD)
            .context("cannot reach the VMM")?;
        let socket = self.folder.file("vmm/offload");
        // Of a sleep that was killed.
        if let Err(error) = fs::remove_file(&socket)
            && error.kind() != std::io::ErrorKind::NotFound
        {
            return Err(error).with_context(|| format!("cannot remove {}", socket.display()));
        }
        let mut vmm_time = None;
        let mut committed: Option<Result<Value>> = None;
        let first = Instant::now();
        let handed = loop {
            let handed = ch.snapshot_by_descriptors(&socket, source, &mut |received| {
                vmm_time = Some(self.begun.elapsed());
                let result = self.commit(title, received, job);
                let told = match &result {
                    Ok(_) => Ok(()),
                    Err(error) => Err(format!("{error:#}").into()),
                };
                committed = Some(result);
                told
            });
            match handed.map_err(Error::from) {
                Err(error) if committed.is_none() && still_restores(&error, first) => {
                    self.rest()?;
                }
                handed => break handed,
            }
        };
        let committed = match (committed, handed) {
            (Some(committed), handed) => {
                let value = committed?;
                if let Err(error) = handed {
                    // It is there, and the VMM is ended or let go on as after every other sleep.
                    tracing::warn!(
                        error = &*error,
                        "the VMM was not told that its snapshot is stored"
                    );
                }
                value
            }
            (None, Err(error)) => {
                return Err(error.context("having the VMM hand its memory over"));
            }
            (None, Ok(_)) => return Err(anyhow!("a snapshot by descriptors without a commit")),
        };
        let durable = self.begun.elapsed();
        if self.then == Then::GoOn {
            // Where this fails the snapshot is there all the same: the caller finds it.
            self.goes_on = self.vmm.resume().is_ok();
        }
        self.frozen = Some(self.begun.elapsed());
        self.slept(&committed, vmm_time.unwrap_or_default(), durable)
    }

    fn commit(&self, title: Title<'_>, received: &Received, job: Job<'_>) -> Result<Value> {
        job.check()?;
        let staging = self.folder.file("vmm/save");
        for (file, bytes) in [(MIGRATION_CONFIG, &received.config), (STATE, &received.state)] {
            write_private(&staging.join(file), bytes)?;
        }
        let saved = Saved {
            files: vec![MIGRATION_CONFIG.to_owned(), STATE.to_owned()],
            memory_file: None,
            memory: received.regions(),
            vmm_time: self.begun.elapsed(),
            pages: None,
        };
        let slots = received
            .slots
            .iter()
            .map(|(slot, _)| DescribedSlot { file_offset: slot.file_offset, size: slot.size });
        let memory = MemoryFrom::Descriptors {
            slots: slots.collect(),
            image: self.record.woken().map(|woken| woken.image.clone()),
        };
        let mut wanted = self.wanted(title, &staging, &saved, memory)?;
        let copies: std::io::Result<Vec<_>> =
            received.slots.iter().map(|(_, file)| file.try_clone().map(Into::into)).collect();
        wanted.descriptors = Arc::new(copies.context("cannot copy a descriptor")?);
        store(self.house, self.folder, &wanted, &mut |_| {}, job)
    }
}
