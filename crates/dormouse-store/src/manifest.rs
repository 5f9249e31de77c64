//! The manifest: what a snapshot is, as a small JSON file.
//!
//! Publishing this file under its name is the one commit point of a snapshot. It lists no packs:
//! they follow from the roots. `docs/format.md` names every field and its unit.

use std::collections::BTreeMap;

use dormouse_image::block::{IMAGE_BYTES_MAX, blocks_in};
use dormouse_image::map::{Map, NodeRef};
use dormouse_image::pack::PackId;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::envelope::Envelope;
use crate::error::{Error, ErrorKind, Result};
use crate::name::{ImageName, Name, SnapRef};

/// The longest manifest. A snapshot has a few images; labels and layouts are bounded below.
pub const MANIFEST_BYTES_MAX: u64 = 1 << 20;

/// Images of one snapshot: more disks than any VMM attaches.
pub const IMAGES_MAX: usize = 256;

/// Rows of a memory layout.
pub const REGIONS_MAX: usize = 4096;

/// Labels of one snapshot, and bytes of a label's value.
pub const LABELS_MAX: usize = 256;

/// Bytes of a label's value.
pub const LABEL_BYTES_MAX: usize = 1024;

const ENVELOPE: Envelope = Envelope { format: "dormouse-snapshot", version: 1, body: "manifest" };

/// A snapshot.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// Unique for all time.
    pub uuid: Uuid,

    /// The name.
    pub name: Name,

    /// Counts up within the name and is never used again.
    pub number: u64,

    /// The snapshot that this one was taken over, if any. It may be gone.
    pub parent: Option<ParentRef>,

    /// When it was published.
    pub created: Timestamp,

    /// The key of the digests.
    pub key_id: String,

    /// The pack that this commit wrote, if it wrote one.
    pub pack: Option<OwnPack>,

    /// Memory, disks and states, sorted by name.
    pub images: Vec<ImageEntry>,

    /// Where the parts of the memory image lie in the guest.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub memory_layout: Vec<MemoryRegion>,

    /// What ran the guest.
    #[serde(default, skip_serializing_if = "Vmm::is_unknown")]
    pub vmm: Vmm,

    /// The user's own.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<String, String>,

    /// What the commit found and wrote, over all images.
    pub figures: Figures,
}

/// A snapshot's parent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ParentRef {
    /// Its UUID.
    pub uuid: Uuid,

    /// Its name.
    pub name: Name,

    /// Its number.
    pub number: u64,
}

/// The pack that a commit wrote.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OwnPack {
    /// Its id in hexadecimal digits.
    pub id: String,

    /// Its length when it was written.
    pub bytes: u64,

    /// Its slots.
    pub slots: u32,

    /// So many of its first slots hold blocks of disks; the others of memory and states.
    pub disk_slots: u32,
}

/// An image of a snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ImageEntry {
    /// Which one.
    pub image: ImageName,

    /// Its length in bytes.
    pub size_bytes: u64,

    /// The root of its map; none if it is all zero.
    pub root: Option<RootRef>,

    /// What the commit found; none if the image was taken over from the parent as it was.
    pub figures: Option<Figures>,
}

/// The root of a map.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RootRef {
    /// The pack that holds it, in hexadecimal digits.
    pub pack: String,

    /// The node's number in the pack.
    pub node: u32,
}

impl ImageEntry {
    /// The image's map.
    pub fn map(&self) -> Result<Map> {
        let root = self
            .root
            .as_ref()
            .map(|root| {
                PackId::parse(&root.pack)
                    .map(|pack| NodeRef { pack, node: root.node })
                    .ok_or_else(|| corrupt(format!("{:?} is not a pack id", root.pack)))
            })
            .transpose()?;
        Ok(Map { blocks: blocks_in(self.size_bytes), root })
    }
}

/// A row of a guest's memory layout.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MemoryRegion {
    /// The VMM's name of the memory block, such as `ram` or `pc.ram`; may be empty.
    #[serde(default)]
    pub block: String,

    /// The first byte in the memory image.
    pub image_offset: u64,

    /// The guest-physical address of that byte; none if it is unknown.
    #[serde(default)]
    pub guest_address: Option<u64>,

    /// Bytes in the region.
    pub length: u64,

    /// The size of the host's pages behind it.
    #[serde(default = "default_page_size")]
    pub page_size: u64,

    /// Whether the region was plugged; unplugged ones hold nothing.
    #[serde(default = "default_plugged")]
    pub plugged: bool,
}

fn default_page_size() -> u64 {
    4096
}

fn default_plugged() -> bool {
    true
}

/// What ran the guest. None promises to load another version's state, so it is worth knowing.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Vmm {
    /// `firecracker`, `cloud-hypervisor`, `qemu`, …
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kind: Option<String>,

    /// The VMM's version.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub version: Option<String>,

    /// The host's CPU model.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cpu_model: Option<String>,

    /// The host's kernel release.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub host_kernel: Option<String>,

    /// The architecture, such as `x86_64`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub arch: Option<String>,

    /// Virtual CPUs.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vcpus: Option<u32>,
}

impl Vmm {
    fn is_unknown(&self) -> bool {
        *self == Vmm::default()
    }
}

/// What a capture found, in bytes of whole blocks.
///
/// `raw` = `zero` + `unchanged` + `elsewhere` + `self` + `new`, where zero blocks include holes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Figures {
    /// Length of the images.
    pub raw_bytes: u64,

    /// Holes and the like that were not even read.
    pub skipped_bytes: u64,

    /// Blocks that are zero, holes included.
    pub zero_bytes: u64,

    /// Blocks that are not zero.
    pub nonzero_bytes: u64,

    /// Blocks that are not as they were at the same offset of the parent.
    pub changed_bytes: u64,

    /// Blocks that are not zero and equal to the parent's at the same offset.
    pub unchanged_bytes: u64,

    /// Blocks found elsewhere in the store.
    pub elsewhere_bytes: u64,

    /// Blocks found among those that this very commit stored before.
    pub self_bytes: u64,

    /// Of those found elsewhere or in this commit, blocks that came from a disk.
    pub from_disks_bytes: u64,

    /// Blocks that were stored.
    pub new_bytes: u64,

    /// What the new blocks take, compressed.
    pub stored_bytes: u64,

    /// Map nodes and digests that were written.
    pub map_bytes: u64,

    /// Extents of the maps, zeros included.
    pub extents: u64,
}

impl Figures {
    /// Adds another capture's.
    pub fn add(&mut self, other: &Figures) {
        for (sum, part) in [
            (&mut self.raw_bytes, other.raw_bytes),
            (&mut self.skipped_bytes, other.skipped_bytes),
            (&mut self.zero_bytes, other.zero_bytes),
            (&mut self.nonzero_bytes, other.nonzero_bytes),
            (&mut self.changed_bytes, other.changed_bytes),
            (&mut self.unchanged_bytes, other.unchanged_bytes),
            (&mut self.elsewhere_bytes, other.elsewhere_bytes),
            (&mut self.self_bytes, other.self_bytes),
            (&mut self.from_disks_bytes, other.from_disks_bytes),
            (&mut self.new_bytes, other.new_bytes),
            (&mut self.stored_bytes, other.stored_bytes),
            (&mut self.map_bytes, other.map_bytes),
            (&mut self.extents, other.extents),
        ] {
            *sum += part;
        }
    }

    /// Those of an image that was captured in two steps, this one over `lower`: what both stored, and
    /// of the whole what it is now. What the second one left as it was is `lower`'s business.
    #[must_use]
    pub fn over(&self, lower: &Figures) -> Figures {
        let read = |figures: &Figures| figures.raw_bytes.saturating_sub(figures.skipped_bytes);
        let skipped = self.raw_bytes.saturating_sub(read(self) + read(lower));
        let mut both = *self;
        both.add(lower);
        Figures {
            raw_bytes: self.raw_bytes,
            skipped_bytes: skipped,
            zero_bytes: self.zero_bytes,
            nonzero_bytes: self.nonzero_bytes,
            unchanged_bytes: lower.unchanged_bytes,
            extents: self.extents,
            ..both
        }
    }
}

impl Manifest {
    /// `NAME@N`.
    pub fn display_name(&self) -> String {
        format!("{}@{}", self.name, self.number)
    }

    /// What names it: itself, and not whatever is the newest.
    pub fn snap_ref(&self) -> SnapRef {
        SnapRef { name: self.name.clone(), number: Some(self.number) }
    }

    /// An image, if the snapshot has it.
    pub fn image(&self, image: &ImageName) -> Option<&ImageEntry> {
        self.images.iter().find(|entry| entry.image == *image)
    }

    /// The file's bytes.
    pub fn encode(&self) -> Result<Vec<u8>> {
        self.check()?;
        let bytes = ENVELOPE.seal(self)?;
        if bytes.len() as u64 > MANIFEST_BYTES_MAX {
            return Err(Error::new(
                ErrorKind::InvalidInput,
                format!("the manifest would have {} bytes, over {MANIFEST_BYTES_MAX}", bytes.len()),
            ));
        }
        Ok(bytes)
    }

    /// Reads a file's bytes and checks everything that can be checked without the packs.
    pub fn decode(bytes: &[u8]) -> Result<Manifest> {
        if bytes.len() as u64 > MANIFEST_BYTES_MAX {
            return Err(corrupt(format!("{} bytes, over {MANIFEST_BYTES_MAX}", bytes.len())));
        }
        let manifest: Manifest = ENVELOPE.parse(bytes)?;
        manifest.check().map_err(|error| error.into_kind(ErrorKind::Corrupt))?;
        Ok(manifest)
    }

    fn check(&self) -> Result<()> {
        let refuse = |why: String| Err(Error::new(ErrorKind::InvalidInput, why));
        if self.images.len() > IMAGES_MAX {
            return refuse(format!("{} images, at most {IMAGES_MAX}", self.images.len()));
        }
        if !self.images.windows(2).all(|pair| pair[0].image < pair[1].image) {
            return refuse("images are not sorted by name, or one is there twice".to_owned());
        }
        for entry in &self.images {
            if entry.size_bytes > IMAGE_BYTES_MAX {
                return refuse(format!(
                    "{} has {} bytes, over 16 TiB",
                    entry.image, entry.size_bytes
                ));
            }
            entry.map()?;
        }
        if self.labels.len() > LABELS_MAX {
            return refuse(format!("{} labels, at most {LABELS_MAX}", self.labels.len()));
        }
        for (key, value) in &self.labels {
            Name::new(key.as_str())?;
            if value.len() > LABEL_BYTES_MAX {
                return refuse(format!(
                    "label {key} has {} bytes, over {LABEL_BYTES_MAX}",
                    value.len()
                ));
            }
        }
        check_layout(
            &self.memory_layout,
            self.image(&ImageName::Memory).map(|entry| entry.size_bytes),
        )
    }
}

/// Checks a layout: rows inside the memory image, in order and without overlap there.
pub(crate) fn check_layout(rows: &[MemoryRegion], memory_bytes: Option<u64>) -> Result<()> {
    let refuse =
        |why: String| Err(Error::new(ErrorKind::InvalidInput, format!("memory layout: {why}")));
    if rows.is_empty() {
        return Ok(());
    }
    if rows.len() > REGIONS_MAX {
        return refuse(format!("{} rows, at most {REGIONS_MAX}", rows.len()));
    }
    let Some(memory_bytes) = memory_bytes else {
        return refuse("the snapshot has no memory".to_owned());
    };
    let mut end = 0;
    for (number, row) in rows.iter().enumerate() {
        if !row.page_size.is_power_of_two() || row.page_size < 4096 {
            return refuse(format!("row {number} has a page size of {}", row.page_size));
        }
        let next = row.image_offset.checked_add(row.length).filter(|&next| next <= memory_bytes);
        let Some(next) = next else {
            return refuse(format!(
                "row {number} ends behind the memory image of {memory_bytes} bytes"
            ));
        };
        if row.length == 0 || row.image_offset < end {
            return refuse(format!(
                "row {number} is empty, out of order or overlaps the one before"
            ));
        }
        if row.guest_address.is_some_and(|address| address.checked_add(row.length).is_none()) {
            return refuse(format!("row {number} passes the end of the address space"));
        }
        end = next;
    }
    Ok(())
}

fn corrupt(why: String) -> Error {
    Error::new(ErrorKind::Corrupt, format!("manifest is damaged: {why}"))
}
