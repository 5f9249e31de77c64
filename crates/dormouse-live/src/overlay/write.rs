//! Writing, zeroing and discarding: what becomes of each block of a request.

use std::ops::Range;
use std::sync::PoisonError;

use dormouse_image::block::{BLOCK_BYTES, BLOCK_BYTES_U64, blocks_in};
use dormouse_image::zero::is_zero;

use super::{Overlay, STRIPE_LOCKS, ZeroBlocks};
use crate::error::{Error, ErrorKind, Result};
use crate::layer::Layer;
use crate::notes::Room;
use crate::stack::Stack;
use crate::states::{BlockState, STRIPE_BLOCKS};
use crate::sync::MutexGuard;

/// Bytes of a stripe.
const STRIPE_BYTES: u64 = STRIPE_BLOCKS * BLOCK_BYTES_U64;

/// Stripes that are locked, written and punched at once: 4 MiB. A longer request lets others in
/// between, so that zeroing a terabyte holds up nobody for long.
const GROUP_STRIPES: usize = 16;

/// Bytes of a group.
const GROUP_BYTES: u64 = GROUP_STRIPES as u64 * STRIPE_BYTES;

const _: () = assert!(STRIPE_LOCKS.is_multiple_of(GROUP_STRIPES));

/// Flushes after which a request gives up to find room for its notes. One makes room unless others
/// take all of it, each for a moment.
const ROOM_TRIES_MAX: usize = 64;

/// How many notes the change of a group may write.
type NotesOf = fn(&Range<u64>) -> u64;

/// The parts of blocks at both ends, and what is between.
const EDGES_AND_CORE: NotesOf = |_| 3;

/// Each stripe by itself.
const BY_STRIPE: NotesOf = |part| 3 * ((part.end - part.start) / STRIPE_BYTES + 2);

/// Each block is dirty or zero for itself.
const BY_BLOCK: NotesOf = |part| blocks_in(part.end - part.start) + 2;

/// Zeros to be written where zeros shall take space.
static ZEROS: [u8; 1 << 18] = [0; 1 << 18];

/// What zeroing does with the space under the zeros.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Zeroing {
    /// Whole blocks are freed.
    Free,

    /// The space stays or is taken, so that later writes find it: the blocks are dirty.
    Keep,
}

impl Overlay {
    /// Writes `bytes` at `offset`.
    ///
    /// After an error each sector of the range has its old bytes or new ones, and flushing and
    /// sealing fail until all of the range was written or zeroed.
    pub fn write_at(&self, bytes: &[u8], offset: u64) -> Result<()> {
        self.write_with(bytes, offset, self.config.zero_blocks)
    }

    /// Makes `len` bytes at `offset` zero. Parts of blocks are written as zeros.
    pub fn write_zeroes(&self, offset: u64, len: u64, zeroing: Zeroing) -> Result<()> {
        let range = self.range(offset, len)?;
        match zeroing {
            Zeroing::Free => {
                self.in_groups(&range, EDGES_AND_CORE, &mut |stack, part| self.zero(stack, part))
            }
            Zeroing::Keep => self.in_groups(&range, BY_STRIPE, &mut |stack, part| {
                let mut at = part.start;
                while at < part.end {
                    let end = part.end.min((at / STRIPE_BYTES + 1) * STRIPE_BYTES);
                    let zeros = &ZEROS[..usize::try_from(end - at).unwrap_or(0)];
                    self.write_part(stack, zeros, at, ZeroBlocks::Written)?;
                    at = end;
                }
                Ok(())
            }),
        }
    }

    /// Gives `len` bytes at `offset` up; they read as zeros. The same as freeing zeroes.
    pub fn trim(&self, offset: u64, len: u64) -> Result<()> {
        self.write_zeroes(offset, len, Zeroing::Free)
    }

    fn write_with(&self, bytes: &[u8], offset: u64, zero_blocks: ZeroBlocks) -> Result<()> {
        let range = self.range(offset, bytes.len() as u64)?;
        let room = match zero_blocks {
            ZeroBlocks::Found => BY_BLOCK,
            ZeroBlocks::Written => EDGES_AND_CORE,
        };
        self.in_groups(&range, room, &mut |stack, part| {
            let from = usize::try_from(part.start - offset).unwrap_or(usize::MAX);
            let to = usize::try_from(part.end - offset).unwrap_or(usize::MAX);
            self.write_part(stack, &bytes[from..to], part.start, zero_blocks)
        })
    }

    /// Calls `change` for each group of `range` with its stripes locked and the stack as it is
    /// then, and remembers the whole of `range` if one fails.
    fn in_groups(
        &self,
        range: &Range<u64>,
        notes_of: NotesOf,
        change: &mut dyn FnMut(&Stack, Range<u64>) -> Result<()>,
    ) -> Result<()> {
        self.failures.check_poison()?;
        let mut at = range.start;
        while at < range.end {
            let part = at..range.end.min((at / GROUP_BYTES + 1) * GROUP_BYTES);
            let _room = self.room_for_notes(notes_of(&part)).inspect_err(|_| {
                self.failures.add_write(range.clone());
            })?;
            let _locks = self.lock_stripes(&part);
            let stack = self.stack.load();
            if let Err(error) = change(&stack, part.clone()) {
                self.failures.add_write(range.clone());
                if self.notes.is_broken() {
                    self.failures.poison("what is written cannot be noted for a successor");
                }
                return Err(error);
            }
            self.failures.written(&part);
            at = part.end;
        }
        Ok(())
    }

    /// Room for notes, made by flushing if need be. The caller has no stripes.
    pub(super) fn room_for_notes(&self, count: u64) -> Result<Room<'_>> {
        for _ in 0..ROOM_TRIES_MAX {
            if let Some(room) = self.notes.reserve(count) {
                return Ok(room);
            }
            self.settle()?;
        }
        let message = "there is no room to note what is written; free some on the file system";
        Err(Error::new(ErrorKind::NoSpace, message))
    }

    /// Locks the stripes of a range within a group, in ascending order.
    fn lock_stripes(&self, range: &Range<u64>) -> [Option<MutexGuard<'_, ()>>; GROUP_STRIPES] {
        let mut guards = [const { None }; GROUP_STRIPES];
        let first = range.start / STRIPE_BYTES;
        let stripes = first..range.end.div_ceil(STRIPE_BYTES);
        for (guard, stripe) in guards.iter_mut().zip(stripes) {
            let index = usize::try_from(stripe).unwrap_or(0) % STRIPE_LOCKS;
            *guard = Some(self.lock_stripe(index));
        }
        guards
    }

    fn lock_stripe(&self, index: usize) -> MutexGuard<'_, ()> {
        // States are set block by block after their bytes, so that a panic leaves them sound.
        self.stripes[index].lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until nobody works on a stack that was replaced before.
    pub(super) fn drain_stripes(&self) {
        for index in 0..STRIPE_LOCKS {
            drop(self.lock_stripe(index));
        }
    }

    /// Keeps all writers out until the guards are dropped.
    pub(super) fn lock_all_stripes(&self) -> Vec<MutexGuard<'_, ()>> {
        (0..STRIPE_LOCKS).map(|index| self.lock_stripe(index)).collect()
    }

    fn write_part(
        &self,
        stack: &Stack,
        bytes: &[u8],
        offset: u64,
        zero_blocks: ZeroBlocks,
    ) -> Result<()> {
        let cuts = Cuts::new(offset..offset + bytes.len() as u64, self.size_bytes);
        let (head, rest) = bytes.split_at(cuts.head_bytes);
        let (core, tail) = rest.split_at(rest.len() - cuts.tail_bytes);
        self.write_partial(stack, head, offset, zero_blocks)?;
        self.write_blocks(top(stack), core, cuts.core.start, zero_blocks)?;
        self.write_partial(stack, tail, offset + (bytes.len() - tail.len()) as u64, zero_blocks)
    }

    fn zero(&self, stack: &Stack, part: Range<u64>) -> Result<()> {
        let cuts = Cuts::new(part.clone(), self.size_bytes);
        let found = ZeroBlocks::Found;
        self.write_partial(stack, &ZEROS[..cuts.head_bytes], part.start, found)?;
        zero_blocks_of(top(stack), cuts.core)?;
        let tail = &ZEROS[..cuts.tail_bytes];
        self.write_partial(stack, tail, part.end - tail.len() as u64, found)
    }

    /// Writes whole blocks from block `first` on; the disk's last one may be short.
    fn write_blocks(
        &self,
        top: &Layer,
        bytes: &[u8],
        first: u64,
        zero_blocks: ZeroBlocks,
    ) -> Result<()> {
        if zero_blocks == ZeroBlocks::Written {
            return write_run(top, bytes, first);
        }
        let mut blocks = bytes.chunks(BLOCK_BYTES).map(is_zero).peekable();
        let mut from = 0;
        let mut to = 0;
        while let Some(is_zero) = blocks.next() {
            to += 1;
            if blocks.peek() == Some(&is_zero) {
                continue;
            }
            let start = first + from as u64;
            if is_zero {
                zero_blocks_of(top, start..first + to as u64)?;
            } else {
                let end = bytes.len().min(to * BLOCK_BYTES);
                write_run(top, &bytes[from * BLOCK_BYTES..end], start)?;
            }
            from = to;
        }
        Ok(())
    }

    /// Writes a part of one block and keeps the rest of it.
    fn write_partial(
        &self,
        stack: &Stack,
        bytes: &[u8],
        offset: u64,
        zero_blocks: ZeroBlocks,
    ) -> Result<()> {
        if bytes.is_empty() {
            return Ok(());
        }
        let top = top(stack);
        let block = offset / BLOCK_BYTES_U64;
        let start = block * BLOCK_BYTES_U64;
        let len = usize::try_from(self.size_bytes - start).unwrap_or(usize::MAX).min(BLOCK_BYTES);
        let mut whole = [0; BLOCK_BYTES];
        let whole = &mut whole[..len];
        match top.states.get(block) {
            BlockState::Dirty => {
                return top.write(bytes, offset).map_err(|error| cannot_write(offset, error));
            }
            BlockState::Zero => {}
            BlockState::Untouched => stack.read_at(whole, start, &self.failures)?,
        }
        let within = usize::try_from(offset - start).unwrap_or(0);
        whole[within..within + bytes.len()].copy_from_slice(bytes);
        if zero_blocks == ZeroBlocks::Found && is_zero(whole) {
            return zero_blocks_of(top, block..block + 1);
        }
        write_run(top, whole, block)
    }
}

/// A range cut at the borders of blocks.
struct Cuts {
    head_bytes: usize,
    core: Range<u64>,
    tail_bytes: usize,
}

impl Cuts {
    /// The disk's last block is whole if the range reaches the end of the disk.
    fn new(range: Range<u64>, size_bytes: u64) -> Cuts {
        let bytes = |len: u64| usize::try_from(len).unwrap_or(usize::MAX);
        let first = blocks_in(range.start);
        let end = if range.end == size_bytes {
            blocks_in(range.end)
        } else {
            range.end / BLOCK_BYTES_U64
        };
        let core_start = first * BLOCK_BYTES_U64;
        if first > end || core_start > range.end {
            // Within one block.
            return Cuts {
                head_bytes: bytes(range.end - range.start),
                core: end..end,
                tail_bytes: 0,
            };
        }
        let tail_start = (end * BLOCK_BYTES_U64).min(range.end);
        Cuts {
            head_bytes: bytes(core_start - range.start),
            core: first..end,
            tail_bytes: bytes(range.end - tail_start),
        }
    }
}

fn write_run(top: &Layer, bytes: &[u8], first: u64) -> Result<()> {
    if bytes.is_empty() {
        return Ok(());
    }
    let blocks = first..first + blocks_in(bytes.len() as u64);
    let offset = first * BLOCK_BYTES_U64;
    top.write(bytes, offset).map_err(|error| {
        top.forget_unwritten(blocks.clone());
        cannot_write(offset, error)
    })?;
    // The bytes stay if it fails: no state refers to them.
    top.mark(blocks, BlockState::Dirty).map_err(|error| cannot_write(offset, error))
}

fn zero_blocks_of(top: &Layer, blocks: Range<u64>) -> Result<()> {
    let offset = blocks.start * BLOCK_BYTES_U64;
    top.zero(blocks).map_err(|error| Error::io(format!("cannot free byte {offset}"), error))
}

fn cannot_write(offset: u64, error: std::io::Error) -> Error {
    let message = format!("cannot write byte {offset}");
    if error.kind() == std::io::ErrorKind::UnexpectedEof {
        return Error::with_source(ErrorKind::Corrupt, message, error);
    }
    Error::io(message, error)
}

/// The layer that is written to.
fn top(stack: &Stack) -> &Layer {
    &stack.layers[0]
}

#[cfg(test)]
mod tests {
    use super::Cuts;

    #[test]
    fn ranges_are_cut_at_blocks() {
        let size = 5 * 4096 + 512;
        for (range, head, core, tail) in [
            (0..4096, 0, 0..1, 0),
            (0..100, 0, 0..0, 100),
            (100..200, 100, 0..0, 0),
            (100..4096, 3996, 1..1, 0),
            (100..4097, 3996, 1..1, 1),
            (100..9000, 3996, 1..2, 808),
            (4096..20992, 0, 1..6, 0),
            (20480..20992, 0, 5..6, 0),
            (20481..20992, 511, 0..0, 0),
            (20480..20991, 0, 5..5, 511),
            (4100..20992, 4092, 2..6, 0),
            (8192..8192, 0, 2..2, 0),
        ] {
            let cuts = Cuts::new(range.clone(), size);
            let len = |cuts: &Cuts| cuts.core.end.saturating_sub(cuts.core.start);
            assert_eq!((cuts.head_bytes, cuts.tail_bytes), (head, tail), "{range:?}");
            assert_eq!(len(&cuts), core.end - core.start, "{range:?}");
            if len(&cuts) > 0 {
                assert_eq!(cuts.core, core, "{range:?}");
            }
        }
    }
}
