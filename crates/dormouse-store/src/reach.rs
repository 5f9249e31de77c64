//! What some maps reach: the walk that collection, usage and verification have in common.
//!
//! Maps share nodes, and a node that was entered once is not entered again, so marking thousands of
//! generations of a guest costs what differs between them.
//!
//! A pack that holds nothing but blocks may be lost or damaged without stopping the walk: it is
//! reached, but there is no telling its slots, so [`Reach::get`] has nothing to say of it and it is
//! neither deleted nor written again. A node that cannot be read does stop it, because what lies
//! below is unknown; the marks are incomplete then and of no use.

use std::collections::BTreeMap;

use dormouse_image::error::{Error as ImageError, Result as ImageResult};
use dormouse_image::map::{Map, Node, NodeRef, NodeSource, Source};
use dormouse_image::pack::{Live, PackId, SEGMENT_SLOTS};

use crate::error::{Context, Result};
use crate::manifest::Manifest;
use crate::packs::Packs;

/// The slots and nodes that some maps reach, by pack.
#[derive(Debug, Default)]
pub(crate) struct Reach {
    packs: BTreeMap<PackId, Reached>,
}

#[derive(Debug)]
struct Reached {
    live: Live,
    /// Slots that the pack has; none if it cannot be opened.
    slots: Option<u32>,
}

/// What of a pack's records is needed: together all of its file but header, table and footer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct PackBytes {
    /// Frames shared out evenly among their blocks, nodes, and segments that keep a slot.
    pub(crate) live: u64,

    /// The rest.
    pub(crate) dead: u64,

    /// Of the live bytes, those of frames.
    pub(crate) live_frames: u64,
}

impl Reach {
    /// Nothing yet.
    pub(crate) fn new() -> Reach {
        Reach::default()
    }

    /// Marks all that a snapshot's images reach.
    pub(crate) fn add_manifest(&mut self, packs: &Packs, manifest: &Manifest) -> Result<()> {
        for entry in &manifest.images {
            let what = || format!("the map of {}:{}", manifest.display_name(), entry.image);
            self.mark_map(packs, &entry.map()?).context(|| format!("cannot read {}", what()))?;
        }
        Ok(())
    }

    /// Marks all that a map reaches.
    pub(crate) fn add_map(&mut self, packs: &Packs, map: &Map) -> Result<()> {
        self.mark_map(packs, map).context(|| match map.root {
            Some(root) => {
                format!("cannot read the map below node {} of pack {}", root.node, root.pack)
            }
            None => "cannot read a map".to_owned(),
        })
    }

    /// The packs that are reached, ascending.
    pub(crate) fn packs(&self) -> impl Iterator<Item = PackId> + '_ {
        self.packs.keys().copied()
    }

    /// Whether a pack is reached.
    pub(crate) fn contains(&self, pack: PackId) -> bool {
        self.packs.contains_key(&pack)
    }

    /// What of a pack is reached; none if nothing is, or if the pack could not be opened.
    pub(crate) fn get(&self, pack: PackId) -> Option<&Live> {
        self.packs.get(&pack).filter(|reached| reached.slots.is_some()).map(|reached| &reached.live)
    }

    /// How the bytes of a pack's records divide into live and dead.
    pub(crate) fn bytes(&self, packs: &Packs, pack: PackId) -> Result<PackBytes> {
        let none = Live::new();
        let live = self.get(pack).unwrap_or(&none);
        pack_bytes(packs, pack, live).context(|| format!("cannot read pack {pack}"))
    }

    fn mark_map(&mut self, packs: &Packs, map: &Map) -> ImageResult<()> {
        map.root.map_or(Ok(()), |root| self.mark_node(packs, root, map.level()))
    }

    fn mark_node(&mut self, packs: &Packs, at: NodeRef, level: u8) -> ImageResult<()> {
        if self.packs.get(&at.pack).is_some_and(|reached| reached.live.has_node(at.node)) {
            return Ok(());
        }
        let node = packs.node(at)?;
        check_level(&node, level)?;
        // Its number is within limits: the node was read.
        self.reached(packs, at.pack).live.add_node(at.node);
        match node {
            Node::Inner(inner) => inner
                .children
                .iter()
                .flatten()
                .try_for_each(|&child| self.mark_node(packs, child, level - 1)),
            Node::Leaf(leaf) => leaf.iter().try_for_each(|extent| match extent.source {
                Source::Zero => Ok(()),
                Source::Stored { pack, slot } => self.mark_slots(packs, pack, slot, extent.len),
            }),
        }
    }

    fn mark_slots(&mut self, packs: &Packs, pack: PackId, slot: u32, len: u32) -> ImageResult<()> {
        let reached = self.reached(packs, pack);
        let Some(slots) = reached.slots else { return Ok(()) };
        check_slots(pack, slot, len, slots)?;
        reached.live.add_slots(slot, len);
        Ok(())
    }

    fn reached(&mut self, packs: &Packs, pack: PackId) -> &mut Reached {
        self.packs.entry(pack).or_insert_with(|| {
            let slots = match packs.reader(pack) {
                Ok(reader) => Some(reader.toc().slots),
                Err(error) => {
                    tracing::warn!(%pack, %error, "a pack that is referred to cannot be opened");
                    None
                }
            };
            Reached { live: Live::new(), slots }
        })
    }
}

/// Fails unless `node` stands where a tree wants a node of `level`.
pub(crate) fn check_level(node: &Node, level: u8) -> ImageResult<()> {
    let got = match node {
        Node::Leaf(_) => 0,
        Node::Inner(inner) => inner.level,
    };
    if got == level { Ok(()) } else { Err(ImageError::corrupt("map node level", got, level)) }
}

/// Fails unless a run of slots lies within a pack of `slots` slots.
pub(crate) fn check_slots(pack: PackId, slot: u32, len: u32, slots: u32) -> ImageResult<()> {
    if u64::from(slot) + u64::from(len) <= u64::from(slots) {
        return Ok(());
    }
    Err(ImageError::corrupt(
        "map extent",
        format_args!("{len} slots from {slot} of pack {pack}"),
        format_args!("slots below {slots}"),
    ))
}

/// How the bytes of a pack's records divide, given what of it is live.
pub(crate) fn pack_bytes(packs: &Packs, pack: PackId, live: &Live) -> ImageResult<PackBytes> {
    let reader = packs.reader(pack)?;
    let toc = reader.toc();
    let mut bytes = PackBytes::default();
    for (number, entry) in (0_u32..).zip(&toc.segments) {
        if entry.offset == 0 {
            continue;
        }
        let base = number * SEGMENT_SLOTS;
        let loaded = packs.segment(pack, number)?;
        let mut kept = 0;
        for frame in 0..loaded.segment.frames() {
            let stored = u64::from(loaded.segment.frame_bytes(frame).unwrap_or(0));
            let slots = loaded.segment.frame_slots(frame);
            let marked = slots.iter().filter(|&&slot| live.has_slot(base + slot)).count() as u64;
            let share = stored * marked / (slots.len() as u64).max(1);
            bytes.live += share;
            bytes.live_frames += share;
            bytes.dead += stored - share;
            kept += marked;
        }
        *(if kept > 0 { &mut bytes.live } else { &mut bytes.dead }) += u64::from(entry.bytes);
    }
    for (number, entry) in (0_u32..).zip(&toc.nodes) {
        *(if live.has_node(number) { &mut bytes.live } else { &mut bytes.dead }) +=
            u64::from(entry.bytes);
    }
    Ok(bytes)
}
