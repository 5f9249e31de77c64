//! A guest's memory behind descriptors that its VMM handed over, as a commit reads it: slots one behind
//! the other, each a range of a memory file; what was never touched is a hole there, and is not read.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;

use anyhow::{Context, Result, ensure};
use dormouse_image::block::BLOCK_BYTES_U64;
use dormouse_store::source::{LayerRun, LayerSource};
use rustix::fs::{SeekFrom, seek};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

/// A slot of memory: where it lies behind its descriptor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct DescribedSlot {
    /// Its first byte there.
    pub(crate) file_offset: u64,

    /// Bytes.
    pub(crate) size: u64,
}

/// All slots.
#[derive(Debug)]
pub(super) struct DescriptorLayer {
    parts: Vec<Part>,
    size_bytes: u64,
}

#[derive(Debug)]
struct Part {
    file: File,
    file_offset: u64,
    image: Range<u64>,
}

impl DescriptorLayer {
    /// Of slots and their descriptors, which are looked at first: they are another process's.
    pub(super) fn new(slots: &[DescribedSlot], descriptors: &[OwnedFd]) -> Result<DescriptorLayer> {
        ensure!(
            slots.len() == descriptors.len(),
            "{} slots of memory came with {} descriptors",
            slots.len(),
            descriptors.len()
        );
        let (mut parts, mut start) = (Vec::new(), 0_u64);
        for (slot, descriptor) in slots.iter().zip(descriptors) {
            // Opened anew: the VMM's own has a position, which a look for holes would move.
            let path = format!("/proc/self/fd/{}", descriptor.as_raw_fd());
            let file = File::open(&path).context("cannot open a slot of memory")?;
            let metadata = file.metadata().context("cannot look at a slot of memory")?;
            let behind = slot.file_offset.checked_add(slot.size);
            let end = start.checked_add(slot.size);
            let is_whole = [slot.file_offset, slot.size]
                .iter()
                .all(|bytes| bytes.is_multiple_of(BLOCK_BYTES_U64));
            let (Some(end), true) = (
                end,
                metadata.is_file() && is_whole && behind.is_some_and(|at| at <= metadata.len()),
            ) else {
                anyhow::bail!(
                    "a slot of {} bytes at {} is not inside its descriptor of {} bytes",
                    slot.size,
                    slot.file_offset,
                    metadata.len()
                );
            };
            parts.push(Part { file, file_offset: slot.file_offset, image: start..end });
            start = end;
        }
        Ok(DescriptorLayer { parts, size_bytes: start })
    }
}

impl Part {
    /// The next position of a kind from `at` on, a position of the file; none if there is no more.
    fn seek(&self, whence: SeekFrom) -> io::Result<Option<u64>> {
        match seek(&self.file, whence) {
            Ok(at) => Ok(Some(at)),
            Err(Errno::NXIO) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// Calls `visit` with its runs, as ranges of the image, all of them: what is a hole is zero
    /// whatever it lies over.
    fn for_each_run(
        &self,
        visit: &mut dyn FnMut(Range<u64>, LayerRun) -> io::Result<()>,
    ) -> io::Result<()> {
        let end = self.file_offset + (self.image.end - self.image.start);
        let mut at = self.file_offset;
        let image = |from: u64, to: u64| {
            let start = self.image.start + (from - self.file_offset);
            start..start + (to - from)
        };
        while at < end {
            let (data, hole) = match self.seek(SeekFrom::Data(at)) {
                Ok(Some(data)) => {
                    let hole = self.seek(SeekFrom::Hole(data))?.unwrap_or(end);
                    (data, hole)
                }
                Ok(None) => (end, end),
                // Huge pages have no holes that could be asked for.
                Err(_) => (at, end),
            };
            let down = data / BLOCK_BYTES_U64 * BLOCK_BYTES_U64;
            let (data, hole) = (down.clamp(at, end), hole.next_multiple_of(BLOCK_BYTES_U64));
            let hole = hole.clamp(data, end);
            if at < data {
                visit(image(at, data), LayerRun::Zero)?;
            }
            if data < hole {
                visit(image(data, hole), LayerRun::Data)?;
            }
            at = hole;
        }
        Ok(())
    }
}

impl LayerSource for DescriptorLayer {
    fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    fn label(&self) -> String {
        "a guest's memory".to_owned()
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        let (mut buf, mut offset) = (buf, offset);
        while !buf.is_empty() {
            let part = self.parts.iter().find(|part| part.image.contains(&offset));
            let part = part.ok_or(io::ErrorKind::UnexpectedEof)?;
            let left = usize::try_from(part.image.end - offset).unwrap_or(usize::MAX);
            let (piece, rest) = buf.split_at_mut(left.min(buf.len()));
            let at = part.file_offset + (offset - part.image.start);
            part.file.read_exact_at(piece, at)?;
            offset += piece.len() as u64;
            buf = rest;
        }
        Ok(())
    }

    fn for_each_run(
        &self,
        visit: &mut dyn FnMut(Range<u64>, LayerRun) -> io::Result<()>,
    ) -> io::Result<()> {
        self.parts.iter().try_for_each(|part| part.for_each_run(visit))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_are_read_one_behind_the_other_and_holes_are_not() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(64 << 10).unwrap();
        file.write_all_at(&[7; 4096], 16 << 10).unwrap();
        let low = tempfile::tempfile().unwrap();
        low.write_all_at(&[9; 8192], 0).unwrap();
        let slots = [
            DescribedSlot { file_offset: 8 << 10, size: 32 << 10 },
            DescribedSlot { file_offset: 4096, size: 4096 },
        ];
        let descriptors = [OwnedFd::from(file), OwnedFd::from(low)];
        let layer = DescriptorLayer::new(&slots, &descriptors).unwrap();
        let mut bytes = vec![1; usize::try_from(layer.size_bytes()).unwrap()];
        let mut at = 0;
        layer
            .for_each_run(&mut |range, run| {
                assert_eq!(range.start, at, "all of it, in order");
                at = range.end;
                let part = &mut bytes[usize::try_from(range.start).unwrap()..]
                    [..usize::try_from(range.end - range.start).unwrap()];
                match run {
                    LayerRun::Zero => part.fill(0),
                    LayerRun::Data => layer.read_at(part, range.start)?,
                }
                Ok(())
            })
            .unwrap();
        let mut expected = vec![0; 36 << 10];
        expected[8 << 10..12 << 10].fill(7);
        expected[32 << 10..].fill(9);
        assert!(bytes == expected);
        let mut across = [0; 8192];
        layer.read_at(&mut across, 28 << 10).unwrap();
        assert_eq!(across, expected[28 << 10..]);
        for bad in [
            DescribedSlot { file_offset: 4096, size: 8192 },
            DescribedSlot { file_offset: u64::MAX - 4095, size: 4096 },
            DescribedSlot { file_offset: 1, size: 4096 },
        ] {
            assert!(DescriptorLayer::new(&[bad], &descriptors[1..]).is_err(), "{bad:?}");
        }
        assert!(DescriptorLayer::new(&slots, &descriptors[1..]).is_err());
    }
}
