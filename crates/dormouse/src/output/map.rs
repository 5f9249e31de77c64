//! Pictures of where an image's bytes are.
//!
//! The image is cut into equal cells of a power of two of bytes, from left to right and top to
//! bottom. A cell has the colour of the stored kind that it holds most of, the stronger the more
//! of the cell that is: what it holds besides, zeros above all, makes it fainter.

pub(crate) mod cells;
pub(crate) mod svg;
pub(crate) mod terminal;

use crate::output::colour::Rgb;
use crate::output::map::cells::Origin;

/// What a cell of zeros looks like in print, and what faint cells fade to.
pub(crate) const PAPER: Rgb = Rgb(0xee, 0xf0, 0xf3);

/// The colour of a cell that is full of blocks of an origin, and what the legend says about it.
fn look(origin: Origin) -> (Rgb, &'static str) {
    // Blue, orange and green of the Okabe-Ito palette: told apart by colour-blind readers, too.
    match origin {
        Origin::Zero => (PAPER, "zero"),
        Origin::Own => (Rgb(0xd5, 0x5e, 0x00), "its own"),
        Origin::Ancestor => (Rgb(0x00, 0x72, 0xb2), "from an ancestor"),
        Origin::Disk => (Rgb(0x00, 0x9e, 0x73), "from a disk"),
    }
}

/// How strong the colour of a cell is, in thousandths: little is still to be seen.
pub(crate) fn strength(part: u64, whole: u64) -> u32 {
    let share = u128::from(part) * 1000 / u128::from(whole.max(1));
    200 + u32::try_from(share.min(1000)).unwrap_or(1000) * 4 / 5
}
