//! Snapshots by descriptors: Cloud Hypervisor's local migration, with us as the peer that it takes
//! for another Cloud Hypervisor (its "offload daemon", since version 53).
//!
//! ```text
//! snapshot   it → us   Start  MemoryFd…  Config  State  Complete | CompletePaused
//! restore    us → it   Start  [MemoryFd…]  Config  State  Complete | CompletePaused
//!            it → us   PageFault…, on a second connection that we open behind Config
//! ```
//!
//! - **The last command of a snapshot is answered after the commit**, and only if that was durable:
//!   Cloud Hypervisor may exit upon the answer, and its memory with it. It writes no file.
//! - Pages are served by whoever is given the connection and may be killed: see [`PageRequests`].
//! - Memory in the image: the slots one behind the other, in the order of the configuration.
//!
//! Wants a guest whose memory is shared (`--memory shared=on`), for a snapshot. Sources: Cloud
//! Hypervisor's `vm-migration/src/protocol.rs`, `docs/live_migration.md`.

pub mod frame;
mod pages;
mod receive;
mod send;
mod wire;

use std::fs::File;
use std::io;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::CloudHypervisor;
use super::state::Slot;
use crate::deadline::Deadline;
use crate::error::{Error, ErrorKind, Result};
use crate::http::{Http, Method};
use crate::kind::Version;
use crate::vmm::{Drive, MemoryRegion, Network, Then, Vmm};

pub use pages::{Faults, PageRequests, PagesOfSlot};
pub use receive::receive;
pub use send::send;

/// Since when there is an offload peer, and the source can be kept.
pub const PRESERVES_SOURCE: Version = Version::new(54, 0, 0);

/// The version that leaves pages of huge shared memory unfilled (#8663).
const THP_BUG: Version = Version::new(53, 0, 0);

const SHMEM_THP: &str = "/sys/kernel/mm/transparent_hugepage/shmem_enabled";

/// Bytes of memory that are copied at once: a huge page.
const PIECE_BYTES: u64 = 2 << 20;

/// Slots of memory. A guest has one for each side of a hole, and for what is plugged.
pub const SLOTS_MAX: usize = 512;

/// What Cloud Hypervisor handed over.
#[derive(Debug)]
pub struct Received {
    /// Its configuration (`VmMigrationConfig`), for a restore by descriptors.
    pub config: Vec<u8>,
    /// Its state.
    pub state: Vec<u8>,
    /// Its memory, in the order of the image.
    pub slots: Vec<(Slot, File)>,
    /// Whether the guest ran when it was asked.
    pub was_running: bool,
}

impl Received {
    /// How memory lies in the image.
    pub fn regions(&self) -> Vec<MemoryRegion> {
        regions(self.slots.iter().map(|(slot, _)| slot))
    }
}

/// Makes what was received durable. Cloud Hypervisor is told that it may forget it when this
/// returned `Ok`, and that the snapshot failed otherwise.
pub type Commit<'a> =
    dyn FnMut(&Received) -> std::result::Result<(), Box<dyn std::error::Error + Send + Sync>> + 'a;

/// Whether the guest stays.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// It stays, paused (since version 54).
    Stays,
    /// Cloud Hypervisor ends.
    Ends,
}

/// A guest's memory, for a restore. Asked by one thread at a time.
pub trait MemorySource: Send + Sync {
    /// Fills a buffer from an offset of the image, or fails.
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()>;
}

/// How memory gets to a guest whose pages are asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnDemand {
    /// Pages are written to descriptors. Shared memory.
    Shared,
    /// Pages are sent. Private memory.
    Private,
}

/// Takes over the requests for pages: returns when they are served, on a thread or by another process.
pub type Serve<'a> = dyn FnMut(PageRequests) -> std::result::Result<(), Box<dyn std::error::Error + Send + Sync>>
    + 'a;

/// How memory is restored.
pub enum Memory<'a> {
    /// All of it is copied to descriptors first. Shared memory.
    Copied(&'a dyn MemorySource),
    /// Pages are asked for, from the restore of the devices on until Cloud Hypervisor has all.
    OnDemand(OnDemand, &'a mut Serve<'a>),
}

impl std::fmt::Debug for Memory<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Memory::Copied(_) => f.write_str("Copied"),
            Memory::OnDemand(how, _) => f.debug_tuple("OnDemand").field(how).finish(),
        }
    }
}

/// What to restore.
#[derive(Debug)]
pub struct Restore<'a> {
    /// The configuration as it was received; its disks may have been given other paths.
    pub config: &'a [u8],
    /// The state as it was received.
    pub state: &'a [u8],
    /// Memory.
    pub memory: Memory<'a>,
    /// Whether the guest runs at the end.
    pub then: Then,
}

/// A received configuration with other files for disks, other tap devices and another vsock socket.
pub fn rewrite(
    bytes: &[u8],
    drives: &[Drive],
    networks: &[Network],
    vsock: Option<&Path>,
) -> Result<Vec<u8>> {
    let bad = |error| {
        let context = "the configuration of a migration is damaged or cut short";
        Error::with_source(ErrorKind::InvalidFile, context, error)
    };
    let mut all: Value = serde_json::from_slice(bytes).map_err(bad)?;
    let inner = all["vm_config"].to_string();
    let inner = super::config::rewrite(inner.as_bytes(), drives, networks, vsock)?;
    all["vm_config"] = serde_json::from_slice(&inner).map_err(bad)?;
    Ok(all.to_string().into_bytes())
}

/// The slots as regions of the image.
pub fn regions<'a>(slots: impl Iterator<Item = &'a Slot>) -> Vec<MemoryRegion> {
    let mut image_offset = 0;
    let region = |slot: &Slot| {
        let block = format!("slot-{}", slot.slot);
        let (guest_address, length) = (Some(slot.gpa), slot.size);
        let region = MemoryRegion { block, image_offset, guest_address, length };
        image_offset += length;
        region
    };
    slots.map(region).collect()
}

impl CloudHypervisor {
    /// Takes a snapshot by descriptors, of a guest that is paused, over a socket that is made at
    /// `socket` and removed. How long Cloud Hypervisor and `commit` took together.
    pub fn snapshot_by_descriptors(
        &mut self,
        socket: &Path,
        source: Source,
        commit: &mut Commit<'_>,
    ) -> Result<Duration> {
        self.check_offload(source == Source::Stays)?;
        let listener = UnixListener::bind(socket)
            .map_err(|error| Error::io(format!("cannot listen at {}", socket.display()), error))?;
        let mut body = json!({ "destination_url": unix_url(socket)?, "local": true });
        if source == Source::Stays {
            body["preserve_source"] = Value::Bool(true);
        }
        let deadline = Deadline::after(self.timeouts.save);
        let started = Instant::now();
        let (received, called) = std::thread::scope(|scope| {
            let api = self.api.clone();
            let calling =
                scope.spawn(move || migration(&api, "vm.send-migration", &body, deadline));
            let received = wire::accept(&listener, deadline, &|| calling.is_finished())
                .and_then(|stream| receive(stream, deadline.left("a snapshot")?, commit));
            (received, calling.join())
        });
        drop(listener);
        if let Err(error) = std::fs::remove_file(socket) {
            tracing::warn!(%error, path = %socket.display(), "cannot remove a socket");
        }
        finish(received, called)?;
        Ok(started.elapsed())
    }

    /// Restores into a Cloud Hypervisor that was started without a guest; it makes its socket at
    /// `socket`. With memory on demand, pages are asked for until all are there or the guest ends.
    pub fn restore_by_descriptors(&mut self, socket: &Path, restore: Restore<'_>) -> Result<()> {
        self.check_offload(false)?;
        if matches!(restore.memory, Memory::OnDemand(OnDemand::Shared, _)) {
            check_shmem_thp(self.version)?;
        }
        let mut body = json!({ "receiver_url": unix_url(socket)? });
        if matches!(restore.memory, Memory::OnDemand(..)) {
            body["memory_mode"] = Value::String("Postcopy".to_owned());
        }
        let deadline = Deadline::after(self.timeouts.load);
        let (sent, called) = std::thread::scope(|scope| {
            let api = self.api.clone();
            let calling =
                scope.spawn(move || migration(&api, "vm.receive-migration", &body, deadline));
            let mut ended = || calling.is_finished().then(|| "its call returned".to_owned());
            let sent = crate::socket::connect_when_there(socket, deadline, &mut ended)
                .and_then(|stream| send(stream, socket, deadline.left("a restore")?, restore));
            (sent, calling.join())
        });
        finish(sent, called)
    }

    fn check_offload(&self, keeps_source: bool) -> Result<()> {
        let lacks = |what: &str, since: u32| {
            let context =
                format!("Cloud Hypervisor {} cannot {what}; {since} and later can", self.version);
            Err(Error::new(ErrorKind::Incompatible, context))
        };
        if !self.capabilities().offload {
            return lacks("hand snapshots over by descriptors", 53);
        }
        // It would not complain of the field, and end.
        if keeps_source && self.version < PRESERVES_SOURCE {
            return lacks("keep a guest that it handed over", 54);
        }
        Ok(())
    }
}

/// A call that returns when the migration is over.
fn migration(api: &Path, name: &str, body: &Value, deadline: Deadline) -> Result<()> {
    let stream = crate::socket::connect(api, deadline)?;
    let path = format!("/api/v1/{name}");
    Http::new(api, stream).call(Method::Put, &path, Some(body), deadline)?;
    Ok(())
}

/// What the two sides made of it. Ours says more, unless it only saw the other's end.
fn finish<T>(ours: Result<T>, called: std::thread::Result<Result<()>>) -> Result<T> {
    let theirs = called.unwrap_or_else(|_| {
        Err(Error::new(ErrorKind::Io, "the thread that calls Cloud Hypervisor panicked"))
    });
    match (ours, theirs) {
        (Ok(value), Ok(())) => Ok(value),
        // It ends when it has handed its guest over, perhaps before its answer is out.
        (Ok(value), Err(error)) if error.kind() == ErrorKind::Gone => Ok(value),
        (Err(ours), Err(theirs)) if ours.kind() == ErrorKind::Gone => Err(theirs),
        (Err(error), _) | (Ok(_), Err(error)) => Err(error),
    }
}

/// Refuses to serve pages of shared memory to a version that shows its guest unfilled ones.
///
/// Version 53.0 wakes a guest before the whole of a huge page is there.
pub fn check_shmem_thp(version: Version) -> Result<()> {
    let setting = std::fs::read_to_string(SHMEM_THP).unwrap_or_default();
    if version != THP_BUG || huge_pages_are_safe(&setting) {
        return Ok(());
    }
    let context = format!(
        "Cloud Hypervisor 53.0 shows its guest unfilled pages of shared memory (#8663) while \
         {SHMEM_THP} is {:?}; write `never` to it, or use a later version",
        setting.trim()
    );
    Err(Error::new(ErrorKind::Incompatible, context))
}

/// Whether shared memory has no huge pages unless somebody asks for them.
fn huge_pages_are_safe(setting: &str) -> bool {
    setting.is_empty()
        || ["[never]", "[advise]", "[deny]"].iter().any(|word| setting.contains(word))
}

fn unix_url(socket: &Path) -> Result<String> {
    socket.to_str().map(|text| format!("unix:{text}")).ok_or_else(|| {
        Error::new(ErrorKind::InvalidInput, format!("{} is not UTF-8", socket.display()))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bug_of_53_is_seen() {
        assert!(huge_pages_are_safe("always within_size advise [never] deny force\n"));
        assert!(huge_pages_are_safe(""));
        assert!(!huge_pages_are_safe("[always] within_size advise never deny force"));
    }
}
