//! Checks one pack: header, footer, table, segments, nodes, and when asked every frame.

use dormouse_image::error::{Error as ImageError, ErrorKind as ImageErrorKind};
use dormouse_image::map::NodeRef;
use dormouse_image::pack::{
    FOOTER_BYTES, HEADER_BYTES, PackId, PackReader, SEGMENT_SLOTS, Segment,
};

use super::finding::{Finding, Part, describe};
use super::walk::{Needed, Walk};
use crate::error::Result;
use crate::layout::pack_path;
use crate::packs::{PackPlace, Packs};
use crate::progress::Job;

/// How packs are checked.
pub(super) struct PackCheck<'a> {
    pub(super) packs: &'a Packs,
    pub(super) walk: &'a Walk<'a>,
    /// Every frame is decoded and every digest compared.
    pub(super) deep: bool,
    /// What nobody needs is checked as well: a commit to come may rely on it.
    pub(super) all: bool,
    pub(super) job: Job<'a>,
}

/// What was checked, and what was found.
#[derive(Default)]
pub(super) struct Checked {
    pub(super) packs: u64,
    pub(super) frames: u64,
    pub(super) read_bytes: u64,
    pub(super) findings: Vec<Finding>,
}

/// A pack that cannot be opened, and the file in which it should be.
struct Unopened {
    path: String,
    error: Box<ImageError>,
}

impl PackCheck<'_> {
    /// Checks a pack.
    pub(super) fn pack(&self, pack: PackId, checked: &mut Checked) -> Result<()> {
        self.job.check()?;
        let needed = self.walk.needed(pack);
        let opened = self.open(pack).or_else(|first| match first {
            // It may have been compacted away just now.
            Unopened { error, .. } if error.kind() == ImageErrorKind::Missing => {
                self.packs.forget(pack);
                self.open(pack)
            }
            first => Err(first),
        });
        checked.packs += 1;
        match opened {
            Ok((place, reader)) => self.parts(&place, &reader, needed, checked),
            // Nobody needs it, and it was collected since it was listed.
            Err(Unopened { error, .. })
                if needed.is_none() && error.kind() == ImageErrorKind::Missing =>
            {
                Ok(())
            }
            Err(Unopened { path, error }) => {
                checked.findings.push(Finding::new(&path, pack, Part::Whole, describe(&*error)));
                Ok(())
            }
        }
    }

    /// Opens a pack past the caches.
    fn open(&self, pack: PackId) -> std::result::Result<(PackPlace, PackReader), Unopened> {
        let place = self
            .packs
            .place(pack)
            .map_err(|error| Unopened { path: pack_path(pack), error: Box::new(error) })?;
        let reader = self.packs.raw_file(&place.path).and_then(|file| {
            let reader = PackReader::open(file, place.offset, place.bytes)?;
            if reader.id() != pack {
                return Err(ImageError::corrupt("pack id", reader.id(), pack));
            }
            if let Ok(key) = self.packs.key() {
                reader.params().check_key(key.id())?;
            }
            Ok(reader)
        });
        match reader {
            Ok(reader) => Ok((place, reader)),
            Err(error) => Err(Unopened { path: place.path, error: Box::new(error) }),
        }
    }

    fn parts(
        &self,
        place: &PackPlace,
        reader: &PackReader,
        needed: Option<&Needed>,
        checked: &mut Checked,
    ) -> Result<()> {
        let before = checked.read_bytes;
        checked.read_bytes += (HEADER_BYTES + FOOTER_BYTES) as u64;
        checked.read_bytes +=
            place.bytes - (reader.records_end() + FOOTER_BYTES as u64).min(place.bytes);
        let mut parts = Parts { place, pack: reader.id(), found: Vec::new() };
        for (number, entry) in (0_u32..).zip(&reader.toc().segments) {
            let base = number * SEGMENT_SLOTS;
            let slots = reader.toc().segment_slots(number as usize);
            let is_needed =
                |slot: u32| needed.is_some_and(|needed| needed.live.has_slot(base + slot));
            if entry.offset == 0 {
                for slot in (0..slots).filter(|&slot| is_needed(slot)) {
                    parts.slots(Part::Strays, base + slot, 1, || "a slot was dropped".to_owned());
                }
                continue;
            }
            checked.read_bytes += u64::from(entry.bytes);
            let segment = match reader.segment(number as usize) {
                Ok(segment) => segment,
                Err(error) => {
                    parts.slots(Part::Segments, base, slots, || describe(&error));
                    continue;
                }
            };
            for slot in (0..slots).filter(|&slot| is_needed(slot) && !segment.is_present(slot)) {
                parts.slots(Part::Strays, base + slot, 1, || "a slot was dropped".to_owned());
            }
            if self.deep {
                self.frames(reader, number, &segment, &is_needed, &mut parts, checked)?;
            }
        }
        if let Some(needed) = needed {
            let mut strays = needed.strays.clone();
            strays.sort_unstable();
            for (first, len) in strays {
                parts.stray(first, len, reader.toc().slots);
            }
        }
        self.nodes(reader, needed, &mut parts, checked);
        checked.findings.extend(parts.found);
        let read = checked.read_bytes - before;
        // Frames were told of as they came.
        self.job.progress.advance(if self.deep { 0 } else { place.bytes.max(read) });
        Ok(())
    }

    fn frames(
        &self,
        reader: &PackReader,
        number: u32,
        segment: &Segment,
        is_needed: &dyn Fn(u32) -> bool,
        parts: &mut Parts<'_>,
        checked: &mut Checked,
    ) -> Result<()> {
        for frame in 0..segment.frames() {
            self.job.check()?;
            let slots = segment.frame_slots(frame);
            let bytes = u64::from(segment.frame_bytes(frame).unwrap_or(0));
            self.job.progress.advance(bytes);
            if !self.all && !slots.iter().any(|&slot| is_needed(slot)) {
                continue;
            }
            checked.frames += 1;
            checked.read_bytes += bytes;
            if let Err(error) = self.packs.decode(reader, number, segment, frame) {
                for slot in slots {
                    let slot = number * SEGMENT_SLOTS + slot;
                    parts.slots(Part::Frames, slot, 1, || describe(&error));
                }
            }
        }
        Ok(())
    }

    fn nodes(
        &self,
        reader: &PackReader,
        needed: Option<&Needed>,
        parts: &mut Parts<'_>,
        checked: &mut Checked,
    ) {
        for (number, entry) in (0_u32..).zip(&reader.toc().nodes) {
            let walked = needed.and_then(|needed| needed.damaged.get(&number));
            if let Some(error) = walked {
                parts.node(number, || error.clone());
            }
            if entry.offset == 0 {
                continue;
            }
            let at = NodeRef { pack: reader.id(), node: number };
            checked.read_bytes += u64::from(entry.bytes);
            if self.all
                && walked.is_none()
                && !self.walk.is_sound(at)
                && let Err(error) = reader.node(number)
            {
                parts.node(number, || describe(&error));
            }
        }
        let nodes = reader.toc().nodes.len();
        for (&number, error) in needed.iter().flat_map(|needed| &needed.damaged) {
            if number as usize >= nodes {
                parts.node(number, || error.clone());
            }
        }
    }
}

/// The findings about one pack, one for each part.
struct Parts<'a> {
    place: &'a PackPlace,
    pack: PackId,
    found: Vec<Finding>,
}

impl Parts<'_> {
    fn slots(&mut self, part: Part, first: u32, len: u32, what: impl FnOnce() -> String) {
        self.part(part, what).add_slots(first, len);
    }

    fn node(&mut self, number: u32, what: impl FnOnce() -> String) {
        self.part(Part::Nodes, what).nodes.insert(number);
    }

    /// Adds what of a run lies behind the pack's last slot; runs come sorted and may overlap.
    fn stray(&mut self, first: u32, len: u32, slots: u32) {
        let what = || format!("a map names slot {first}, the pack has {slots}");
        let finding = self.part(Part::Strays, what);
        let done = finding.slots.last().map_or(0, |last| u64::from(last.0) + u64::from(last.1));
        let from = u64::from(first.max(slots)).max(done);
        let to = u64::from(first) + u64::from(len);
        if let (Ok(from), Ok(len)) = (u32::try_from(from), u32::try_from(to.saturating_sub(from)))
            && len > 0
        {
            finding.add_slots(from, len);
        }
    }

    /// The finding about a part; what is said is what was found first.
    fn part(&mut self, part: Part, what: impl FnOnce() -> String) -> &mut Finding {
        let at = self.found.iter().position(|finding| finding.part == part).unwrap_or_else(|| {
            self.found.push(Finding::new(&self.place.path, self.pack, part, what()));
            self.found.len() - 1
        });
        &mut self.found[at]
    }
}
