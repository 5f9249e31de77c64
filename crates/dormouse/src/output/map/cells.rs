//! An image cut into cells, with what each holds.

use std::ops::Range;

/// Cells in a row; a power of two, so that rows begin at round addresses.
pub(crate) const COLUMNS: usize = 64;

/// The most rows: a picture and a terminal of half lines show them at a glance.
const ROWS_MAX: usize = 64;

/// No cell is smaller than a block.
const CELL_BYTES_MIN: u64 = 4096;

/// Where bytes of an image come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Origin {
    /// Nowhere: they are zero.
    Zero,

    /// The pack that the snapshot itself wrote.
    Own,

    /// The pack of another snapshot, most often an ancestor.
    Ancestor,

    /// A disk: they were stored as blocks of a disk by whatever snapshot.
    Disk,
}

impl Origin {
    /// How many there are.
    pub(crate) const COUNT: usize = 4;

    /// All of them, in the order of legends.
    pub(crate) const ALL: [Origin; Origin::COUNT] =
        [Origin::Own, Origin::Ancestor, Origin::Disk, Origin::Zero];

    /// Those that take room.
    const STORED: [Origin; 3] = [Origin::Own, Origin::Ancestor, Origin::Disk];
}

/// An image in cells.
#[derive(Debug)]
pub(crate) struct Cells {
    size_bytes: u64,
    cell_bytes: u64,
    cells: Vec<[u64; Origin::COUNT]>,
}

impl Cells {
    /// Empty cells for an image of `size_bytes`.
    pub(crate) fn new(size_bytes: u64) -> Cells {
        let cells_max = (COLUMNS * ROWS_MAX) as u64;
        let cell_bytes = size_bytes.div_ceil(cells_max).max(CELL_BYTES_MIN).next_power_of_two();
        let count = usize::try_from(size_bytes.div_ceil(cell_bytes)).unwrap_or(usize::MAX);
        Cells { size_bytes, cell_bytes, cells: vec![[0; Origin::COUNT]; count] }
    }

    /// Counts the bytes of `range`, which must lie in the image.
    pub(crate) fn add(&mut self, range: Range<u64>, origin: Origin) {
        let mut at = range.start;
        while at < range.end {
            let number = at / self.cell_bytes;
            let end = range.end.min((number + 1) * self.cell_bytes);
            let cell = usize::try_from(number).ok().and_then(|number| self.cells.get_mut(number));
            let Some(cell) = cell else { return };
            cell[origin as usize] += end - at;
            at = end;
        }
    }

    /// Length of the image.
    pub(crate) fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    /// Bytes in a cell; the last one may have fewer.
    pub(crate) fn cell_bytes(&self) -> u64 {
        self.cell_bytes
    }

    /// The cells in order.
    pub(crate) fn iter(&self) -> impl Iterator<Item = &[u64; Origin::COUNT]> {
        self.cells.iter()
    }

    /// The cells row by row; the last row may be short.
    pub(crate) fn rows(&self) -> impl ExactSizeIterator<Item = &[[u64; Origin::COUNT]]> {
        self.cells.chunks(COLUMNS)
    }

    /// Sums over all cells.
    pub(crate) fn totals(&self) -> [u64; Origin::COUNT] {
        self.cells.iter().fold([0; Origin::COUNT], |mut sums, cell| {
            sums.iter_mut().zip(cell).for_each(|(sum, bytes)| *sum += bytes);
            sums
        })
    }
}

/// The stored origin that a cell holds most of and how many bytes that are; none if all is zero.
pub(crate) fn dominant(cell: &[u64; Origin::COUNT]) -> Option<(Origin, u64)> {
    let stored = Origin::STORED.map(|origin| (origin, cell[origin as usize]));
    stored.into_iter().max_by_key(|(_, bytes)| *bytes).filter(|(_, bytes)| *bytes > 0)
}

#[cfg(test)]
impl Cells {
    /// Cells that resemble a guest's memory of 512 MiB.
    pub(crate) fn sample() -> Cells {
        let mut cells = Cells::new(512 << 20);
        let mut state = 1_u64;
        let mut at = 0;
        while at < cells.size_bytes() {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(at);
            let length = ((state >> 40) % 192 + 1) << 12 << ((state >> 33) % 6);
            let end = (at + length).min(cells.size_bytes());
            let origin = match (state >> 50) % 16 {
                0..=4 => Origin::Disk,
                5..=8 => Origin::Ancestor,
                9..=10 => Origin::Own,
                _ => Origin::Zero,
            };
            cells.add(at..end, if at > 400 << 20 { Origin::Zero } else { origin });
            at = end;
        }
        cells
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cells_are_powers_of_two_and_few() {
        for (size, cell, count) in [
            (0, 4096, 0),
            (1, 4096, 1),
            (512 << 20, 128 << 10, 4096),
            ((512 << 20) + 1, 256 << 10, 2049),
            (16 << 40, 4 << 30, 4096),
        ] {
            let cells = Cells::new(size);
            assert_eq!((cells.cell_bytes(), cells.iter().count()), (cell, count), "{size}");
        }
    }

    #[test]
    fn ranges_are_spread_over_cells() {
        let mut cells = Cells::new(4 * 4096 + 100);
        cells.add(0..5000, Origin::Own);
        cells.add(5000..16384, Origin::Zero);
        cells.add(16384..16484, Origin::Disk);
        let all: Vec<_> = cells.iter().copied().collect();
        assert_eq!(all[0], [0, 4096, 0, 0]);
        assert_eq!(all[1], [8192 - 5000, 5000 - 4096, 0, 0]);
        assert_eq!(all[4], [0, 0, 0, 100]);
        assert_eq!(cells.totals().iter().sum::<u64>(), cells.size_bytes());
        assert_eq!(dominant(&all[1]), Some((Origin::Own, 904)));
        assert_eq!(dominant(&all[2]), None);
    }
}
