//! A wake of a Cloud Hypervisor that handed its snapshot over by descriptors: it is handed back. All of
//! memory is copied to new descriptors before the guest goes on, and the VMM alone keeps them.

use std::fs;
use std::io;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result};
use dormouse_store::manifest::Manifest;
use dormouse_store::name::ImageName;
use dormouse_store::reader::ImageReader;
use dormouse_vmm::capabilities::Capabilities;
use dormouse_vmm::cloud_hypervisor::offload::{MemorySource, Restore, Transfer, rewrite};
use dormouse_vmm::cloud_hypervisor::{CloudHypervisor, STATE};
use dormouse_vmm::deadline::Timeouts;
use dormouse_vmm::kind::{Kind as VmmKind, Version};
use dormouse_vmm::launch::Places;
use dormouse_vmm::vmm::{Drive, Then};

use super::WakeOptions;
use crate::exit::{Fault, Kind};

/// The state image that a snapshot by descriptors has, and no other.
pub(crate) const MIGRATION_CONFIG: &str = "migration-config.json";

struct Image(ImageReader);

impl MemorySource for Image {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        self.0.read_at(buffer, offset).map_err(io::Error::other)
    }
}

/// Refuses a version that cannot take such a snapshot back, before anything is made.
pub(super) fn check(manifest: &Manifest, version: Version) -> Result<()> {
    let is_one = manifest.images.iter().any(
        |entry| matches!(&entry.image, ImageName::State(name) if name.as_str() == MIGRATION_CONFIG),
    );
    if is_one && !Capabilities::of(VmmKind::CloudHypervisor, version).offload {
        let message = format!(
            "{} was handed over by descriptors, and Cloud Hypervisor {version} cannot take it back; \
             53 and later can",
            manifest.display_name()
        );
        return Err(Fault::new(Kind::Refused, message).into());
    }
    Ok(())
}

/// Whether the state in a folder is such a one.
pub(super) fn is_in(state_dir: &Path) -> bool {
    state_dir.join(MIGRATION_CONFIG).exists()
}

/// Hands it back. The guest stays paused.
pub(super) fn load(
    state_dir: &Path,
    image: ImageReader,
    places: &Places,
    drives: &[Drive],
    options: &WakeOptions,
) -> Result<()> {
    let read = |name: &str| {
        let path = state_dir.join(name);
        fs::read(&path).with_context(|| format!("cannot read {}", path.display()))
    };
    let config =
        rewrite(&read(MIGRATION_CONFIG)?, drives, &options.networks, options.vsock.as_deref())?;
    let state = read(STATE)?;
    let mut ch = CloudHypervisor::connect(&places.api, Timeouts::STANDARD)?;
    let socket = places.folder.join("offload");
    ch.restore_by_descriptors(
        &socket,
        &Restore {
            config: &config,
            state: &state,
            memory: Arc::new(Image(image)),
            transfer: Transfer::Copied,
            then: Then::StayPaused,
        },
    )?;
    Ok(())
}
