//! Walks the maps of snapshots and goes on past damage.

use std::collections::{BTreeMap, HashSet};

use dormouse_image::map::{Map, Node, NodeRef, NodeSource, Source};
use dormouse_image::pack::{Live, PackId};

use crate::packs::Packs;
use crate::reach::{check_level, check_slots};

/// What some maps need, by pack.
pub(super) struct Walk<'a> {
    packs: &'a Packs,
    needed: BTreeMap<PackId, Needed>,
    /// Nodes that were read and are what they should be.
    sound: HashSet<NodeRef>,
}

/// What of a pack is needed.
#[derive(Default)]
pub(super) struct Needed {
    /// Slots below the pack's number of them, and nodes.
    pub(super) live: Live,

    /// Slots that the pack never had, as first and length.
    pub(super) strays: Vec<(u32, u32)>,

    /// Nodes that cannot be read, and why.
    pub(super) damaged: BTreeMap<u32, String>,

    /// Slots that the pack has; none if it cannot be opened.
    slots: Option<u32>,
}

impl<'a> Walk<'a> {
    pub(super) fn new(packs: &'a Packs) -> Walk<'a> {
        Walk { packs, needed: BTreeMap::new(), sound: HashSet::new() }
    }

    /// Takes in all that a map reaches.
    pub(super) fn add_map(&mut self, map: &Map) {
        if let Some(root) = map.root {
            self.node(root, map.level());
        }
    }

    /// The packs that are needed.
    pub(super) fn packs(&self) -> impl Iterator<Item = PackId> + '_ {
        self.needed.keys().copied()
    }

    /// What of a pack is needed.
    pub(super) fn needed(&self, pack: PackId) -> Option<&Needed> {
        self.needed.get(&pack)
    }

    /// Whether a node was read already.
    pub(super) fn is_sound(&self, at: NodeRef) -> bool {
        self.sound.contains(&at)
    }

    fn node(&mut self, at: NodeRef, level: u8) {
        if self.sound.contains(&at) || self.pack(at.pack).damaged.contains_key(&at.node) {
            return;
        }
        let node = self.packs.node(at).and_then(|node| check_level(&node, level).map(|()| node));
        let node = match node {
            Ok(node) => node,
            Err(error) => {
                self.pack(at.pack).damaged.insert(at.node, error.to_string());
                return;
            }
        };
        self.sound.insert(at);
        self.pack(at.pack).live.add_node(at.node);
        match node {
            Node::Inner(inner) => {
                inner.children.iter().flatten().for_each(|&child| self.node(child, level - 1));
            }
            Node::Leaf(leaf) => {
                for extent in leaf.iter() {
                    if let Source::Stored { pack, slot } = extent.source {
                        let needed = self.pack(pack);
                        match needed.slots {
                            Some(slots) if check_slots(pack, slot, extent.len, slots).is_err() => {
                                needed.strays.push((slot, extent.len));
                            }
                            Some(_) => needed.live.add_slots(slot, extent.len),
                            None => {}
                        }
                    }
                }
            }
        }
    }

    fn pack(&mut self, pack: PackId) -> &mut Needed {
        let packs = self.packs;
        self.needed.entry(pack).or_insert_with(|| Needed {
            slots: packs.reader(pack).ok().map(|reader| reader.toc().slots),
            ..Needed::default()
        })
    }
}
