//! Finds out which bytes of which images damage touches.
//!
//! A node below which nothing is damaged is remembered, so that thousands of snapshots that share
//! their nodes cost what differs between them and what is damaged.

use std::collections::{BTreeMap, HashMap, HashSet};

use dormouse_image::block::BLOCK_BYTES_U64;
use dormouse_image::error::Result as ImageResult;
use dormouse_image::map::{CHILDREN_MAX, LEAF_BYTES, Leaf, Node, NodeRef, NodeSource, Source};
use dormouse_image::pack::PackId;

use super::Damage;
use super::finding::{Findings, Part};
use crate::error::Result;
use crate::manifest::Manifest;
use crate::packs::Packs;
use crate::progress::Job;

impl Findings {
    /// Fills in what each finding touches.
    pub(super) fn find_touched(
        &mut self,
        packs: &Packs,
        manifests: &[Manifest],
        job: Job<'_>,
    ) -> Result<()> {
        if self.all.iter().all(|finding| finding.part == Part::Bundle) {
            return Ok(());
        }
        let mut touched: Vec<Vec<Damage>> = vec![Vec::new(); self.all.len()];
        let mut search = Search {
            packs,
            findings: self,
            by_pack: self.by_pack(),
            clean: HashSet::new(),
            end: 0,
            ranges: BTreeMap::new(),
        };
        for manifest in manifests {
            for entry in &manifest.images {
                job.check()?;
                let map = entry.map()?;
                let Some(root) = map.root else { continue };
                search.end = entry.size_bytes;
                search.node(root, map.level(), 0);
                for (number, ranges) in std::mem::take(&mut search.ranges) {
                    touched[number].extend(ranges.into_iter().map(|(offset, length)| Damage {
                        snapshot: manifest.display_name(),
                        image: entry.image.clone(),
                        offset,
                        length,
                    }));
                }
            }
        }
        for (finding, touched) in self.all.iter_mut().zip(touched) {
            finding.touches = touched;
        }
        Ok(())
    }
}

struct Search<'a> {
    packs: &'a Packs,
    findings: &'a Findings,
    by_pack: HashMap<PackId, Vec<usize>>,
    clean: HashSet<NodeRef>,
    /// The length of the image that is walked.
    end: u64,
    /// By finding: offset and length of what it touches in the image.
    ranges: BTreeMap<usize, Vec<(u64, u64)>>,
}

impl Search<'_> {
    /// Looks below a node that begins at byte `from` of the image; true if anything is damaged.
    fn node(&mut self, at: NodeRef, level: u8, from: u64) -> bool {
        if self.clean.contains(&at) {
            return false;
        }
        let bytes = LEAF_BYTES * (CHILDREN_MAX as u64).pow(u32::from(level));
        let mut is_damaged = false;
        for number in self.about(at.pack) {
            let finding = &self.findings.all[number];
            if finding.part == Part::Whole || finding.nodes.contains(&at.node) {
                self.add(number, from, bytes);
                is_damaged = true;
            }
        }
        if is_damaged {
            return true;
        }
        // What cannot be read was found before, or broke since; then the next run will tell.
        let node: ImageResult<Node> = self.packs.node(at);
        is_damaged = match node {
            Err(_) => true,
            Ok(Node::Leaf(leaf)) => self.leaf(&leaf, from),
            Ok(Node::Inner(inner)) => {
                let mut is_damaged = false;
                let step = bytes / CHILDREN_MAX as u64;
                for (child, number) in inner.children.iter().zip(0..) {
                    if let (Some(child), 1..) = (child, level) {
                        is_damaged |= self.node(*child, level - 1, from + number * step);
                    }
                }
                is_damaged
            }
        };
        if !is_damaged {
            self.clean.insert(at);
        }
        is_damaged
    }

    fn leaf(&mut self, leaf: &Leaf, from: u64) -> bool {
        let mut hits = Vec::new();
        for extent in leaf.iter() {
            let Source::Stored { pack, slot } = extent.source else { continue };
            for number in self.about(pack) {
                let finding = &self.findings.all[number];
                finding.damaged_slots(slot, extent.len, &mut |first, len| {
                    let block = u64::from(extent.start) + u64::from(first - slot);
                    hits.push((number, block, u64::from(len)));
                });
            }
        }
        for &(number, block, len) in &hits {
            self.add(number, from + block * BLOCK_BYTES_U64, len * BLOCK_BYTES_U64);
        }
        !hits.is_empty()
    }

    fn about(&self, pack: PackId) -> Vec<usize> {
        self.by_pack.get(&pack).cloned().unwrap_or_default()
    }

    fn add(&mut self, number: usize, offset: u64, length: u64) {
        let length = length.min(self.end.saturating_sub(offset));
        if length == 0 {
            return;
        }
        let ranges = self.ranges.entry(number).or_default();
        match ranges.last_mut() {
            Some(last) if last.0 + last.1 == offset => last.1 += length,
            _ => ranges.push((offset, length)),
        }
    }
}
