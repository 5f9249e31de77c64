//! Pictures of a trace: addresses from top to bottom, the order of touching from left to right.
//!
//! Every column stands for as many touches as any other; a cell is the stronger the more of its
//! column's touches fall into its addresses. A scan is a slope, a hot spot a line.

pub(crate) mod svg;
pub(crate) mod terminal;

use std::ops::Range;

/// A trace in cells.
#[derive(Debug)]
pub(crate) struct Plot {
    columns: usize,
    rows: usize,
    image_blocks: u64,
    touched: u64,
    cells: Vec<u32>,
}

impl Plot {
    /// A plot of `order`, all of whose blocks lie in an image of `image_blocks`.
    pub(crate) fn new(
        columns: usize,
        rows: usize,
        order: &[Range<u64>],
        image_blocks: u64,
    ) -> Plot {
        let touched = order.iter().map(|run| run.end - run.start).sum();
        let mut plot =
            Plot { columns, rows, image_blocks, touched, cells: vec![0; columns * rows] };
        for (place, block) in (0..).zip(order.iter().cloned().flatten()) {
            let column = scaled(place, touched, columns);
            let row = scaled(block, image_blocks, rows);
            plot.cells[row * columns + column] += 1;
        }
        plot
    }

    /// Touches in a cell, and in its column.
    fn cell(&self, row: usize, column: usize) -> (u64, u64) {
        let at = |row: usize| u64::from(self.cells[row * self.columns + column]);
        (at(row), (0..self.rows).map(at).sum())
    }

    /// The first block of a row.
    fn first_block(&self, row: usize) -> u64 {
        let start = u128::from(self.image_blocks) * row as u128;
        u64::try_from(start.div_ceil(self.rows as u128)).unwrap_or(u64::MAX)
    }

    /// The first touch of a column.
    fn first_touch(&self, column: usize) -> u64 {
        let start = u128::from(self.touched) * column as u128;
        u64::try_from(start.div_ceil(self.columns as u128)).unwrap_or(u64::MAX)
    }
}

/// Which of `parts` equal parts of `0..whole` has `at`.
fn scaled(at: u64, whole: u64, parts: usize) -> usize {
    let part = u128::from(at) * parts as u128 / u128::from(whole.max(1));
    usize::try_from(part).unwrap_or(usize::MAX).min(parts - 1)
}

#[cfg(test)]
impl Plot {
    /// A boot: a scan, a hot spot that comes again and again, and touches all over.
    fn sample() -> Plot {
        let hot = (0..400).map(|n| 100 + n * 3 % 64..101 + n * 3 % 64);
        let scan = (0..400).map(|n| 4000 + n * 8..4008 + n * 8);
        let spread = (0..800).map(|n| n * 7919 % 16384..n * 7919 % 16384 + 1);
        Plot::new(64, 24, &hot.chain(scan).chain(spread).collect::<Vec<_>>(), 16384)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_touch_is_in_one_cell() {
        let plot = Plot::sample();
        let cells: u64 = plot.cells.iter().map(|&cell| u64::from(cell)).sum();
        assert_eq!(cells, plot.touched);
        let plot = Plot::new(4, 4, &[0..1, 15..16, 4..6], 16);
        assert_eq!(plot.cells, [1, 0, 0, 0, 0, 0, 1, 1, 0, 0, 0, 0, 0, 1, 0, 0]);
        assert_eq!(plot.cell(3, 1), (1, 1));
        assert_eq!((plot.first_block(2), plot.first_touch(3)), (8, 3));
    }

    #[test]
    fn few_touches_and_small_images_are_drawn_too() {
        for (order, blocks) in [(vec![], 0), (vec![2..3, 0..2], 3), (vec![1..2, 0..1], 2)] {
            let plot = Plot::new(64, 24, &order, blocks);
            assert_eq!(plot.cells.iter().map(|&cell| u64::from(cell)).sum::<u64>(), plot.touched);
        }
    }
}
