//! The bytes of notes: a header, and records of 32 bytes.
//!
//! `docs/format.md` draws them. A record's checksum covers the header it was written under and its
//! place, so that what an earlier use of the file left is told apart from what is meant.

use std::ops::Range;

use dormouse_image::digest::checksum;

use crate::error::{Error, ErrorKind, Result};
use crate::files::BootId;
use crate::states::BlockState;

/// Bytes before the first record.
pub const NOTES_HEADER_BYTES: usize = 64;

/// Bytes of a record.
pub const NOTE_BYTES: usize = 32;

/// The longest file: 131,070 records.
pub const NOTES_BYTES_MAX: usize = 4 << 20;

const MAGIC: [u8; 8] = *b"\x89DMnote\n";
const VERSION: u16 = 1;

/// Blocks of the largest disk.
const BLOCKS_MAX: u64 = 1 << 32;

/// A change of states that was noted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Note {
    /// The number of the layer.
    pub layer: u64,

    /// The blocks, at least one.
    pub blocks: Range<u64>,

    /// Dirty or zero.
    pub state: BlockState,
}

/// Which use of a file its records belong to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NotesHeader {
    /// The life of the kernel they are of.
    pub boot: BootId,

    /// One more for each time that a file was begun.
    pub epoch: u64,
}

impl NotesHeader {
    /// The header as bytes.
    pub fn encode(&self) -> [u8; NOTES_HEADER_BYTES] {
        let mut bytes = [0; NOTES_HEADER_BYTES];
        bytes[..8].copy_from_slice(&MAGIC);
        bytes[8..10].copy_from_slice(&VERSION.to_le_bytes());
        bytes[16..32].copy_from_slice(&self.boot.0);
        bytes[32..40].copy_from_slice(&self.epoch.to_le_bytes());
        let sum = checksum(&[&bytes[..56]]);
        bytes[56..].copy_from_slice(&sum.to_le_bytes());
        bytes
    }

    /// The header of notes that count in this life of the kernel; none if there is no sound one of it.
    pub fn parse(bytes: &[u8], boot: BootId) -> Result<Option<NotesHeader>> {
        let Some(bytes) = bytes.first_chunk::<NOTES_HEADER_BYTES>() else { return Ok(None) };
        if bytes[..8] != MAGIC
            || checksum(&[&bytes[..56]]) != u64_at(bytes, 56)
            || bytes[16..32] != boot.0
        {
            return Ok(None);
        }
        let version = u16::from_le_bytes([bytes[8], bytes[9]]);
        if version != VERSION {
            let message = format!(
                "notes of version {version}, and this build reads {VERSION}; \
                 open the disk with the version that had it"
            );
            return Err(Error::new(ErrorKind::Unsupported, message));
        }
        Ok(Some(NotesHeader { boot, epoch: u64_at(bytes, 32) }))
    }

    /// The record with this number.
    pub fn encode_note(&self, number: u64, note: &Note) -> [u8; NOTE_BYTES] {
        let mut bytes = [0; NOTE_BYTES];
        bytes[..8].copy_from_slice(&note.layer.to_le_bytes());
        bytes[8..16].copy_from_slice(&note.blocks.start.to_le_bytes());
        let count = note.blocks.end - note.blocks.start;
        let is_zero = u64::from(note.state == BlockState::Zero);
        bytes[16..24].copy_from_slice(&(count << 1 | is_zero).to_le_bytes());
        let sum = self.sum(number, &bytes[..24]);
        bytes[24..].copy_from_slice(&sum.to_le_bytes());
        bytes
    }

    /// Reads the records behind a header up to the first that is not sound, where a writer was killed
    /// or an earlier use of the file shows. A sound one of impossible blocks is an error.
    pub fn parse_notes(&self, records: &[u8]) -> Result<Vec<Note>> {
        let mut notes = Vec::new();
        let (records, _) = records.as_chunks::<NOTE_BYTES>();
        for (number, record) in (0..).zip(records) {
            if self.sum(number, &record[..24]) != u64_at(record, 24) {
                break;
            }
            let (start, count) = (u64_at(record, 8), u64_at(record, 16) >> 1);
            let end = start.checked_add(count).filter(|end| *end <= BLOCKS_MAX);
            let Some(end) = end.filter(|_| count > 0) else {
                let got = format!("{count} blocks at {start}");
                return Err(Error::corrupt("note of a live disk", got, "blocks of a disk"));
            };
            let is_zero = u64_at(record, 16) & 1 == 1;
            let state = if is_zero { BlockState::Zero } else { BlockState::Dirty };
            notes.push(Note { layer: u64_at(record, 0), blocks: start..end, state });
        }
        Ok(notes)
    }

    fn sum(&self, number: u64, record: &[u8]) -> u64 {
        checksum(&[&self.boot.0, &self.epoch.to_le_bytes(), &number.to_le_bytes(), record])
    }
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    let mut word = [0; 8];
    word.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(word)
}

#[cfg(test)]
mod tests {
    use super::*;

    const BOOT: BootId = BootId([7; 16]);

    fn written(header: NotesHeader) -> (Vec<Note>, Vec<u8>) {
        let notes: Vec<Note> = (0..5)
            .map(|n| Note {
                layer: n % 2 + 1,
                blocks: n * 100..n * 100 + n + 1,
                state: if n % 3 == 0 { BlockState::Zero } else { BlockState::Dirty },
            })
            .collect();
        let records = (0..).zip(&notes).flat_map(|(n, note)| header.encode_note(n, note));
        let records = records.collect();
        (notes, records)
    }

    #[test]
    fn every_flip_and_cut_ends_the_notes() {
        let header = NotesHeader { boot: BOOT, epoch: 9 };
        let (notes, bytes) = written(header);
        assert_eq!(header.parse_notes(&bytes).unwrap(), notes);
        for bit in 0..bytes.len() * 8 {
            let mut bad = bytes.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(header.parse_notes(&bad).unwrap(), notes[..bit / 8 / NOTE_BYTES]);
        }
        for len in 0..bytes.len() {
            assert_eq!(header.parse_notes(&bytes[..len]).unwrap(), notes[..len / NOTE_BYTES]);
        }
        let head = header.encode();
        assert_eq!(NotesHeader::parse(&head, BOOT).unwrap(), Some(header));
        for bit in 0..head.len() * 8 {
            let mut bad = head;
            bad[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(NotesHeader::parse(&bad, BOOT).unwrap(), None, "bit {bit}");
        }
    }

    #[test]
    fn notes_of_another_use_are_none() {
        let header = NotesHeader { boot: BOOT, epoch: 9 };
        let (notes, bytes) = written(header);
        for other in
            [NotesHeader { epoch: 10, ..header }, NotesHeader { boot: BootId([8; 16]), ..header }]
        {
            assert_eq!(other.parse_notes(&bytes).unwrap(), []);
        }
        assert_eq!(header.parse_notes(&bytes[NOTE_BYTES..]).unwrap(), [], "in another place");
        assert_eq!(NotesHeader::parse(&header.encode(), BootId([8; 16])).unwrap(), None);
        let absurd = Note { blocks: BLOCKS_MAX..BLOCKS_MAX + 1, ..notes[0].clone() };
        let refused = header.parse_notes(&header.encode_note(0, &absurd)).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::Corrupt);
    }
}
