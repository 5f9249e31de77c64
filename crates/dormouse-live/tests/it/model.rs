//! Random histories against the simplest disk there is, with power cuts anywhere.
//!
//! The model keeps, for each sector of 512 bytes, every version since the last good flush. What a
//! cut leaves of a sector must be one of them; what was flushed has one version only.

use std::ops::Range;
use std::sync::Arc;

use dormouse_live::base::{Base, RunKind};
use dormouse_live::error::{ErrorKind, Result};
use dormouse_live::files::Folder;
use dormouse_live::overlay::{
    DiskRun, NewOverlay, Overlay, OverlayConfig, SealedRun, ZeroBlocks, Zeroing,
};
use dormouse_testkit::sim_disk::{LastStep, Survive};
use dormouse_testkit::sim_files::SimFolder;
use proptest::prelude::*;

const SECTOR: usize = 512;

/// A little more than four stripes, and a last block that is short.
pub(crate) const SIZE: usize = 4 * 64 * 4096 + 5 * 4096 + 3 * 512;

/// Ends within a block.
pub(crate) const BASE_SIZE: usize = 3 * 64 * 4096 + 700;

/// A base in memory, with known zeros where a whole block is zero.
#[derive(Debug)]
pub(crate) struct BytesBase(pub(crate) Vec<u8>);

impl Base for BytesBase {
    fn size_bytes(&self) -> u64 {
        self.0.len() as u64
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        let offset = usize::try_from(offset).unwrap();
        buf.copy_from_slice(&self.0[offset..offset + buf.len()]);
        Ok(())
    }

    fn for_each_run(
        &self,
        range: Range<u64>,
        visit: &mut dyn FnMut(Range<u64>, RunKind) -> Result<()>,
    ) -> Result<()> {
        let mut at = range.start;
        while at < range.end {
            let end = range.end.min((at / 4096 + 1) * 4096);
            let bytes = &self.0[usize::try_from(at).unwrap()..usize::try_from(end).unwrap()];
            let is_zero = bytes.iter().all(|byte| *byte == 0);
            visit(at..end, if is_zero { RunKind::Zero } else { RunKind::Data })?;
            at = end;
        }
        Ok(())
    }
}

/// Bytes that tell their offset and version, so that a block in a wrong place is noticed.
pub(crate) fn pattern(offset: usize, len: usize, version: u8) -> Vec<u8> {
    let byte = |at: usize| u8::try_from((at / 509 * 7 + at / (64 * 4096)) % 251).unwrap();
    (offset..offset + len).map(|at| (byte(at) ^ version) | 1).collect()
}

pub(crate) fn first_base() -> Vec<u8> {
    let mut base = pattern(0, BASE_SIZE, 0x5a);
    base[10 * 4096..20 * 4096].fill(0);
    base
}

#[derive(Clone, Debug)]
pub(crate) enum Op {
    Write {
        at: usize,
        len: usize,
    },
    WriteZeroBytes {
        at: usize,
        len: usize,
    },
    /// Data with zero blocks in it.
    WriteMixed {
        at: usize,
        len: usize,
    },
    Zero {
        at: usize,
        len: usize,
        keep: bool,
    },
    Trim {
        at: usize,
        len: usize,
    },
    Flush,
    Durably {
        at: usize,
        len: usize,
    },
    Seal,
    Commit,
    FailCommit,
    Reopen,
    Cut {
        survive: u64,
    },
}

/// The disk as it has to be.
#[derive(Clone)]
pub(crate) struct Model {
    pub(crate) now: Vec<u8>,
    /// For each sector, what a cut may leave besides `now`.
    older: Vec<Vec<Vec<u8>>>,
    version: u8,
}

impl Model {
    pub(crate) fn new() -> Model {
        let mut now = first_base();
        now.resize(SIZE, 0);
        Model { now, older: vec![Vec::new(); SIZE.div_ceil(SECTOR)], version: 0 }
    }

    fn change(&mut self, at: usize, bytes: &[u8]) {
        if bytes.is_empty() {
            return;
        }
        for sector in at / SECTOR..(at + bytes.len()).div_ceil(SECTOR) {
            let range = sector * SECTOR..((sector + 1) * SECTOR).min(SIZE);
            self.older[sector].push(self.now[range].to_vec());
        }
        self.now[at..at + bytes.len()].copy_from_slice(bytes);
    }

    pub(crate) fn flushed(&mut self) {
        self.older.iter_mut().for_each(Vec::clear);
    }

    /// Checks what a cut or the death of the process left, and goes on from there.
    pub(crate) fn adopt(&mut self, left: &[u8], what: &str) {
        for (sector, older) in self.older.iter_mut().enumerate() {
            let range = sector * SECTOR..((sector + 1) * SECTOR).min(SIZE);
            let left = &left[range.clone()];
            let is_known = self.now[range.clone()] == *left || older.iter().any(|it| it == left);
            assert!(
                is_known,
                "{what}: sector {sector} (block {}) has {:x?}.., not {:x?}.. or any of {} older",
                sector / 8,
                &left[..8],
                &self.now[range.start..range.start + 8],
                older.len()
            );
            let before = self.now[range.clone()].to_vec();
            if before != left {
                older.push(before);
                self.now[range].copy_from_slice(left);
            }
        }
    }
}

/// An overlay, the medium under it, and what it must hold.
pub(crate) struct Bench {
    pub(crate) folder: SimFolder,
    pub(crate) overlay: Option<Overlay>,
    pub(crate) config: OverlayConfig,
    pub(crate) model: Model,
    /// The bases by their labels: a description may name an old one or the new one.
    bases: Vec<Vec<u8>>,
    /// The one that the overlay lies over.
    base: usize,
    sealed: Option<(dormouse_live::overlay::Sealed, Vec<u8>)>,
    /// Whether a request failed and the model does not know yet what it did.
    pub(crate) is_in_doubt: bool,
}

impl Bench {
    pub(crate) fn new(folder: SimFolder, zero_blocks: ZeroBlocks) -> Result<Bench> {
        // Logs are written anew all the time.
        let config = OverlayConfig { zero_blocks, log_bytes_min: 0 };
        let base = first_base();
        let new = NewOverlay {
            size_bytes: SIZE as u64,
            base: Arc::new(BytesBase(base.clone())),
            base_label: "0".to_owned(),
        };
        let overlay = Some(Overlay::create(Arc::new(folder.clone()), new, config)?);
        let model = Model::new();
        Ok(Bench {
            folder,
            overlay,
            config,
            model,
            bases: vec![base],
            base: 0,
            sealed: None,
            is_in_doubt: false,
        })
    }

    pub(crate) fn overlay(&self) -> &Overlay {
        self.overlay.as_ref().unwrap()
    }

    pub(crate) fn read_all(&self) -> Vec<u8> {
        let mut all = vec![0xee; SIZE];
        self.overlay().read_at(&mut all, 0).unwrap();
        all
    }

    /// Runs an operation; the first error of the medium ends it half way.
    pub(crate) fn run(&mut self, op: &Op) -> Result<()> {
        self.try_run(op).inspect_err(|_| self.is_in_doubt = true)
    }

    fn try_run(&mut self, op: &Op) -> Result<()> {
        self.model.version = self.model.version.wrapping_add(2);
        let version = self.model.version;
        match *op {
            Op::Write { at, len } => self.write(at, &pattern(at, len, version)),
            Op::WriteZeroBytes { at, len } => self.write(at, &vec![0; len]),
            Op::WriteMixed { at, len } => {
                let mut bytes = pattern(at, len, version);
                for (index, block) in bytes.chunks_mut(4096).enumerate() {
                    if index % 3 != usize::from(version) % 3 {
                        block.fill(0);
                    }
                }
                self.write(at, &bytes)
            }
            Op::Zero { at, len, keep } => {
                let zeroing = if keep { Zeroing::Keep } else { Zeroing::Free };
                self.model.change(at, &vec![0; len]);
                self.overlay().write_zeroes(at as u64, len as u64, zeroing)
            }
            Op::Trim { at, len } => {
                self.model.change(at, &vec![0; len]);
                self.overlay().trim(at as u64, len as u64)
            }
            Op::Flush => {
                self.overlay().flush()?;
                self.model.flushed();
                Ok(())
            }
            Op::Durably { at, len } => {
                let bytes = pattern(at, len, version);
                self.model.change(at, &bytes);
                self.overlay().write_durably(&bytes, at as u64)?;
                self.model.flushed();
                Ok(())
            }
            Op::Seal => {
                if self.sealed.is_some() {
                    let busy = self.overlay().seal().unwrap_err();
                    assert_eq!(busy.kind(), ErrorKind::Busy);
                    return Ok(());
                }
                let sealed = self.overlay().seal()?;
                self.sealed = Some((sealed, self.model.now.clone()));
                Ok(())
            }
            Op::Commit => {
                let Some((sealed, expected)) = self.sealed.take() else { return Ok(()) };
                // As a store would: the old base, with what the seal says on top.
                let mut base = self.bases[self.base].clone();
                base.resize(SIZE, 0);
                let mut last = 0;
                sealed.for_each_run(&mut |range, run| {
                    let bytes =
                        usize::try_from(range.start).unwrap()..usize::try_from(range.end).unwrap();
                    assert!(bytes.start < bytes.end && last <= bytes.start, "{range:?}");
                    last = bytes.end;
                    match run {
                        SealedRun::Zero => base[bytes].fill(0),
                        SealedRun::Dirty => sealed.read_at(&mut base[bytes], range.start)?,
                    }
                    Ok(())
                })?;
                assert!(base == expected, "the export is not what was sealed");
                let mut read = vec![1; SIZE];
                sealed.read_at(&mut read, 0)?;
                assert!(read == expected, "the sealed layers read as something else");
                self.bases.push(base.clone());
                let label = (self.bases.len() - 1).to_string();
                // After an error it goes on over the old base until it is opened again.
                self.overlay().rebase(sealed, Arc::new(BytesBase(base)), &label)?;
                self.base = self.bases.len() - 1;
                Ok(())
            }
            Op::FailCommit => {
                self.sealed = None;
                Ok(())
            }
            Op::Reopen => {
                let is_poisoned = self.overlay().status().unwrap().is_poisoned;
                self.forget();
                self.open()?;
                let left = self.read_all();
                if !is_poisoned && !self.is_in_doubt {
                    // A killed process loses nothing that it answered.
                    let differ = left.iter().zip(&self.model.now).position(|(a, b)| a != b);
                    assert_eq!(differ, None, "an answered write was lost with its process");
                }
                self.adopt(&left, "a reopening");
                Ok(())
            }
            Op::Cut { survive } => {
                self.folder.cut_after_with(0, LastStep::Undone);
                self.cut(survive);
                Ok(())
            }
        }
    }

    fn write(&mut self, at: usize, bytes: &[u8]) -> Result<()> {
        self.model.change(at, bytes);
        self.overlay().write_at(bytes, at as u64)
    }

    /// Checks what is left of the disk, and goes on from there.
    pub(crate) fn adopt(&mut self, left: &[u8], what: &str) {
        self.model.adopt(left, what);
        self.is_in_doubt = false;
    }

    /// Ends the process, as it were.
    pub(crate) fn forget(&mut self) {
        self.sealed = None;
        self.overlay = None;
    }

    /// Goes on with what the power cut left.
    pub(crate) fn cut(&mut self, survive: u64) {
        self.forget();
        let survive = match survive % 8 {
            0 => Survive::Nothing,
            1 => Survive::Everything,
            _ => Survive::Random(survive),
        };
        self.folder = self.folder.after_power_cut(survive);
        self.open().unwrap();
        let left = self.read_all();
        self.adopt(&left, &format!("{survive:?}"));
        // It is on the medium, whatever the model thought of before.
        self.model.flushed();
    }

    pub(crate) fn open(&mut self) -> Result<()> {
        let bases = self.bases.clone();
        let folder: Arc<dyn Folder> = Arc::new(self.folder.clone());
        let overlay = Overlay::open(folder, self.config, |description| {
            assert_eq!(description.size_bytes, SIZE as u64);
            let number: usize = description.base_label.parse().unwrap();
            Ok(Arc::new(BytesBase(bases[number].clone())))
        })?;
        let number: usize = Overlay::describe(&self.folder).unwrap().base_label.parse().unwrap();
        self.bases.truncate(number + 1);
        self.base = number;
        self.overlay = Some(overlay);
        Ok(())
    }

    /// Goes on with what the kernel has after the process died in the middle of an operation.
    pub(crate) fn die(&mut self, before: &[u8]) {
        self.forget();
        self.folder.after_death_of_process();
        self.open().unwrap();
        let left = self.read_all();
        for (sector, bytes) in left.chunks(SECTOR).enumerate() {
            let at = sector * SECTOR..sector * SECTOR + bytes.len();
            let is_known = *bytes == self.model.now[at.clone()] || *bytes == before[at];
            assert!(is_known, "sector {sector} was answered and is lost with the process");
        }
        self.adopt(&left, "the death of a process");
    }

    /// Puts another bench's medium under this one, as it is.
    pub(crate) fn take_medium(&mut self, other: &Bench) {
        self.overlay = None;
        self.folder = other.folder.clone();
        self.bases.clone_from(&other.bases);
        self.base = other.base;
    }

    /// The whole disk, and what its runs say about it.
    pub(crate) fn check(&self) {
        let all = self.read_all();
        let differ = all.iter().zip(&self.model.now).position(|(a, b)| a != b);
        assert_eq!(differ, None, "the disk is not the model");
        let mut at = 0;
        self.overlay()
            .for_each_run(0..SIZE as u64, &mut |range, run| {
                assert_eq!(range.start, at);
                at = range.end;
                if matches!(run, DiskRun::Zero | DiskRun::Base(RunKind::Zero)) {
                    let bytes =
                        usize::try_from(range.start).unwrap()..usize::try_from(range.end).unwrap();
                    assert!(all[bytes].iter().all(|byte| *byte == 0), "{range:?} is not zero");
                }
                Ok(())
            })
            .unwrap();
        assert_eq!(at, SIZE as u64);
    }
}

fn range() -> impl Strategy<Value = (usize, usize)> {
    let near = |border: usize| border.saturating_sub(600)..=(border + 600).min(SIZE);
    let start = prop_oneof![
        3 => (0..SIZE / 4096).prop_map(|block| block * 4096),
        2 => 0..SIZE,
        1 => near(64 * 4096),
        1 => near(BASE_SIZE),
        1 => near(SIZE),
        2 => 0..8 * 4096_usize,
    ];
    let len = prop_oneof![
        3 => (1..20_usize).prop_map(|blocks| blocks * 4096),
        3 => 1..9000_usize,
        1 => (1..12_usize).prop_map(|sectors| sectors * 512),
        1 => 1..SIZE,
    ];
    (start, len).prop_map(|(start, len)| (start, len.min(SIZE - start)))
}

pub(crate) fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        8 => range().prop_map(|(at, len)| Op::Write { at, len }),
        2 => range().prop_map(|(at, len)| Op::WriteZeroBytes { at, len }),
        4 => range().prop_map(|(at, len)| Op::WriteMixed { at, len }),
        4 => (range(), any::<bool>()).prop_map(|((at, len), keep)| Op::Zero { at, len, keep }),
        3 => range().prop_map(|(at, len)| Op::Trim { at, len }),
        4 => Just(Op::Flush),
        1 => range().prop_map(|(at, len)| Op::Durably { at, len }),
        3 => Just(Op::Seal),
        2 => Just(Op::Commit),
        3 => Just(Op::FailCommit),
        2 => Just(Op::Reopen),
        3 => any::<u64>().prop_map(|survive| Op::Cut { survive }),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, ..ProptestConfig::default() })]

    /// Three thousand operations and more in a run of the tests.
    #[test]
    fn any_history_reads_as_the_model(
        ops in prop::collection::vec(op(), 1..70),
        found in any::<bool>(),
        seed in any::<u64>(),
    ) {
        let zero_blocks = if found { ZeroBlocks::Found } else { ZeroBlocks::Written };
        let mut bench = Bench::new(SimFolder::new(seed), zero_blocks).unwrap();
        for op in &ops {
            bench.run(op).unwrap();
            bench.check();
        }
    }
}
