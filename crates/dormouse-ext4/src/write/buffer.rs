//! Bytes on their way into an image: aligned, as writing past the page cache wants them.

use crate::disk::BLOCK_BYTES;

/// A block in memory.
#[derive(Clone, zerocopy::IntoBytes, zerocopy::FromBytes, zerocopy::Immutable)]
#[repr(C, align(4096))]
struct Block([u8; BLOCK_BYTES]);

/// A buffer of a fixed size that is filled from its front.
pub(crate) struct Buffer {
    blocks: Vec<Block>,
    len: usize,
}

impl std::fmt::Debug for Buffer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Buffer").field("len", &self.len).finish_non_exhaustive()
    }
}

impl Buffer {
    /// An empty one with room for so many bytes, in whole blocks.
    pub(crate) fn new(bytes: usize) -> Buffer {
        Buffer { blocks: vec![Block([0; BLOCK_BYTES]); bytes.div_ceil(BLOCK_BYTES)], len: 0 }
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }

    pub(crate) fn capacity(&self) -> usize {
        self.blocks.len() * BLOCK_BYTES
    }

    pub(crate) fn room(&self) -> usize {
        self.capacity() - self.len
    }

    pub(crate) fn clear(&mut self) {
        self.len = 0;
    }

    pub(crate) fn filled(&self) -> &[u8] {
        &zerocopy::IntoBytes::as_bytes(self.blocks.as_slice())[..self.len]
    }

    /// Takes what there is room for, and returns the rest.
    pub(crate) fn extend<'a>(&mut self, bytes: &'a [u8]) -> &'a [u8] {
        let (now, rest) = bytes.split_at(self.room().min(bytes.len()));
        self.grow(now.len()).copy_from_slice(now);
        rest
    }

    /// The next bytes, to be filled; what they held before is not told.
    pub(crate) fn grow(&mut self, bytes: usize) -> &mut [u8] {
        let begin = self.len;
        self.len += bytes;
        let all = zerocopy::IntoBytes::as_mut_bytes(self.blocks.as_mut_slice());
        &mut all[begin..begin + bytes]
    }

    /// Fills the last block up with zeros.
    pub(crate) fn complete_block(&mut self) {
        let missing = self.len.next_multiple_of(BLOCK_BYTES) - self.len;
        self.grow(missing).fill(0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_aligned_and_completed_with_zeros() {
        let mut buffer = Buffer::new(2 * BLOCK_BYTES - 1);
        assert_eq!(buffer.room(), 2 * BLOCK_BYTES);
        assert_eq!(buffer.extend(&[7; 3 * BLOCK_BYTES]).len(), BLOCK_BYTES);
        assert_eq!(buffer.filled().as_ptr().align_offset(4096), 0);
        buffer.clear();
        buffer.grow(5).fill(1);
        buffer.complete_block();
        assert_eq!(buffer.filled().len(), BLOCK_BYTES);
        assert!(buffer.filled()[5..].iter().all(|&byte| byte == 0));
    }
}
