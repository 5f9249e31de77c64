//! A wake of a Cloud Hypervisor that handed its snapshot over by descriptors: it is handed back. Its memory
//! is new descriptors that the data plane fills as pages are asked for; or all of it is copied first, where
//! that version would show its guest pages that are not there.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use dormouse_store::manifest::Manifest;
use dormouse_store::name::{ImageName, Name};
use dormouse_store::reader::ImageReader;
use dormouse_vmm::capabilities::Capabilities;
use dormouse_vmm::cloud_hypervisor::offload::{
    Memory, OnDemand, PageRequests, Restore, check_shmem_thp, rewrite,
};
use dormouse_vmm::cloud_hypervisor::state::slots;
use dormouse_vmm::cloud_hypervisor::{CloudHypervisor, STATE};
use dormouse_vmm::deadline::Timeouts;
use dormouse_vmm::kind::{Kind as VmmKind, Version};
use dormouse_vmm::launch::Places;
use dormouse_vmm::vmm::{Drive, Then, Vmm};

use super::WakeOptions;
use crate::exit::{Fault, Kind};
use crate::mount::page_requests::ImagePages;
use crate::vm::plane::Plane;

/// The state image that a snapshot by descriptors has, and no other.
pub(crate) const MIGRATION_CONFIG: &str = "migration-config.json";

/// Slots of memory whose descriptors a holder keeps, beside three others.
const SLOTS_KEPT_MAX: usize = 13;

/// A VM whose VMM waits for its state.
#[derive(Debug)]
pub(super) struct Loading<'a> {
    pub(super) live: &'a Name,
    pub(super) pid: u32,
    pub(super) plane: &'a Plane,
    pub(super) places: &'a Places,
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

/// Hands it back. The guest stays paused, and asks for its pages from then on.
pub(super) fn load(
    state_dir: &Path,
    image: ImageReader,
    vm: &Loading<'_>,
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
    let mut ch = CloudHypervisor::connect(&vm.places.api, Timeouts::STANDARD)?;
    let socket = vm.places.folder.join("offload");
    let image = ImagePages(image);
    let mut serve = |requests: PageRequests| {
        vm.plane.serve_pages(vm.live, vm.pid, &requests).map_err(Into::into)
    };
    let is_lazy = slots(&config)?.len() <= SLOTS_KEPT_MAX && check_shmem_thp(ch.version()).is_ok();
    let memory = match is_lazy {
        true => Memory::OnDemand(OnDemand::Shared, &mut serve),
        false => Memory::Copied(&image),
    };
    let then = Then::StayPaused;
    let restore = Restore { config: &config, state: &state, memory, then };
    Ok(ch.restore_by_descriptors(&socket, restore)?)
}
