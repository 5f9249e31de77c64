//! The memory of a small VMM: its regions, mapped and, if a handler is to serve them, observed.

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::{Context, Result};
use dormouse_sys::mapping::{Mapping, PageSize};
use dormouse_sys::process_memory;
use dormouse_sys::userfaultfd::{Features, Register, Userfaultfd};

use super::config::{Backing, Config, PageKind, Version};
use super::content::{Content, PAGE_BYTES, PAGE_WORDS};
use super::protocol::RegionAddress;

/// Memory.
#[derive(Debug)]
pub(crate) struct Memory {
    regions: Vec<Region>,
    is_file: bool,
}

#[derive(Debug)]
struct Region {
    mapping: Arc<Mapping>,
    first_page: u64,
    pages: u64,
    kind: PageKind,
}

impl Memory {
    /// Maps what `config` says, and registers it if a handler is to serve it.
    pub(super) fn map(config: &Config) -> Result<(Memory, Option<Userfaultfd>)> {
        let open = |path: &Path, write: bool| {
            let file = File::options().read(true).write(write).open(path);
            file.with_context(|| format!("no {}", path.display()))
        };
        let file = match &config.backing {
            Backing::PrivateFile(path) | Backing::CopiedFile(path) => Some(open(path, false)?),
            _ => None,
        };
        let mut regions = Vec::new();
        let mut first_page = 0;
        for (number, region) in config.regions.iter().enumerate() {
            let bytes = usize::try_from(region.pages)? * PAGE_BYTES;
            let mapping = match (&config.backing, &file) {
                (Backing::PrivateFile(_), Some(file)) => {
                    Mapping::private_file_at(file, first_page * PAGE_BYTES as u64, bytes)
                }
                (Backing::SharedFiles(paths), _) => {
                    let path = paths.get(number).context("a file for each region")?;
                    Mapping::shared_file(&open(path, true)?, bytes)
                }
                _ => Mapping::anonymous(bytes, page_size(region.kind)),
            };
            let mapping = mapping.with_context(|| format!("cannot map {bytes} bytes"))?;
            let mapping = Arc::new(mapping);
            regions.push(Region { mapping, first_page, pages: region.pages, kind: region.kind });
            first_page += region.pages;
        }
        let is_file = matches!(config.backing, Backing::PrivateFile(_));
        let memory = Memory { regions, is_file };
        let uffd = match &config.backing {
            Backing::Uffd { version, .. } => Some(memory.observe(*version)?),
            Backing::PrivateFile(_) | Backing::SharedFiles(_) => None,
            Backing::CopiedFile(path) => {
                memory.copy(&open(path, false)?)?;
                None
            }
            Backing::Own => {
                memory.fill(config.seed);
                None
            }
        };
        Ok((memory, uffd))
    }

    /// As Firecracker does: pages that are missing, and nothing else.
    fn observe(&self, version: Version) -> Result<Userfaultfd> {
        let features = match version {
            Version::V1_1 => Features::NONE,
            Version::V1_7 | Version::V1_12 => Features::EVENT_REMOVE,
        };
        let uffd = Userfaultfd::open(features).context("cannot make a userfaultfd")?;
        for region in &self.regions {
            uffd.register(&region.mapping.addresses(), Register::Missing)
                .context("cannot register memory")?;
        }
        Ok(uffd)
    }

    /// Takes a copy of a file; its zeros stay untouched.
    fn copy(&self, file: &File) -> Result<()> {
        let mut bytes = vec![0; PAGE_BYTES];
        for page in self.regions.iter().flat_map(|region| region.first_page..region.end()) {
            file.read_exact_at(&mut bytes, page * PAGE_BYTES as u64)
                .with_context(|| format!("cannot read page {page}"))?;
            if bytes.iter().any(|byte| *byte != 0) {
                for (word, bytes) in self.words(page).iter().zip(bytes.as_chunks::<8>().0) {
                    word.store(u64::from_ne_bytes(*bytes), Ordering::Relaxed);
                }
            }
        }
        Ok(())
    }

    /// Makes memory that is not a copy of anything the image.
    pub(crate) fn fill(&self, seed: u64) {
        for page in self.regions.iter().flat_map(|region| region.first_page..region.end()) {
            let content = Content::of_image(seed, page);
            if content != Content::Zero {
                for (index, word) in self.words(page).iter().enumerate() {
                    word.store(content.word(index), Ordering::Relaxed);
                }
            }
        }
    }

    fn region_of(&self, page: u64) -> &Region {
        let after = self.regions.partition_point(|region| region.first_page <= page);
        let region = &self.regions[after - 1];
        assert!(page < region.end(), "page {page} is beyond memory");
        region
    }

    /// The words of a page. Touching one can be a page fault.
    pub(super) fn words(&self, page: u64) -> &[AtomicU64] {
        let region = self.region_of(page);
        let index = usize::try_from(page - region.first_page).expect("inside a mapping");
        &region.mapping.words()[index * PAGE_WORDS..][..PAGE_WORDS]
    }

    /// Where a page is in this process.
    pub(super) fn address(&self, page: u64) -> u64 {
        let region = self.region_of(page);
        region.mapping.addresses().start + (page - region.first_page) * PAGE_BYTES as u64
    }

    /// Has the kernel read a page, as it does for a device.
    pub(super) fn kernel_read(&self, page: u64, into: &mut [u64; PAGE_WORDS]) -> Result<()> {
        let address = self.address(page);
        let mut bytes = [0; PAGE_BYTES];
        let range = address..address + PAGE_BYTES as u64;
        process_memory::read(std::process::id(), std::slice::from_ref(&range), &mut bytes)
            .with_context(|| format!("the kernel cannot read page {page}"))?;
        for (into, bytes) in into.iter_mut().zip(bytes.as_chunks::<8>().0) {
            *into = u64::from_ne_bytes(*bytes);
        }
        Ok(())
    }

    /// Reads whole pages, as the kernel does for `write(2)`: those that are missing are asked for.
    pub(crate) fn dump(&self, first_page: u64, into: &mut [u8]) -> Result<()> {
        let address = self.address(first_page);
        let range = address..address + into.len() as u64;
        process_memory::read(std::process::id(), std::slice::from_ref(&range), into)
            .with_context(|| format!("cannot read memory from page {first_page} on"))
    }

    /// The first page and the number of pages of each region.
    pub(crate) fn page_ranges(&self) -> impl Iterator<Item = Range<u64>> {
        self.regions.iter().map(|region| region.first_page..region.end())
    }

    /// Pages of 4 KiB in one page of the region that has `page`.
    pub(super) fn unit_pages(&self, page: u64) -> u64 {
        self.region_of(page).kind.pages()
    }

    /// What can be given back around a page: about `wanted` pages, whole huge ones.
    pub(super) fn units_around(&self, page: u64, wanted: u64) -> Range<u64> {
        let region = self.region_of(page);
        let unit = region.kind.pages();
        let start = page - (page - region.first_page) % unit;
        start..(start + wanted.next_multiple_of(unit)).min(region.end())
    }

    /// Gives pages of one region back: they are zero from then on.
    pub(super) fn give_back(&self, pages: Range<u64>) -> Result<()> {
        let region = self.region_of(pages.start);
        assert!(pages.end <= region.end(), "{pages:?} are in two regions");
        let byte = |page: u64| usize::try_from(page - region.first_page).map(|n| n * PAGE_BYTES);
        let range = byte(pages.start)?..byte(pages.end)?;
        let given = match self.is_file {
            true => region.mapping.replace_with_zeros(range),
            false => region.mapping.give_back(range),
        };
        given.with_context(|| format!("cannot give pages {pages:?} back"))
    }

    /// The regions' maps, by their places in the image.
    pub(super) fn mappings(&self) -> impl Iterator<Item = (u64, Arc<Mapping>)> {
        self.regions
            .iter()
            .map(|region| (region.first_page * PAGE_BYTES as u64, Arc::clone(&region.mapping)))
    }

    /// Where the regions are.
    pub(crate) fn addresses(&self) -> Vec<RegionAddress> {
        let place = |region: &Region| RegionAddress {
            address: region.mapping.addresses().start,
            size: region.pages * PAGE_BYTES as u64,
            offset: region.first_page * PAGE_BYTES as u64,
            page_bytes: region.kind.bytes(),
        };
        self.regions.iter().map(place).collect()
    }
}

impl Region {
    fn end(&self) -> u64 {
        self.first_page + self.pages
    }
}

fn page_size(kind: PageKind) -> PageSize {
    match kind {
        PageKind::Small => PageSize::Small,
        PageKind::Huge => PageSize::Huge,
    }
}
