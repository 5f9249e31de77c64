//! What of the host a VM that wakes is given, other than the snapshot says.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use dormouse_store::name::Name;
use dormouse_vmm::kind::Kind as VmmKind;
use dormouse_vmm::launch::Places;
use dormouse_vmm::vmm::Network;

use crate::exit::{Fault, Kind};
use crate::vm::guest::Guest;

/// What a wake is to be like.
#[derive(Clone, Debug, Default)]
pub(crate) struct WakeOptions {
    /// The guest, for a snapshot that has none, or to replace what it has.
    pub(crate) guest: Option<Guest>,

    /// The program of the VMM, to replace what the guest says.
    pub(crate) vmm: Option<PathBuf>,

    /// Network interfaces that have another device of the host now.
    pub(crate) networks: Vec<Network>,

    /// The socket of its vsock device, if it has one.
    pub(crate) vsock: Option<PathBuf>,
}

impl WakeOptions {
    /// What a VM of several gets: its name and folder stand where `{name}` and `{folder}` did.
    pub(super) fn of_one(&self, places: &Places) -> Result<WakeOptions> {
        let mut options = self.clone();
        for network in &mut options.networks {
            network.host_device = places.fill(&network.host_device)?;
        }
        if let Some(vsock) = &mut options.vsock {
            let text = vsock.to_str().context("the path of a vsock socket is not UTF-8")?;
            *vsock = places.fill(text)?.into();
        }
        Ok(options)
    }

    /// Refuses what a VMM has no way to be told, or what two VMs cannot both have.
    pub(super) fn check(&self, guest: &Guest, names: &[Name]) -> Result<()> {
        if guest.launch.vmm == VmmKind::Qemu {
            let refuse = |what: &str| {
                let message = format!(
                    "QEMU has its {what} by its arguments: give another guest with --guest"
                );
                Err(Fault::new(Kind::Refused, message).into())
            };
            if !self.networks.is_empty() {
                return refuse("network interfaces");
            }
            if self.vsock.is_some() && !guest.launch.mentions("{vsock}") {
                return refuse("vsock device");
            }
        }
        if names.len() < 2 {
            return Ok(());
        }
        let same = |text: &str| !text.contains("{name}") && !text.contains("{folder}");
        let devices = self.networks.iter().map(|network| network.host_device.as_str());
        if let Some(device) = devices.into_iter().find(|device| same(device)) {
            let message = format!(
                "{device} would be the device of {} VMs; `{{name}}` in it is each one's",
                names.len()
            );
            return Err(Fault::usage(message).into());
        }
        match self.vsock.as_deref().and_then(Path::to_str) {
            Some(path) if path.starts_with('/') && same(path) => {
                let message = format!(
                    "{path} would be the vsock socket of {} VMs; `{{name}}` in it is each one's, and a \
                     path that is not absolute is in each one's folder",
                    names.len()
                );
                Err(Fault::usage(message).into())
            }
            _ => Ok(()),
        }
    }
}
