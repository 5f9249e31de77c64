//! The state log: which blocks of a layer are dirty and which zero, as of each flush.
//!
//! ```text
//! header │ batch │ batch … │ torn tail
//! ```
//!
//! A flush appends one batch or, if much changed, several, of which the last is marked so. What
//! follows the last whole batch is the unfinished work of a flush that never answered, and is cut
//! off. Damage before it is told apart from that: a sound batch of a *later* flush behind a broken
//! one can only be there if the broken one had been synced.
//!
//! `docs/format.md` draws the bytes. Here they are only encoded and parsed.

use std::io;
use std::ops::Range;

use dormouse_image::digest::checksum;
use roaring::RoaringBitmap;

use crate::error::{Context, Error, ErrorKind, Result};
use crate::states::BlockState;

/// Bytes of the header of a state log.
pub const LOG_HEADER_BYTES: usize = 48;

/// Bytes before the payload of a batch.
pub const BATCH_HEADER_BYTES: usize = 32;

/// A region whose bitmaps make one batch: 64 GiB of disk, so that a batch has at most 4.2 MiB.
const REGION_BLOCKS: u64 = 1 << 24;

/// The longest payload: twice 256 containers of 8 KiB with their table, rounded up.
const PAYLOAD_BYTES_MAX: u32 = 5 << 20;

/// Runs are cut into batches of about this many bytes, to bound memory.
const RUNS_BYTES: usize = 1 << 20;

/// Sound-looking headers that are tried behind a broken batch. A torn flush of this many batches
/// is beyond what [`RUNS_BYTES`] and the length of requests make possible in practice; the bound
/// keeps a hostile file from being summed over and over.
const RESYNC_TRIES_MAX: u32 = 64;

const LOG_MAGIC: [u8; 8] = *b"\x89DMstat\n";
const BATCH_MAGIC: [u8; 4] = *b"DMs\x1a";
const VERSION: u16 = 1;

const KIND_RUNS: u8 = 1;
const KIND_REGION: u8 = 2;
const FLAG_LAST: u8 = 1;

/// What a state log is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LogHeader {
    /// The number of its layer.
    pub layer: u64,

    /// Blocks of the disk.
    pub blocks: u64,

    /// The length of the log when it got its name; a shorter one is damaged.
    pub settled_bytes: u64,
}

/// Where a state log ends, as far as it can be believed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LogEnd {
    /// The byte behind the last whole batch.
    pub offset: u64,

    /// The flush that comes next.
    pub next_flush: u64,
}

impl LogHeader {
    /// The header as bytes.
    pub fn encode(&self) -> [u8; LOG_HEADER_BYTES] {
        let mut bytes = [0; LOG_HEADER_BYTES];
        bytes[..8].copy_from_slice(&LOG_MAGIC);
        bytes[8..10].copy_from_slice(&VERSION.to_le_bytes());
        bytes[10..12].copy_from_slice(&48_u16.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.layer.to_le_bytes());
        bytes[24..32].copy_from_slice(&self.blocks.to_le_bytes());
        bytes[32..40].copy_from_slice(&self.settled_bytes.to_le_bytes());
        let sum = checksum(&[&bytes[..40]]);
        bytes[40..].copy_from_slice(&sum.to_le_bytes());
        bytes
    }

    /// Parses a header.
    pub fn parse(bytes: &[u8; LOG_HEADER_BYTES]) -> Result<LogHeader> {
        const WHAT: &str = "state log header";
        if bytes[..8] != LOG_MAGIC {
            return Err(Error::corrupt(WHAT, "another magic", "a state log"));
        }
        let version = u16_at(bytes, 8);
        if version != VERSION {
            let message = format!("a state log of version {version}; this build reads {VERSION}");
            return Err(Error::new(ErrorKind::Unsupported, message));
        }
        let (got, expected) = (u64_at(bytes, 40), checksum(&[&bytes[..40]]));
        if got != expected {
            return Err(Error::corrupt(WHAT, format!("checksum {got:016x}"), expected));
        }
        if u16_at(bytes, 10) != 48 || u32_at(bytes, 12) != 0 {
            return Err(Error::corrupt(WHAT, "reserved fields in use", "48 bytes and zeros"));
        }
        let header = LogHeader {
            layer: u64_at(bytes, 16),
            blocks: u64_at(bytes, 24),
            settled_bytes: u64_at(bytes, 32),
        };
        if header.blocks > 1 << 32 {
            return Err(Error::corrupt(WHAT, format!("{} blocks", header.blocks), "at most 2^32"));
        }
        if header.settled_bytes < LOG_HEADER_BYTES as u64 {
            let got = format!("{} settled bytes", header.settled_bytes);
            return Err(Error::corrupt(WHAT, got, "at least the header"));
        }
        Ok(header)
    }
}

/// Encodes the batches of one flush. Its buffer is kept from flush to flush.
#[derive(Debug, Default)]
pub struct BatchWriter {
    bytes: Vec<u8>,
    layer: u64,
    flush: u64,
    /// Where the batch being written begins.
    batch: Option<usize>,
    /// Where the last run of the batch ends, from which the next one's distance counts.
    previous_end: u64,
    /// A run that may still grow.
    pending: Option<(Range<u64>, BlockState)>,
}

impl BatchWriter {
    /// Begins the batches of a flush, forgetting what was there.
    pub fn begin(&mut self, layer: u64, flush: u64) {
        self.bytes.clear();
        self.layer = layer;
        self.flush = flush;
        self.batch = None;
        self.pending = None;
    }

    /// Adds blocks that are dirty or zero, in ascending order.
    pub fn push(&mut self, blocks: Range<u64>, state: BlockState) {
        if let Some((pending, same)) = &mut self.pending
            && *same == state
            && pending.end == blocks.start
        {
            pending.end = blocks.end;
            return;
        }
        self.write_pending();
        self.pending = Some((blocks, state));
    }

    /// Adds the whole of what is known, for a log that begins with it.
    pub fn push_full(&mut self, full: &KnownStates, blocks: u64) -> Result<()> {
        self.write_pending();
        for region in 0..blocks.div_ceil(REGION_BLOCKS) {
            let first = u32::try_from(region * REGION_BLOCKS).unwrap_or(u32::MAX);
            let last = u32::try_from((region + 1) * REGION_BLOCKS - 1).unwrap_or(u32::MAX);
            let (dirty, zero) = if blocks <= REGION_BLOCKS {
                (full.dirty.clone(), full.zero.clone())
            } else {
                let mut region = RoaringBitmap::new();
                region.insert_range(first..=last);
                (&full.dirty & &region, &full.zero & &region)
            };
            if dirty.is_empty() && zero.is_empty() {
                continue;
            }
            self.end_batch(0);
            self.begin_batch(KIND_REGION);
            let len = u32::try_from(dirty.serialized_size()).unwrap_or(u32::MAX);
            self.bytes.extend(len.to_le_bytes());
            dirty
                .serialize_into(&mut self.bytes)
                .context(|| "cannot encode a bitmap".to_owned())?;
            zero.serialize_into(&mut self.bytes).context(|| "cannot encode a bitmap".to_owned())?;
        }
        Ok(())
    }

    /// Ends the flush and returns its bytes: none if nothing was pushed.
    pub fn finish(&mut self) -> &[u8] {
        self.write_pending();
        self.end_batch(FLAG_LAST);
        &self.bytes
    }

    fn write_pending(&mut self) {
        let Some((blocks, state)) = self.pending.take() else { return };
        let begin = match self.batch {
            None => true,
            Some(batch) => {
                self.bytes[batch + 4] != KIND_RUNS || self.bytes.len() - batch > RUNS_BYTES
            }
        };
        if begin {
            self.end_batch(0);
            self.begin_batch(KIND_RUNS);
            self.previous_end = 0;
        }
        write_varint(&mut self.bytes, blocks.start - self.previous_end);
        let is_zero = u64::from(state == BlockState::Zero);
        write_varint(&mut self.bytes, (blocks.end - blocks.start) << 1 | is_zero);
        self.previous_end = blocks.end;
    }

    fn begin_batch(&mut self, kind: u8) {
        self.batch = Some(self.bytes.len());
        self.bytes.extend(BATCH_MAGIC);
        self.bytes.extend([kind, 0, 0, 0]);
        self.bytes.extend(self.flush.to_le_bytes());
        self.bytes.extend([0; 16]);
    }

    fn end_batch(&mut self, flags: u8) {
        let Some(batch) = self.batch.take() else { return };
        let (head, payload) = self.bytes[batch..].split_at_mut(BATCH_HEADER_BYTES);
        head[5] = flags;
        let len = u32::try_from(payload.len()).unwrap_or(u32::MAX);
        head[16..20].copy_from_slice(&len.to_le_bytes());
        let sum = checksum(&[&self.layer.to_le_bytes(), &head[..24], payload]);
        head[24..32].copy_from_slice(&sum.to_le_bytes());
    }
}

/// The states that a log says, as bitmaps.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct KnownStates {
    dirty: RoaringBitmap,
    zero: RoaringBitmap,
}

impl KnownStates {
    /// Sets blocks to dirty or zero.
    pub fn set(&mut self, blocks: Range<u64>, state: BlockState) {
        let (Ok(first), Some(Ok(last))) =
            (u32::try_from(blocks.start), blocks.end.checked_sub(1).map(u32::try_from))
        else {
            return;
        };
        let (into, other) = match state {
            BlockState::Untouched => return,
            BlockState::Dirty => (&mut self.dirty, &mut self.zero),
            BlockState::Zero => (&mut self.zero, &mut self.dirty),
        };
        into.insert_range(first..=last);
        other.remove_range(first..=last);
    }

    /// Packs the bitmaps as they will be written.
    pub fn optimize(&mut self) {
        self.dirty.optimize();
        self.zero.optimize();
    }

    /// About how many bytes a log with nothing but these states has.
    pub fn full_bytes(&self) -> u64 {
        let bitmaps = self.dirty.serialized_size() + self.zero.serialized_size();
        (LOG_HEADER_BYTES + BATCH_HEADER_BYTES + bitmaps) as u64
    }

    /// Calls `visit` with the runs of dirty blocks and then with those of zero blocks.
    pub fn for_each_run(&self, visit: &mut dyn FnMut(Range<u64>, BlockState)) {
        for (bitmap, state) in [(&self.dirty, BlockState::Dirty), (&self.zero, BlockState::Zero)] {
            let mut blocks = bitmap.iter();
            while let Some(run) = blocks.next_range() {
                visit(u64::from(*run.start())..u64::from(*run.end()) + 1, state);
            }
        }
    }
}

/// Reads bytes of a log at an offset.
pub type ReadLog<'a> = &'a dyn Fn(&mut [u8], u64) -> io::Result<()>;

/// Reads a log of `len` bytes to its last whole batch.
///
/// Memory is bounded by one batch and the bitmaps; a log that was damaged, not torn, is an error.
pub fn replay(read: ReadLog<'_>, len: u64) -> Result<(LogHeader, KnownStates, LogEnd)> {
    let mut head = [0; LOG_HEADER_BYTES];
    if len < LOG_HEADER_BYTES as u64 {
        return Err(Error::corrupt("state log", format!("{len} bytes"), "at least a header"));
    }
    read(&mut head, 0).context(|| "cannot read a state log".to_owned())?;
    let header = LogHeader::parse(&head)?;
    if len < header.settled_bytes {
        let got = format!("{len} bytes");
        return Err(Error::corrupt("state log", got, format!("{} bytes", header.settled_bytes)));
    }
    let mut states = KnownStates::default();
    let mut end = LogEnd { offset: LOG_HEADER_BYTES as u64, next_flush: 1 };
    let mut flush = end.next_flush;
    let mut payload = Vec::new();
    loop {
        let Some(batch) = read_batch(read, len, end.offset, header.layer, &mut payload)? else {
            break;
        };
        if batch.flush != flush {
            break;
        }
        apply(&batch, &payload, header.blocks, &mut states).map_err(|error| {
            Error::new(ErrorKind::Corrupt, format!("{error} at byte {}", end.offset))
        })?;
        end.offset += BATCH_HEADER_BYTES as u64 + payload.len() as u64;
        if batch.is_last {
            flush = flush.saturating_add(1);
        }
        end.next_flush = flush;
    }
    if end.offset < header.settled_bytes {
        let expected = format!("sound batches to byte {}", header.settled_bytes);
        return Err(Error::corrupt(
            "state log",
            format!("damage at byte {}", end.offset),
            expected,
        ));
    }
    if let Some(at) = find_later_flush(read, len, end.offset, &header, flush)? {
        let got = format!("damage at byte {} before a sound batch at byte {at}", end.offset);
        return Err(Error::corrupt("state log", got, "damage at the end alone"));
    }
    Ok((header, states, end))
}

struct Batch {
    kind: u8,
    is_last: bool,
    flush: u64,
}

/// Reads the batch at `offset` into `payload`; `None` if there is no sound one.
fn read_batch(
    read: ReadLog<'_>,
    len: u64,
    offset: u64,
    layer: u64,
    payload: &mut Vec<u8>,
) -> Result<Option<Batch>> {
    let context = || format!("cannot read a state log at byte {offset}");
    let rest = len.saturating_sub(offset);
    let Some(room) = rest.checked_sub(BATCH_HEADER_BYTES as u64) else { return Ok(None) };
    let mut head = [0; BATCH_HEADER_BYTES];
    read(&mut head, offset).context(context)?;
    let bytes = u32_at(&head, 16);
    if head[..4] != BATCH_MAGIC || bytes > PAYLOAD_BYTES_MAX || u64::from(bytes) > room {
        return Ok(None);
    }
    payload.clear();
    payload.resize(usize::try_from(bytes).unwrap_or(0), 0);
    read(payload, offset + BATCH_HEADER_BYTES as u64).context(context)?;
    if checksum(&[&layer.to_le_bytes(), &head[..24], payload]) != u64_at(&head, 24) {
        return Ok(None);
    }
    let (kind, flags) = (head[4], head[5]);
    let is_known = matches!(kind, KIND_RUNS | KIND_REGION) && flags & !FLAG_LAST == 0;
    if !is_known || u16_at(&head, 6) != 0 || u32_at(&head, 20) != 0 {
        let message = format!("a batch of kind {kind} and flags {flags}; a later version wrote it");
        return Err(Error::new(ErrorKind::Unsupported, message));
    }
    Ok(Some(Batch { kind, is_last: flags & FLAG_LAST != 0, flush: u64_at(&head, 8) }))
}

fn apply(batch: &Batch, payload: &[u8], blocks: u64, states: &mut KnownStates) -> Result<()> {
    let mut rest = payload;
    if batch.kind == KIND_REGION {
        let corrupt =
            |got: &str| Error::corrupt("bitmap of a state log", got, "blocks of the disk");
        let (len, after) = rest.split_first_chunk::<4>().ok_or_else(|| corrupt("no length"))?;
        let len = usize::try_from(u32::from_le_bytes(*len)).unwrap_or(usize::MAX);
        let (dirty, zero) = after.split_at_checked(len).ok_or_else(|| corrupt("a short one"))?;
        for (mut bytes, state) in [(dirty, BlockState::Dirty), (zero, BlockState::Zero)] {
            let bitmap = RoaringBitmap::deserialize_from(&mut bytes)
                .map_err(|error| corrupt(&error.to_string()))?;
            if !bytes.is_empty() || bitmap.max().is_some_and(|last| u64::from(last) >= blocks) {
                return Err(corrupt("more than that"));
            }
            match state {
                BlockState::Zero => {
                    states.dirty -= &bitmap;
                    states.zero |= bitmap;
                }
                _ => {
                    states.zero -= &bitmap;
                    states.dirty |= bitmap;
                }
            }
        }
        return Ok(());
    }
    let mut at = 0_u64;
    while !rest.is_empty() {
        let run = read_varint(&mut rest).zip(read_varint(&mut rest)).and_then(|(gap, coded)| {
            let start = at.checked_add(gap)?;
            let end = start.checked_add(coded >> 1)?;
            let state = if coded & 1 == 1 { BlockState::Zero } else { BlockState::Dirty };
            (start < end && end <= blocks).then_some((start..end, state))
        });
        let Some((run, state)) = run else {
            return Err(Error::corrupt("run of a state log", "none", "blocks of the disk"));
        };
        at = run.end;
        states.set(run, state);
    }
    Ok(())
}

/// Where behind `from` a sound batch of a flush later than `flush` begins.
fn find_later_flush(
    read: ReadLog<'_>,
    len: u64,
    from: u64,
    header: &LogHeader,
    flush: u64,
) -> Result<Option<u64>> {
    const WINDOW_BYTES: u64 = 1 << 16;
    let mut window = Vec::new();
    let mut payload = Vec::new();
    let mut tries = 0;
    let mut at = from;
    while at.saturating_add(BATCH_HEADER_BYTES as u64) <= len {
        let bytes = WINDOW_BYTES.min(len - at);
        window.resize(usize::try_from(bytes).unwrap_or(0), 0);
        read(&mut window, at).context(|| format!("cannot read a state log at byte {at}"))?;
        for (index, head) in window.windows(BATCH_HEADER_BYTES).enumerate() {
            if head[..4] != BATCH_MAGIC || u64_at(head, 8) <= flush {
                continue;
            }
            tries += 1;
            if tries > RESYNC_TRIES_MAX {
                return Ok(None);
            }
            let place = at + index as u64;
            if let Ok(Some(_)) = read_batch(read, len, place, header.layer, &mut payload) {
                return Ok(Some(place));
            }
        }
        at += (bytes + 1).saturating_sub(BATCH_HEADER_BYTES as u64).max(1);
    }
    Ok(None)
}

fn write_varint(bytes: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        bytes.push((value & 0x7f) as u8 | 0x80);
        value >>= 7;
    }
    bytes.push((value & 0x7f) as u8);
}

fn read_varint(bytes: &mut &[u8]) -> Option<u64> {
    let mut value = 0;
    for shift in (0..63).step_by(7) {
        let (byte, rest) = bytes.split_first()?;
        *bytes = rest;
        value |= u64::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return Some(value);
        }
    }
    None
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    bytes[at..].first_chunk().map_or(0, |chunk| u16::from_le_bytes(*chunk))
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    bytes[at..].first_chunk().map_or(0, |chunk| u32::from_le_bytes(*chunk))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    bytes[at..].first_chunk().map_or(0, |chunk| u64::from_le_bytes(*chunk))
}

#[cfg(test)]
mod tests {
    use super::*;

    const BLOCKS: u64 = 1 << 25;

    fn header() -> LogHeader {
        LogHeader { layer: 3, blocks: BLOCKS, settled_bytes: LOG_HEADER_BYTES as u64 }
    }

    fn open(log: &[u8]) -> Result<(LogHeader, KnownStates, LogEnd)> {
        let read = |buf: &mut [u8], offset: u64| {
            let start = usize::try_from(offset).unwrap();
            buf.copy_from_slice(
                log.get(start..start + buf.len()).ok_or(io::ErrorKind::UnexpectedEof)?,
            );
            Ok(())
        };
        replay(&read, log.len() as u64)
    }

    /// A log of three flushes and the place where each begins.
    fn three() -> (Vec<u8>, Vec<usize>, KnownStates) {
        let mut log = header().encode().to_vec();
        let mut writer = BatchWriter::default();
        let mut known = KnownStates::default();
        let mut places = Vec::new();
        for flush in 1..=3 {
            places.push(log.len());
            writer.begin(3, flush);
            for index in 0..50 {
                let start = index * 1000 + flush * 10;
                let state = if index % 3 == 0 { BlockState::Zero } else { BlockState::Dirty };
                writer.push(start..start + 5, state);
                writer.push(start + 5..start + 8, state);
                known.set(start..start + 8, state);
            }
            log.extend(writer.finish());
        }
        (log, places, known)
    }

    #[test]
    fn a_log_reads_back() {
        let (log, _, known) = three();
        let (head, states, end) = open(&log).unwrap();
        assert_eq!((head, states), (header(), known));
        assert_eq!(end, LogEnd { offset: log.len() as u64, next_flush: 4 });
    }

    #[test]
    fn a_full_form_reads_back() {
        let (_, _, mut known) = three();
        known.set(BLOCKS - 7..BLOCKS, BlockState::Dirty);
        known.optimize();
        let mut writer = BatchWriter::default();
        writer.begin(3, 1);
        writer.push_full(&known, BLOCKS).unwrap();
        let batches = writer.finish().to_vec();
        let settled_bytes = (LOG_HEADER_BYTES + batches.len()) as u64;
        let mut log = LogHeader { settled_bytes, ..header() }.encode().to_vec();
        log.extend(batches);
        let (_, states, end) = open(&log).unwrap();
        assert_eq!((states, end.next_flush), (known, 2));
        log.pop();
        assert_eq!(open(&log).unwrap_err().kind(), ErrorKind::Corrupt);
        log.push(0xff);
        assert_eq!(open(&log).unwrap_err().kind(), ErrorKind::Corrupt);
    }

    #[test]
    fn every_cut_leaves_the_flushes_before_it() {
        let (log, places, _) = three();
        for len in LOG_HEADER_BYTES..=log.len() {
            let (_, _, end) = open(&log[..len]).unwrap();
            let last = places.iter().copied().chain([log.len()]).rfind(|place| *place <= len);
            assert_eq!(end.offset, last.unwrap() as u64, "cut to {len}");
        }
        for len in 0..LOG_HEADER_BYTES {
            assert_eq!(open(&log[..len]).unwrap_err().kind(), ErrorKind::Corrupt);
        }
    }

    /// Damage in the last flush may be a torn write; anywhere before it is damage.
    #[test]
    fn damage_is_told_from_a_torn_tail() {
        let (log, places, _) = three();
        for at in 0..log.len() {
            let mut bad = log.clone();
            bad[at] ^= 0x10;
            match open(&bad) {
                Ok((_, _, end)) => {
                    assert!(at >= places[2], "damage at {at} was taken for a torn tail");
                    assert_eq!(end.offset, places[2] as u64);
                }
                Err(error) => {
                    assert!(at < places[2], "a torn byte {at}: {error}");
                }
            }
        }
    }

    /// The rest of an attempt that failed lies behind the shorter one that succeeded.
    #[test]
    fn leftovers_of_a_failed_attempt_are_not_read() {
        let (mut log, places, _) = three();
        let mut writer = BatchWriter::default();
        writer.begin(3, 2);
        writer.push(0..1, BlockState::Dirty);
        let short = writer.finish();
        log.truncate(places[2]);
        log[places[1]..places[1] + short.len()].copy_from_slice(short);
        let (_, _, end) = open(&log).unwrap();
        assert_eq!(end, LogEnd { offset: (places[1] + short.len()) as u64, next_flush: 3 });
    }
}
