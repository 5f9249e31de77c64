//! Checking a store, and mending what can be mended.
//!
//! First the maps of all snapshots are walked, each node once; that tells what of each pack is
//! needed. Then the packs are checked one by one, by several threads. What is damaged is looked up
//! in the maps only afterwards, so that a sound store is walked once. Mending comes last: tables and
//! segments first, then the index, then blocks, which are found by it.

mod check;
mod finding;
mod repair;
mod touches;
mod walk;

use std::collections::BTreeSet;
use std::io;
use std::sync::atomic::{AtomicUsize, Ordering};

use dormouse_image::pack::PackId;
use serde::Serialize;

use crate::error::{Context, ErrorKind, Result};
use crate::layout::{self, KEYS, PACKS, PARAMETERS, manifest_path};
use crate::manifest::{ImageEntry, Manifest};
use crate::name::{ImageName, SnapRef};
use crate::pin::Pin;
use crate::progress::Job;
use crate::store::{Listing, Store};

use check::{Checked, PackCheck};
use finding::{Finding, Findings, describe};
use repair::Mender;
use walk::Walk;

/// What to check.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct VerifyOptions {
    /// One snapshot; none checks the whole store.
    pub snap: Option<SnapRef>,

    /// Decode every frame and check every digest, not only structure.
    pub deep: bool,

    /// Mend: rebuild lost tables and the index, and with `deep` take damaged blocks from equal ones
    /// elsewhere. What was mended is looked at again, so the report tells how the store is now.
    pub repair: bool,
}

/// What was found.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct VerifyReport {
    /// Snapshots that were checked.
    pub snapshots: u64,

    /// Packs that were checked.
    pub packs: u64,

    /// Frames that were decoded.
    pub frames: u64,

    /// Bytes that were read.
    pub read_bytes: u64,

    /// What is wrong, empty if nothing is.
    pub problems: Vec<Problem>,

    /// What is not wrong but worth knowing, such as packs that no index run covers.
    pub notes: Vec<String>,
}

/// One thing that is wrong.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Problem {
    /// The file.
    pub path: String,

    /// What is wrong with it.
    pub what: String,

    /// The images that it touches.
    pub touches: Vec<Damage>,

    /// Whether it was mended.
    pub repaired: bool,
}

/// Bytes of an image that cannot be read.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Damage {
    /// `NAME@N`.
    pub snapshot: String,

    /// The image.
    pub image: ImageName,

    /// The first byte.
    pub offset: u64,

    /// Bytes.
    pub length: u64,
}

/// What a verification looks at, and what it found so far.
struct Verification<'a> {
    store: &'a Store,
    options: &'a VerifyOptions,
    job: Job<'a>,
    manifests: Vec<Manifest>,
    report: VerifyReport,
}

/// How often mending begins anew because something was mended: below a mended node others show.
const ROUNDS_MAX: usize = 8;

/// Checks a store or a snapshot; see [`Store::verify`].
pub(crate) fn verify(store: &Store, options: &VerifyOptions, job: Job<'_>) -> Result<VerifyReport> {
    if !options.repair {
        return verify_once(store, options, None, job);
    }
    let mender = Mender::new(store, job)?;
    let mut mended = Vec::new();
    let mut notes = Vec::new();
    let mut round = 0;
    loop {
        round += 1;
        let mut report = verify_once(store, options, Some(&mender), job)?;
        notes.append(&mut report.notes);
        let (repaired, left): (Vec<_>, Vec<_>) =
            report.problems.into_iter().partition(|problem| problem.repaired);
        let is_last = repaired.is_empty() || round == ROUNDS_MAX;
        mended.extend(repaired);
        if is_last {
            // What is left was looked at after the last change.
            mended.extend(left);
            notes.dedup();
            return Ok(VerifyReport { problems: mended, notes, ..report });
        }
    }
}

fn verify_once(
    store: &Store,
    options: &VerifyOptions,
    mender: Option<&Mender<'_>>,
    job: Job<'_>,
) -> Result<VerifyReport> {
    // What was read before is not what lies on the disk now.
    store.packs().forget_all();
    let report = VerifyReport::default();
    let mut verification = Verification { store, options, job, manifests: Vec::new(), report };
    verification.parameters()?;
    // Held until the end, so that a collection takes nothing away that is being looked at.
    let _pin = verification.read_manifests()?;
    let mut findings = verification.check_packs()?;
    if let Some(mender) = mender {
        mender.mend_packs(&mut findings)?;
    }
    let index = match options.snap {
        None => verification.check_index(mender)?,
        Some(_) => Vec::new(),
    };
    if let Some(mender) = mender {
        mender.mend_blocks(&mut findings)?;
        store.packs().forget_all();
    }
    findings.find_touched(store.packs(), &verification.manifests, job)?;
    let mut report = verification.report;
    report.problems.extend(findings.into_problems());
    report.problems.extend(index);
    Ok(report)
}

impl Verification<'_> {
    fn problem(&mut self, path: impl Into<String>, what: impl Into<String>) {
        self.report.problems.push(Problem {
            path: path.into(),
            what: what.into(),
            touches: Vec::new(),
            repaired: false,
        });
    }

    fn parameters(&mut self) -> Result<()> {
        let disk = self.store.disk();
        let key_id = match layout::open(&**disk) {
            Ok((parameters, _)) => parameters.key_id,
            Err(error) => {
                let path = if error.kind() == ErrorKind::Key { KEYS } else { PARAMETERS };
                self.problem(path, describe(&error));
                return Ok(());
            }
        };
        let path = format!("{KEYS}/{key_id}");
        match disk.open(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                self.problem(path, "the key is lost: no block can be read, put it back");
            }
            _ if self.options.deep && self.store.packs().key().is_err() => {
                self.problem(path, "the key cannot be read: digests are not checked");
            }
            _ => {}
        }
        Ok(())
    }

    /// Reads the manifests and pins what they name, where the store may be written to.
    fn read_manifests(&mut self) -> Result<Option<Pin>> {
        let before = self.list()?.snapshots;
        let pin = Pin::new(self.store.disk(), "verify").and_then(|pin| {
            let maps = before
                .iter()
                .flat_map(|manifest| &manifest.images)
                .map(ImageEntry::map)
                .collect::<Result<Vec<_>>>()?;
            pin.hold_roots(maps, || Ok(()))?;
            Ok(pin)
        });
        let pin = pin.inspect_err(|error| tracing::debug!(%error, "verifying without a pin")).ok();
        // What was removed before it was pinned may be gone, and what is newer is not pinned.
        let pinned: BTreeSet<_> = before.iter().map(|manifest| manifest.uuid).collect();
        let listing = self.list()?;
        self.manifests = listing.snapshots;
        self.manifests.retain(|manifest| pinned.contains(&manifest.uuid));
        for (name, error) in listing.damaged {
            let path = match name.parse() {
                Ok(SnapRef { name, number }) => manifest_path(&name, number.unwrap_or(0)),
                Err(_) => name,
            };
            self.problem(path, describe(&error));
        }
        self.report.snapshots = self.manifests.len() as u64;
        Ok(pin)
    }

    /// The manifests that are asked for.
    fn list(&self) -> Result<Listing> {
        let Some(snap) = &self.options.snap else { return self.store.list(None) };
        let number = self.store.catalog().resolve(snap)?;
        let snap = SnapRef { name: snap.name.clone(), number: Some(number) };
        match self.store.manifest(&snap) {
            Ok(manifest) => Ok(Listing { snapshots: vec![manifest], damaged: Vec::new() }),
            Err(error) if error.kind() == ErrorKind::NotFound => Err(error),
            Err(error) => {
                Ok(Listing { snapshots: Vec::new(), damaged: vec![(snap.to_string(), error)] })
            }
        }
    }

    /// Walks the maps, then checks the packs.
    fn check_packs(&mut self) -> Result<Findings> {
        let packs = self.store.packs();
        self.job.progress.begin("maps", None);
        let mut walk = Walk::new(packs);
        for manifest in &self.manifests {
            for entry in &manifest.images {
                self.job.check()?;
                walk.add_map(&entry.map()?);
            }
        }
        let mut findings = Findings::default();
        let mut wanted: BTreeSet<PackId> = walk.packs().collect();
        if self.options.snap.is_none() {
            let (own, bundles) = packs.list().context(|| format!("cannot list {PACKS}"))?;
            wanted.extend(own);
            for path in bundles {
                match packs.bundle(&path) {
                    Ok(bundle) => wanted.extend(bundle.entries.iter().map(|entry| entry.pack)),
                    Err(error) => findings.add(Finding::bundle(path, describe(&error))),
                }
            }
        }
        let wanted: Vec<PackId> = wanted.into_iter().collect();
        let total: u64 =
            wanted.iter().filter_map(|&pack| packs.place(pack).ok()).map(|place| place.bytes).sum();
        self.job.progress.begin("verify", Some(total));
        let check = PackCheck {
            packs,
            walk: &walk,
            deep: self.options.deep && packs.key().is_ok(),
            all: self.options.snap.is_none(),
            job: self.job,
        };
        let next = AtomicUsize::new(0);
        let work = || -> Result<Checked> {
            let mut checked = Checked::default();
            while let Some(&pack) = wanted.get(next.fetch_add(1, Ordering::Relaxed)) {
                check.pack(pack, &mut checked)?;
            }
            Ok(checked)
        };
        let results: Vec<Result<Checked>> = std::thread::scope(|scope| {
            let threads = self.store.threads().clamp(1, wanted.len().max(1));
            let others: Vec<_> = (1..threads).map(|_| scope.spawn(work)).collect();
            let mut results = vec![work()];
            results.extend(others.into_iter().map(|other| {
                other.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
            }));
            results
        });
        for result in results {
            let checked = result?;
            self.report.packs += checked.packs;
            self.report.frames += checked.frames;
            self.report.read_bytes += checked.read_bytes;
            checked.findings.into_iter().for_each(|finding| findings.add(finding));
        }
        findings.sort();
        Ok(findings)
    }

    /// Checks the runs of the index and that they cover every pack; mends it with a mender.
    fn check_index(&mut self, mender: Option<&Mender<'_>>) -> Result<Vec<Problem>> {
        self.job.progress.begin("index", None);
        let found = self.store.index().check(self.job)?;
        self.report.read_bytes += found.read_bytes;
        let mut problems: Vec<Problem> = found
            .damaged
            .iter()
            .map(|(path, error)| Problem {
                path: path.clone(),
                what: describe(error),
                touches: Vec::new(),
                repaired: false,
            })
            .collect();
        let packs = self.store.packs();
        let (own, bundles) = packs.list().context(|| format!("cannot list {PACKS}"))?;
        let mut there: BTreeSet<PackId> = own.into_iter().collect();
        for bundle in bundles.iter().filter_map(|path| packs.bundle(path).ok()) {
            there.extend(bundle.entries.iter().map(|entry| entry.pack));
        }
        let uncovered: Vec<PackId> =
            there.into_iter().filter(|pack| !found.covered.contains(pack)).collect();
        if let Some(mender) = mender {
            let paths: Vec<String> = found.damaged.into_iter().map(|(path, _)| path).collect();
            let left = mender.mend_index(&paths, &uncovered)?;
            problems.iter_mut().for_each(|problem| problem.repaired = true);
            if !uncovered.is_empty() {
                self.report.notes.push(format!(
                    "{} packs were not in the index; {} of them are now",
                    uncovered.len(),
                    uncovered.len() - left
                ));
            }
        } else if !uncovered.is_empty() {
            self.report.notes.push(format!(
                "{} packs are not in the index, so their blocks may be stored again; `dormouse gc` \
                 adds them",
                uncovered.len()
            ));
        }
        Ok(problems)
    }
}
