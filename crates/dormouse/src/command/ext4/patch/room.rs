//! What a batch takes of an image, added up in the order of its commands before any of them is run.

use dormouse_ext4::free::Room;

use crate::exit::{Fault, Kind};
use crate::output::size::human;

/// Bytes of an extent, or of the pointers of older file systems and their share of what leads to
/// them, for the worst case that no two blocks of a file lie side by side.
const EXTENT_BYTES: u64 = 12;

/// Blocks beside those of the extents, where there are any: the tree above them.
const TREE_UNITS: u64 = 3;

/// A name in a folder, with what stands before it and fills it up.
const NAME_BYTES: u64 = 12;

/// Units and inodes under way, and the most that were.
#[derive(Debug)]
pub(super) struct Need {
    unit_bytes: u64,
    now: [i64; 2],
    most: [i64; 2],
}

impl Need {
    pub(super) fn new(room: &Room) -> Need {
        Need { unit_bytes: room.unit_bytes, now: [0; 2], most: [0; 2] }
    }

    fn add(&mut self, units: u64, inodes: u64) {
        for (at, more) in [units, inodes].into_iter().enumerate() {
            self.now[at] = self.now[at].saturating_add_unsigned(more);
            self.most[at] = self.most[at].max(self.now[at]);
        }
    }

    /// A new inode whose content takes so many bytes, in units of its own.
    pub(super) fn inode(&mut self, bytes: u64) {
        let units = bytes.div_ceil(self.unit_bytes);
        let per_unit = (self.unit_bytes / EXTENT_BYTES).saturating_sub(1).max(1);
        let tree = if units > 4 { units.div_ceil(per_unit) + TREE_UNITS } else { 0 };
        self.add(units + tree, 1);
    }

    /// A block of extended attributes.
    pub(super) fn xattrs(&mut self) {
        self.add(1, 0);
    }

    /// Names that come into one folder; the last of them may need a new block each.
    pub(super) fn names(&mut self, count: u64, bytes: u64) {
        if count > 0 {
            let bytes = bytes + count * NAME_BYTES;
            // Names do not fill a block to its end. Nobody knows when they come, so they count for
            // all of the time.
            let units = bytes.div_ceil(self.unit_bytes) * 2;
            self.now[0] = self.now[0].saturating_add_unsigned(units);
            self.most[0] = self.most[0].saturating_add_unsigned(units);
        }
    }

    /// Something is removed.
    pub(super) fn less(&mut self, units: u64, inodes: u64) {
        self.now[0] = self.now[0].saturating_sub_unsigned(units);
        self.now[1] = self.now[1].saturating_sub_unsigned(inodes);
    }

    /// Why there is not enough room, if there is not.
    pub(super) fn check(&self, room: &Room, image: &str) -> Result<(), Fault> {
        let [units, inodes] = self.most.map(|most| u64::try_from(most).unwrap_or(0));
        if units > room.units {
            let [needed, free] =
                [units, room.units].map(|n| human(n.saturating_mul(room.unit_bytes)));
            let what = format!(
                "{image} has {free} free, and this may need {needed}; nothing was changed; \
                 `resize2fs` makes it larger"
            );
            return Err(Fault::new(Kind::Refused, what));
        }
        if inodes > room.inodes {
            let what = format!(
                "{image} has room for {} more files, and this is {inodes}; nothing was changed; \
                 `resize2fs` makes it larger",
                room.inodes
            );
            return Err(Fault::new(Kind::Refused, what));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_removed_first_makes_room() {
        let room = Room { unit_bytes: 4096, units: 10, inodes: 2 };
        let mut need = Need::new(&room);
        need.inode(4 * 4096);
        need.names(1, 10);
        assert!(need.check(&room, "a").is_ok());
        need.inode(3 * 4096);
        assert!(need.check(&room, "a").is_ok());
        need.inode(1);
        assert!(need.check(&room, "a").unwrap_err().to_string().contains("2 more files"));

        let mut need = Need::new(&room);
        need.less(100, 1);
        need.inode(100 * 4096);
        assert!(need.check(&room, "a").is_ok());
        let mut need = Need::new(&room);
        need.inode(100 * 4096);
        need.less(100, 1);
        assert!(need.check(&room, "a").unwrap_err().to_string().contains("nothing was changed"));
    }
}
