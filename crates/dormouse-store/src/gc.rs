//! Forgetting: which snapshots to keep, which packs nothing needs, which files to write again.

mod collect;
mod compact;
mod prune;

use std::str::FromStr;

use serde::Serialize;

use crate::error::{Error, ErrorKind, Result};

pub(crate) use collect::gc;
pub(crate) use compact::compact;
pub(crate) use prune::prune;

/// Which snapshots of a name `prune` keeps: those that any rule keeps. The newest is always kept.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct KeepRules {
    /// The so many newest.
    pub last: usize,

    /// The newest of each of the so many newest hours, days, weeks, months and years that have any.
    pub hourly: usize,

    /// See `hourly`.
    pub daily: usize,

    /// See `hourly`.
    pub weekly: usize,

    /// See `hourly`.
    pub monthly: usize,

    /// See `hourly`.
    pub yearly: usize,
}

impl FromStr for KeepRules {
    type Err = Error;

    /// Reads `last=5,hourly=24,daily=7`.
    fn from_str(text: &str) -> Result<KeepRules> {
        let refuse = |why: String| Error::new(ErrorKind::InvalidInput, why);
        let mut rules = KeepRules::default();
        for rule in text.split(',') {
            let (key, count) = rule
                .split_once('=')
                .ok_or_else(|| refuse(format!("{rule:?} is not RULE=COUNT, such as last=5")))?;
            let count: usize = count
                .parse()
                .ok()
                .filter(|&count| count > 0)
                .ok_or_else(|| refuse(format!("{rule:?} wants a count from 1")))?;
            let field = match key {
                "last" => &mut rules.last,
                "hourly" => &mut rules.hourly,
                "daily" => &mut rules.daily,
                "weekly" => &mut rules.weekly,
                "monthly" => &mut rules.monthly,
                "yearly" => &mut rules.yearly,
                _ => {
                    return Err(refuse(format!(
                        "{key:?} is no rule; there are last, hourly, daily, weekly, monthly, yearly"
                    )));
                }
            };
            if *field != 0 {
                return Err(refuse(format!("{key} is given twice")));
            }
            *field = count;
        }
        Ok(rules)
    }
}

/// What `prune` did, as `NAME@N`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct PruneReport {
    /// Kept, oldest first, with the rules that keep each.
    pub kept: Vec<(String, Vec<String>)>,

    /// Removed, oldest first.
    pub removed: Vec<String>,
}

/// How to collect.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct GcOptions {
    /// Only tell what would go.
    pub dry_run: bool,
}

/// What `gc` did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct GcReport {
    /// Packs that are needed.
    pub live_packs: u64,

    /// Pack files that were deleted.
    pub deleted_files: u64,

    /// Bytes that they took on the disk.
    pub deleted_bytes: u64,

    /// Temporary files and pins of dead processes, and traces of snapshots that are gone, that were
    /// swept.
    pub swept: u64,

    /// Index runs before and after.
    pub index_runs_before: u64,

    /// See `index_runs_before`.
    pub index_runs_after: u64,

    /// Bytes in packs that stay but hold slots which nothing refers to; `compact` frees them.
    pub dead_bytes: u64,
}

/// Which pack files to write again.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct CompactOptions {
    /// Those of which at least this part is dead, from 0 to 1.
    pub dead_ratio: f64,

    /// Those under this size are gathered into bundles.
    pub small_bytes: u64,

    /// No bundle is longer than this, unless one pack is.
    pub bundle_bytes: u64,

    /// Only tell what would be done.
    pub dry_run: bool,
}

impl CompactOptions {
    /// A third dead; files under 16 MiB gathered into bundles of up to 256 MiB.
    pub const STANDARD: CompactOptions = CompactOptions {
        dead_ratio: 0.33,
        small_bytes: 16 << 20,
        bundle_bytes: 256 << 20,
        dry_run: false,
    };
}

/// What `compact` did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct CompactReport {
    /// Pack files before and after.
    pub files_before: u64,

    /// See `files_before`.
    pub files_after: u64,

    /// Bytes of pack files before and after.
    pub bytes_before: u64,

    /// See `bytes_before`.
    pub bytes_after: u64,

    /// Packs that were written again.
    pub rewritten_packs: u64,
}
