//! What a small VMM is to be.

use std::path::{Path, PathBuf};

use anyhow::{Result, ensure};
use serde::{Deserialize, Serialize};

use super::content::PAGE_BYTES;

/// Threads of a VMM: each has a word of its own in every 64 of a page.
pub(super) const THREADS_MAX: usize = 8;

/// Pages of 4 KiB in a huge page.
pub(super) const HUGE_PAGES: u64 = 512;

/// What virtual CPUs can address.
const KVM_BYTES_MAX: u64 = 3 << 30;

/// A small VMM.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Config {
    /// What the image and everything the threads do follow from.
    pub seed: u64,

    /// Its memory. The image has them one behind the other.
    pub regions: Vec<RegionConfig>,

    /// What makes it do other things than another one of the same seed.
    #[serde(default)]
    pub variation: u64,

    /// Where its memory's content comes from.
    pub backing: Backing,

    /// Threads that work, 1 to 8.
    pub threads: usize,

    /// What they read and write with.
    #[serde(default)]
    pub cpus: Cpus,

    /// What they do.
    pub mix: Mix,

    /// How long one access may take before it counts as a hang, in milliseconds.
    pub hang_ms: u64,
}

impl Config {
    /// Half a minute without an answer is a hang, also on a loaded machine.
    pub const HANG_MS: u64 = 30_000;

    /// Two regions of small pages, three threads that do everything.
    pub fn small(seed: u64, pages: u64, backing: Backing) -> Config {
        let first = (pages / 4 * 3).max(1);
        let regions =
            [first, pages - first].map(|pages| RegionConfig { pages, kind: PageKind::Small });
        Config {
            seed,
            variation: 0,
            regions: regions.into_iter().filter(|region| region.pages > 0).collect(),
            backing,
            threads: 3,
            cpus: Cpus::Threads,
            mix: Mix::ALL,
            hang_ms: Config::HANG_MS,
        }
    }

    /// Pages of 4 KiB in all regions.
    pub fn pages(&self) -> u64 {
        self.regions.iter().map(|region| region.pages).sum()
    }

    /// Bytes of the image.
    pub fn image_bytes(&self) -> u64 {
        self.pages() * PAGE_BYTES as u64
    }

    pub(super) fn check(&self) -> Result<()> {
        let (threads, mix) = (self.threads, &self.mix);
        ensure!((1..=THREADS_MAX).contains(&threads), "{threads} threads; expected 1 to 8");
        ensure!(!self.regions.is_empty(), "a VMM without memory");
        for region in &self.regions {
            let unit = region.kind.pages();
            ensure!(region.pages > 0 && region.pages % unit == 0, "{} pages", region.pages);
        }
        ensure!(mix.total() > 0, "nothing to do");
        let is_reached = self.cpus == Cpus::Threads || self.image_bytes() <= KVM_BYTES_MAX;
        ensure!(is_reached, "{} bytes of memory for virtual CPUs", self.image_bytes());
        if let Backing::Uffd { version, .. } = &self.backing {
            let is_told = *version != Version::V1_1 || mix.give_back == 0;
            ensure!(is_told, "without EVENT_REMOVE nobody would learn what is given back");
        }
        Ok(())
    }
}

/// What touches memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Cpus {
    /// The threads themselves.
    #[default]
    Threads,
    /// A virtual CPU for each thread; whole pages are still written by the threads, as by devices.
    /// Wants `/dev/kvm`, and memory of at most 3 GiB.
    Kvm,
}

impl Cpus {
    /// Whether there can be virtual CPUs here.
    pub fn has_kvm() -> bool {
        std::fs::File::options().read(true).write(true).open("/dev/kvm").is_ok()
    }
}

/// A region of memory.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct RegionConfig {
    /// Pages of 4 KiB; a multiple of 512 for huge ones.
    pub pages: u64,

    /// What pages it is made of.
    pub kind: PageKind,
}

/// Pages of a region.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum PageKind {
    /// 4 KiB.
    Small,
    /// 2 MiB of `hugetlbfs`; wants `vm.nr_hugepages`.
    Huge,
}

impl PageKind {
    /// Pages of 4 KiB in one.
    pub(super) fn pages(self) -> u64 {
        match self {
            PageKind::Small => 1,
            PageKind::Huge => HUGE_PAGES,
        }
    }

    pub(super) fn bytes(self) -> u64 {
        self.pages() * PAGE_BYTES as u64
    }
}

/// Where the content of memory comes from.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Backing {
    /// A userfaultfd handler.
    Uffd {
        /// Where it listens.
        socket: PathBuf,
        /// Which Firecracker this is.
        version: Version,
        /// How it sends.
        manner: Manner,
    },

    /// A file with the image, mapped privately. What is given back is replaced by anonymous memory,
    /// as Firecracker does.
    PrivateFile(PathBuf),

    /// A file with the image, of which the VMM takes a copy before it starts.
    CopiedFile(PathBuf),

    /// Files that are the memory, one for each region, as they are.
    SharedFiles(Vec<PathBuf>),

    /// The VMM itself, before it starts: a guest that was booted.
    Own,
}

impl Backing {
    /// A Firecracker that behaves.
    pub fn firecracker(socket: &Path, version: Version) -> Backing {
        Backing::Uffd { socket: socket.to_owned(), version, manner: Manner::AtOnce }
    }
}

/// Versions of Firecracker, by what they send.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Version {
    /// 1.1 to 1.6: no page size, socket closed. As without a balloon: no `EVENT_REMOVE`.
    V1_1,
    /// 1.7 to 1.11: `page_size_kib`, socket closed. As with a balloon: `EVENT_REMOVE`.
    V1_7,
    /// 1.12 and later: both page sizes, socket kept open, `EVENT_REMOVE`.
    V1_12,
}

/// How a handshake is sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Manner {
    /// As Firecracker does: one message.
    AtOnce,
    /// A few bytes at a time, the descriptor with the first.
    InPieces,
    /// The descriptor with the last byte alone.
    TableFirst,
    /// The descriptor between others, as forks send a memfd.
    AmongOthers,
    /// Not a handshake that can be served.
    Lie(Lie),
}

/// What is wrong with a handshake.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Lie {
    /// The table alone.
    NoDescriptor,
    /// A descriptor of something else.
    WrongDescriptor,
    /// Half of a table, then the end.
    CutShort,
    /// Nothing, for ever.
    Silence,
    /// Something else than a table.
    NoTable,
    /// A last region of double size.
    BeyondImage,
    /// The last region missing.
    MissingRegion,
    /// All regions at the address of the first.
    Overlap,
    /// Addresses in the middle of pages.
    Misaligned,
    /// Addresses at which nothing is mapped.
    Elsewhere,
}

/// What threads do, as parts of the whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mix {
    /// Read a page and check it.
    pub read: u32,
    /// Have the kernel read a page, as for a device, and check it.
    pub kernel_read: u32,
    /// Write a word.
    pub write: u32,
    /// Write a whole page.
    pub fill: u32,
    /// Write zeros over a whole page.
    pub fill_zero: u32,
    /// Give up to 64 pages back (`MADV_DONTNEED`); whole huge pages where they are huge.
    pub give_back: u32,
}

impl Mix {
    /// Everything.
    pub const ALL: Mix =
        Mix { read: 55, kernel_read: 5, write: 25, fill: 8, fill_zero: 5, give_back: 2 };

    /// Everything but giving back.
    pub const KEEPING: Mix = Mix { give_back: 0, ..Mix::ALL };

    /// Reading alone.
    pub const READING: Mix =
        Mix { read: 90, kernel_read: 10, write: 0, fill: 0, fill_zero: 0, give_back: 0 };

    pub(super) fn total(&self) -> u32 {
        let Mix { read, kernel_read, write, fill, fill_zero, give_back } = *self;
        [read, kernel_read, write, fill, fill_zero, give_back].iter().sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_small_one_is_sound_and_travels_as_json() {
        for pages in [1, 2, 100, 4096] {
            let config = Config::small(1, pages, Backing::Own);
            config.check().unwrap();
            assert_eq!(config.pages(), pages);
            let text = serde_json::to_string(&config).unwrap();
            assert!(serde_json::from_str::<Config>(&text).is_ok_and(|read| read.pages() == pages));
        }
    }

    #[test]
    fn what_cannot_work_is_refused() {
        let sound = Config::small(1, 1024, Backing::Own);
        let huge = vec![RegionConfig { pages: 500, kind: PageKind::Huge }];
        let nothing = Mix { read: 0, kernel_read: 0, ..Mix::READING };
        let old = Backing::firecracker(Path::new("/x"), Version::V1_1);
        for bad in [
            Config { threads: 0, ..sound.clone() },
            Config { threads: 9, ..sound.clone() },
            Config { regions: vec![], ..sound.clone() },
            Config { regions: huge, ..sound.clone() },
            Config { mix: nothing, ..sound.clone() },
            Config { backing: old, ..sound.clone() },
        ] {
            assert!(bad.check().is_err(), "{bad:?}");
        }
    }
}
