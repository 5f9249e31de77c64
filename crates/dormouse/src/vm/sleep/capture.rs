//! A guest that ends, and whose memory its VMM writes whole since nobody else takes it: it was booted, or
//! is a Cloud Hypervisor's. It goes into a capture of the data plane, which deduplicates and compresses it
//! as it comes, and lies nowhere else. A guest that goes on would wait for that, so its memory is written
//! to a file, as fast as the page cache takes it, and stored from there while it runs.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use dormouse_vmm::kind::Kind as VmmKind;
use dormouse_vmm::vmm::{MemoryTo, Saved};

use super::Falling;
use crate::live::{LiveFolder, remove_tree};
use crate::mount::captures::TakenCapture;
use crate::vm::House;
use crate::vm::plane::Plane;

impl Falling<'_> {
    /// Has the VMM write its memory into a capture, and takes that. A Cloud Hypervisor's state is in it, too.
    pub(super) fn save_into_capture(&mut self, staging: &Path) -> Result<Saved> {
        let folder = Plane::find_or_start(&self.house.dir)?.capture(&self.folder.live);
        // Of a sleep that was killed or tried again.
        remove_tree(&folder)?;
        fs::create_dir(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
        if let Some(over) = &self.record.over
            && let Err(error) = fs::write(folder.join("parent"), over)
        {
            tracing::debug!(over, %error, "blocks are looked up that could have been compared");
        }
        let saved = match self.record.kind() {
            VmmKind::CloudHypervisor => self.vmm.save(&folder, MemoryTo::Inside)?,
            _ => self.vmm.save(staging, MemoryTo::File(&folder.join("memory")))?,
        };
        self.taken = Some(TakenCapture::take(&folder, &self.house.store)?);
        Ok(saved)
    }
}

/// Removes what a sleep of a VM may have captured. It is gone with the data plane in any case.
pub(crate) fn forget(house: &House, folder: &LiveFolder) {
    let capture = Plane::of(&house.dir).capture(&folder.live);
    if let Err(error) = remove_tree(&capture) {
        tracing::warn!(error = &*error, "a capture stays");
    }
}
