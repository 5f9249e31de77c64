//! What was found damaged, before it is known whom it touches.

use std::collections::{BTreeSet, HashMap};
use std::error::Error as StdError;

use dormouse_image::pack::PackId;

use super::{Damage, Problem};

/// Which part of a pack is damaged.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Part {
    /// The directory of a bundle.
    Bundle,

    /// The pack is lost, or what is needed to open it.
    Whole,

    /// The digests of some slots.
    Segments,

    /// Blocks.
    Frames,

    /// Map nodes.
    Nodes,

    /// Slots that a map names and the pack does not have.
    Strays,
}

/// Something damaged.
#[derive(Clone, Debug)]
pub(super) struct Finding {
    pub(super) path: String,
    pub(super) pack: PackId,
    pub(super) part: Part,
    pub(super) what: String,
    /// First and length of the damaged slots, sorted and apart.
    pub(super) slots: Vec<(u32, u32)>,
    pub(super) nodes: BTreeSet<u32>,
    pub(super) touches: Vec<Damage>,
    pub(super) repaired: bool,
}

impl Finding {
    pub(super) fn new(path: &str, pack: PackId, part: Part, what: String) -> Finding {
        Finding {
            path: path.to_owned(),
            pack,
            part,
            what,
            slots: Vec::new(),
            nodes: BTreeSet::new(),
            touches: Vec::new(),
            repaired: false,
        }
    }

    pub(super) fn bundle(path: String, what: String) -> Finding {
        Finding::new(&path, PackId::SELF, Part::Bundle, what)
    }

    /// Adds damaged slots; those of one part of a pack come in order.
    pub(super) fn add_slots(&mut self, first: u32, len: u32) {
        match self.slots.last_mut() {
            Some(last) if last.0 + last.1 == first => last.1 += len,
            _ => self.slots.push((first, len)),
        }
    }

    /// Calls `visit` with the parts of a run of slots that are damaged.
    pub(super) fn damaged_slots(&self, slot: u32, len: u32, visit: &mut dyn FnMut(u32, u32)) {
        if self.part == Part::Whole {
            return visit(slot, len);
        }
        let (first, end) = (u64::from(slot), u64::from(slot) + u64::from(len));
        let begin =
            self.slots.partition_point(|&(at, len)| u64::from(at) + u64::from(len) <= first);
        for &(at, len) in &self.slots[begin..] {
            let from = u64::from(at).max(first);
            let to = (u64::from(at) + u64::from(len)).min(end);
            if from >= to {
                break;
            }
            // Both lie within the run of slots.
            visit(u32::try_from(from).unwrap_or(slot), u32::try_from(to - from).unwrap_or(len));
        }
    }
}

/// All that was found.
#[derive(Debug, Default)]
pub(super) struct Findings {
    pub(super) all: Vec<Finding>,
}

impl Findings {
    pub(super) fn add(&mut self, finding: Finding) {
        self.all.push(finding);
    }

    pub(super) fn sort(&mut self) {
        self.all.sort_by(|a, b| (a.part, &a.path, a.pack).cmp(&(b.part, &b.path, b.pack)));
    }

    /// The findings about each pack.
    pub(super) fn by_pack(&self) -> HashMap<PackId, Vec<usize>> {
        let mut by_pack: HashMap<PackId, Vec<usize>> = HashMap::new();
        for (number, finding) in self.all.iter().enumerate() {
            by_pack.entry(finding.pack).or_default().push(number);
        }
        by_pack
    }

    pub(super) fn into_problems(self) -> impl Iterator<Item = Problem> {
        self.all.into_iter().map(|finding| Problem {
            path: finding.path,
            what: finding.what,
            touches: finding.touches,
            repaired: finding.repaired,
        })
    }
}

/// An error with its causes in one line.
pub(super) fn describe(error: &dyn StdError) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}
