//! Counts who refers to what, one snapshot after the other.
//!
//! Every node and slot has a count of references from the snapshot that is held. Going on to the
//! next one holds its roots first and lets go of the old ones then: where they share a node its
//! count goes up and down again, and nothing below it is entered. So a lineage costs what differs
//! between its generations. When a count leaves 0 or gets there, a stretch of snapshots begins or
//! ends that use the node or slot; one whose only stretch is one snapshot long is that snapshot's
//! own.
//!
//! Memory: 8 bytes for each slot and node that is reached, and 4 for each frame.

use std::collections::{HashMap, HashSet};

use dormouse_image::error::Result;
use dormouse_image::map::{Leaf, Map, Node, NodeRef, NodeSource, Source};
use dormouse_image::pack::{FRAME_BLOCKS, PackId, SEGMENT_SLOTS};

use crate::packs::Packs;
use crate::reach::{check_level, check_slots};

/// Stored bytes are counted in sixteenths: a full frame has sixteen blocks.
const PARTS: u64 = 16;

/// The value of [`Use::since`] for what several snapshots use.
const SEVERAL: u32 = u32::MAX;

/// Who uses a node or slot.
#[derive(Clone, Copy, Default)]
struct Use {
    /// References from the snapshot that is held.
    count: u32,
    /// 0 for nobody ever, the number of the first snapshot from 1, or [`SEVERAL`].
    since: u32,
}

impl Use {
    /// Counts a reference from snapshot `now`; true if it is the first.
    fn hold(&mut self, now: u32) -> bool {
        self.count += 1;
        if self.count > 1 {
            return false;
        }
        self.since = if self.since == 0 { now } else { SEVERAL };
        true
    }

    /// Takes back a reference of the snapshot before `now`; true if it was the last.
    fn release(&mut self, now: u32) -> bool {
        self.count -= 1;
        if self.count > 0 {
            return false;
        }
        if self.since != SEVERAL && self.since + 1 != now {
            self.since = SEVERAL;
        }
        true
    }
}

/// Sixteenths of bytes that the blocks of a pack take.
enum Weights {
    /// Of a pack without dropped slots: for each sixteen slots.
    Frames(Vec<u32>),
    /// Of any other: for each slot.
    Slots(Vec<u32>),
}

impl Weights {
    fn of(&self, slot: usize) -> u64 {
        let weight = match self {
            Weights::Frames(frames) => frames.get(slot / FRAME_BLOCKS),
            Weights::Slots(slots) => slots.get(slot),
        };
        u64::from(weight.copied().unwrap_or(0))
    }
}

struct PackTally {
    slots: Vec<Use>,
    nodes: Vec<Use>,
    weights: Weights,
    node_bytes: Vec<u32>,
}

/// The counts of a store.
pub(super) struct Tally<'a> {
    packs: &'a Packs,
    /// `None` for packs that cannot be read.
    tallies: HashMap<PackId, Option<PackTally>>,
    /// Nodes that could not be read: nothing below them was held, so nothing must be let go.
    unreadable: HashSet<NodeRef>,
    /// Nodes with something below them that could not be read, or that are themselves.
    tainted: HashSet<NodeRef>,
    held: Vec<Map>,
    snapshots: u32,
    now: u64,
}

/// What a snapshot holds.
#[derive(Clone, Copy, Debug)]
pub(super) struct Held {
    /// Stored bytes.
    pub(super) bytes: u64,

    /// Whether something could not be read, so that it is more.
    pub(super) is_damaged: bool,
}

impl<'a> Tally<'a> {
    pub(super) fn new(packs: &'a Packs) -> Tally<'a> {
        Tally {
            packs,
            tallies: HashMap::new(),
            unreadable: HashSet::new(),
            tainted: HashSet::new(),
            held: Vec::new(),
            snapshots: 0,
            now: 0,
        }
    }

    /// Goes on to the snapshot with these maps.
    pub(super) fn snapshot(&mut self, maps: &[Map]) -> Held {
        self.snapshots += 1;
        let mut is_damaged = false;
        for map in maps {
            is_damaged |= self.change(map, true);
        }
        for map in std::mem::replace(&mut self.held, maps.to_vec()) {
            self.change(&map, false);
        }
        Held { bytes: self.now / PARTS, is_damaged }
    }

    /// Counts a pack and all that is in it among what is needed.
    pub(super) fn keep(&mut self, pack: PackId) {
        if let Some(tally) = self.pack(pack) {
            for used in tally.slots.iter_mut().chain(&mut tally.nodes) {
                used.since = SEVERAL;
            }
        }
    }

    /// Whether everything that was asked for could be read.
    pub(super) fn is_complete(&self) -> bool {
        self.tainted.is_empty()
    }

    /// Whether anything of a pack is needed.
    pub(super) fn contains(&self, pack: PackId) -> bool {
        self.tallies.contains_key(&pack)
    }

    /// For each snapshot, stored bytes that no other uses. None may be held any more.
    pub(super) fn unique_bytes(&self) -> Vec<u64> {
        let mut parts = vec![0; self.snapshots as usize + 1];
        self.for_each(&mut |since, weight| {
            if since != 0 && since != SEVERAL {
                parts[since as usize] += weight;
            }
        });
        parts.into_iter().skip(1).map(|parts| parts / PARTS).collect()
    }

    /// Stored bytes that any snapshot so far uses.
    pub(super) fn live_bytes(&self) -> u64 {
        self.sum(|since| since != 0)
    }

    /// Stored bytes that none uses, in packs of which something is used.
    pub(super) fn dead_bytes(&self) -> u64 {
        self.sum(|since| since == 0)
    }

    fn sum(&self, wanted: impl Fn(u32) -> bool) -> u64 {
        let mut parts = 0;
        self.for_each(&mut |since, weight| {
            if wanted(since) {
                parts += weight;
            }
        });
        parts / PARTS
    }

    fn for_each(&self, visit: &mut dyn FnMut(u32, u64)) {
        for tally in self.tallies.values().flatten() {
            for (slot, used) in tally.slots.iter().enumerate() {
                visit(used.since, tally.weights.of(slot));
            }
            for (used, &bytes) in tally.nodes.iter().zip(&tally.node_bytes) {
                visit(used.since, u64::from(bytes) * PARTS);
            }
        }
    }

    /// Holds or lets go of a map; true if something in it cannot be read.
    fn change(&mut self, map: &Map, hold: bool) -> bool {
        map.root.is_some_and(|root| self.node(root, map.level(), hold))
    }

    fn node(&mut self, at: NodeRef, level: u8, hold: bool) -> bool {
        let now = self.snapshots;
        let number = at.node as usize;
        let known = self.pack(at.pack).and_then(|tally| {
            tally.nodes.get_mut(number).zip(tally.node_bytes.get(number).copied())
        });
        let Some((used, bytes)) = known else {
            self.tainted.insert(at);
            return true;
        };
        let turned = if hold { used.hold(now) } else { used.release(now) };
        if turned {
            self.weigh(u64::from(bytes) * PARTS, hold);
        }
        if !turned || self.unreadable.contains(&at) {
            return self.tainted.contains(&at);
        }
        let node = self.packs.node(at).and_then(|node| check_level(&node, level).map(|()| node));
        let is_damaged = match node {
            Ok(Node::Inner(inner)) => {
                let mut is_damaged = false;
                for &child in inner.children.iter().flatten() {
                    is_damaged |= self.node(child, level - 1, hold);
                }
                is_damaged
            }
            Ok(Node::Leaf(leaf)) => self.leaf(&leaf, hold),
            Err(error) => {
                tracing::warn!(pack = %at.pack, node = at.node, %error, "cannot read a map");
                self.unreadable.insert(at);
                true
            }
        };
        if is_damaged {
            self.tainted.insert(at);
        }
        is_damaged
    }

    fn leaf(&mut self, leaf: &Leaf, hold: bool) -> bool {
        let now = self.snapshots;
        let mut is_damaged = false;
        for extent in leaf.iter() {
            let Source::Stored { pack, slot } = extent.source else { continue };
            let known = self.pack(pack).filter(|tally| {
                let slots = u32::try_from(tally.slots.len()).unwrap_or(u32::MAX);
                check_slots(pack, slot, extent.len, slots).is_ok()
            });
            let Some(tally) = known else {
                is_damaged = true;
                continue;
            };
            let first = slot as usize;
            let mut weight = 0;
            for at in first..first + extent.len as usize {
                let used = &mut tally.slots[at];
                let turned = if hold { used.hold(now) } else { used.release(now) };
                if turned {
                    weight += tally.weights.of(at);
                }
            }
            self.weigh(weight, hold);
        }
        is_damaged
    }

    fn weigh(&mut self, weight: u64, hold: bool) {
        if hold {
            self.now += weight;
        } else {
            self.now -= weight;
        }
    }

    fn pack(&mut self, pack: PackId) -> Option<&mut PackTally> {
        let packs = self.packs;
        self.tallies
            .entry(pack)
            .or_insert_with(|| {
                PackTally::read(packs, pack)
                    .inspect_err(|error| tracing::warn!(%pack, %error, "cannot read a pack"))
                    .ok()
            })
            .as_mut()
    }
}

impl PackTally {
    fn read(packs: &Packs, pack: PackId) -> Result<PackTally> {
        let reader = packs.reader(pack)?;
        let toc = reader.toc();
        let slots = toc.slots as usize;
        let is_whole = toc.live_slots() == u64::from(toc.slots);
        let mut weights = vec![0; if is_whole { slots.div_ceil(FRAME_BLOCKS) } else { slots }];
        for (number, entry) in (0_u32..).zip(&toc.segments) {
            if entry.offset == 0 {
                continue;
            }
            let loaded = packs.segment(pack, number)?;
            let base = number as usize * SEGMENT_SLOTS as usize;
            for frame in 0..loaded.segment.frames() {
                let slots = loaded.segment.frame_slots(frame);
                let stored = u64::from(loaded.segment.frame_bytes(frame).unwrap_or(0));
                // A frame's record is limited to little over 64 KiB.
                let weight = u32::try_from(stored * PARTS / (slots.len() as u64).max(1));
                let weight = weight.unwrap_or(u32::MAX);
                for slot in slots {
                    let at = base + slot as usize;
                    weights[if is_whole { at / FRAME_BLOCKS } else { at }] = weight;
                }
            }
        }
        Ok(PackTally {
            slots: vec![Use::default(); slots],
            nodes: vec![Use::default(); toc.nodes.len()],
            weights: if is_whole { Weights::Frames(weights) } else { Weights::Slots(weights) },
            node_bytes: toc.nodes.iter().map(|node| node.bytes).collect(),
        })
    }
}
