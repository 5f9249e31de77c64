//! Which blocks can be given out, and in what runs.

use std::ops::Range;

use crate::error::{Error, ErrorKind, Result};

/// The blocks of an image, of which some are fixed.
#[derive(Clone, Debug)]
pub(crate) struct Space {
    /// In order, apart from each other.
    fixed: Vec<Range<u64>>,
    blocks: u64,
}

impl Space {
    pub(crate) fn new(fixed: Vec<Range<u64>>, blocks: u64) -> Space {
        Space { fixed: merge(fixed), blocks }
    }

    pub(crate) fn fixed(&self) -> &[Range<u64>] {
        &self.fixed
    }

    /// The index of the first fixed run that ends after `block`.
    fn after(&self, block: u64) -> usize {
        self.fixed.partition_point(|range| range.end <= block)
    }

    /// The first block from `block` on that is not fixed.
    pub(crate) fn skip(&self, block: u64) -> u64 {
        match self.fixed.get(self.after(block)) {
            Some(range) if range.start <= block => range.end,
            _ => block,
        }
    }

    /// The runs that `blocks` blocks from `start` on take.
    pub(crate) fn runs(&self, start: u64, blocks: u64) -> impl Iterator<Item = Range<u64>> + '_ {
        let mut index = self.after(start);
        let (mut at, mut left) = (start, blocks);
        std::iter::from_fn(move || {
            if left == 0 {
                return None;
            }
            if let Some(range) = self.fixed.get(index)
                && range.start <= at
            {
                at = range.end;
                index += 1;
            }
            let end = self.fixed.get(index).map_or(u64::MAX, |range| range.start);
            let run = at..end.min(at + left);
            left -= run.end - run.start;
            at = run.end;
            Some(run)
        })
    }

    /// The first run of `blocks` blocks in one piece from `from` on.
    pub(crate) fn in_one_piece(&self, from: u64, blocks: u64) -> Range<u64> {
        let mut at = from;
        for range in &self.fixed[self.after(from)..] {
            if range.start >= at + blocks {
                break;
            }
            at = range.end;
        }
        at..at + blocks
    }

    /// How many blocks from `from` on are not fixed.
    pub(crate) fn room(&self, from: u64) -> u64 {
        let fixed: u64 = self.fixed[self.after(from)..]
            .iter()
            .map(|range| range.end.min(self.blocks).saturating_sub(range.start.max(from)))
            .sum();
        self.blocks.saturating_sub(from).saturating_sub(fixed)
    }
}

/// Gives out blocks in ascending order.
#[derive(Debug)]
pub(crate) struct Cursor<'a> {
    space: &'a Space,
    at: u64,
}

impl Cursor<'_> {
    pub(crate) fn new(space: &Space, at: u64) -> Cursor<'_> {
        Cursor { space, at }
    }

    pub(crate) fn at(&self) -> u64 {
        self.at
    }

    /// The first of `blocks` more blocks.
    pub(crate) fn take(&mut self, blocks: u64) -> Result<u64> {
        if blocks == 0 {
            return Ok(self.at);
        }
        let first = self.space.skip(self.at);
        let end = self.space.runs(first, blocks).last().map_or(first, |run| run.end);
        if end > self.space.blocks {
            return Err(Error::new(
                ErrorKind::DoesNotFit,
                format!("the tree needs more than the image's {} blocks", self.space.blocks),
            ));
        }
        self.at = end;
        Ok(first)
    }
}

/// The ranges in order, those joined that touch.
pub(crate) fn merge(mut ranges: Vec<Range<u64>>) -> Vec<Range<u64>> {
    ranges.retain(|range| !range.is_empty());
    ranges.sort_unstable_by_key(|range| range.start);
    let mut merged: Vec<Range<u64>> = Vec::with_capacity(ranges.len());
    for range in ranges {
        match merged.last_mut() {
            Some(last) if range.start <= last.end => last.end = last.end.max(range.end),
            _ => merged.push(range),
        }
    }
    merged
}

#[cfg(test)]
#[expect(clippy::single_range_in_vec_init, reason = "runs are what is tested")]
mod tests {
    use super::*;

    #[test]
    fn runs_skip_what_is_fixed() {
        let space = Space::new(vec![20..30, 10..12, 12..14], 100);
        let runs = |start, blocks| space.runs(start, blocks).collect::<Vec<_>>();
        assert_eq!(runs(0, 5), [0..5]);
        assert_eq!(runs(0, 10), [0..10]);
        assert_eq!(runs(0, 12), [0..10, 14..16]);
        assert_eq!(runs(11, 20), [14..20, 30..44]);
        assert_eq!(runs(30, 1), [30..31]);
        assert_eq!(
            (space.skip(9), space.skip(10), space.skip(29), space.skip(30)),
            (9, 14, 30, 30)
        );
        assert_eq!(space.in_one_piece(0, 10), 0..10);
        assert_eq!(space.in_one_piece(0, 11), 30..41);
        assert_eq!(space.in_one_piece(12, 6), 14..20);
        assert_eq!((space.room(0), space.room(25), space.room(99)), (86, 70, 1));
    }

    #[test]
    fn a_cursor_gives_out_all_and_no_more() {
        let space = Space::new(vec![4..6], 10);
        let mut cursor = Cursor::new(&space, 0);
        assert_eq!(cursor.take(4).unwrap(), 0);
        assert_eq!(cursor.take(1).unwrap(), 6);
        assert_eq!(cursor.take(4).unwrap_err().kind(), ErrorKind::DoesNotFit);
        assert_eq!(cursor.take(3).unwrap(), 7);
    }
}
