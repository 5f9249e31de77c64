//! Whose files are whose in the image.

use std::str::FromStr;

use crate::error::{Error, ErrorKind, Result};
use crate::tree::{NodeId, Tree};

/// A user and a group.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Owner {
    /// The user.
    pub uid: u32,

    /// The group.
    pub gid: u32,
}

impl FromStr for Owner {
    type Err = Error;

    /// Reads `UID:GID`, or `UID` for both.
    fn from_str(text: &str) -> Result<Owner> {
        let (uid, gid) = text.split_once(':').unwrap_or((text, text));
        let number = |text: &str| {
            text.parse().map_err(|_| {
                Error::new(ErrorKind::InvalidInput, format!("{text:?} is not a number of an owner"))
            })
        };
        Ok(Owner { uid: number(uid)?, gid: number(gid)? })
    }
}

/// A run of ids outside that are others in the image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IdRange {
    /// The first id outside.
    pub from: u32,

    /// What it is in the image.
    pub to: u32,

    /// How many.
    pub count: u32,
}

impl FromStr for IdRange {
    type Err = Error;

    /// Reads `FROM:TO:COUNT`.
    fn from_str(text: &str) -> Result<IdRange> {
        let wrong = || {
            let what = format!("{text:?} is not a map of ids, FROM:TO:COUNT");
            Error::new(ErrorKind::InvalidInput, what)
        };
        let numbers: Vec<u32> =
            text.split(':').map(|part| part.parse().map_err(|_| wrong())).collect::<Result<_>>()?;
        let [from, to, count] = numbers[..] else { return Err(wrong()) };
        if from.checked_add(count).is_none() || to.checked_add(count).is_none() || count == 0 {
            return Err(wrong());
        }
        Ok(IdRange { from, to, count })
    }
}

/// How owners are changed on their way into an image.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Ownership {
    /// As they are.
    #[default]
    Kept,

    /// Everything belongs to one.
    All(Owner),

    /// By runs of ids, as in a user namespace. An id in no run is an error.
    Mapped {
        /// Users.
        users: Vec<IdRange>,
        /// Groups.
        groups: Vec<IdRange>,
    },
}

impl Ownership {
    /// Changes the owners of a whole tree.
    pub fn apply(&self, tree: &mut Tree) -> Result<()> {
        for index in 0..tree.nodes.len() {
            let node = &mut tree.nodes[index];
            match self {
                Ownership::Kept => return Ok(()),
                Ownership::All(owner) => (node.uid, node.gid) = (owner.uid, owner.gid),
                Ownership::Mapped { users, groups } => {
                    let found = (map(users, node.uid), map(groups, node.gid));
                    let (Some(uid), Some(gid)) = found else {
                        let (uid, gid) = (node.uid, node.gid);
                        // An inode below the limit of inodes.
                        let id = NodeId(u32::try_from(index).unwrap_or(u32::MAX));
                        let path = tree.path_of(id);
                        let what = format!("{path} belongs to {uid}:{gid}, which no map covers");
                        return Err(Error::new(ErrorKind::InvalidInput, what));
                    };
                    (node.uid, node.gid) = (uid, gid);
                }
            }
        }
        Ok(())
    }
}

fn map(ranges: &[IdRange], id: u32) -> Option<u32> {
    if ranges.is_empty() {
        return Some(id);
    }
    let range = ranges.iter().find(|range| id >= range.from && id - range.from < range.count)?;
    Some(range.to + (id - range.from))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_mapped_by_runs() {
        let ranges: Vec<IdRange> = ["1000:0:1", "100000:1:65535"]
            .iter()
            .map(|text| text.parse().expect("both are right"))
            .collect();
        for (id, expected) in [(1000, Some(0)), (100_000, Some(1)), (165_534, Some(65535))] {
            assert_eq!(map(&ranges, id), expected);
        }
        for id in [0, 1001, 165_535] {
            assert_eq!(map(&ranges, id), None);
        }
        for wrong in ["", "1", "1:2", "1:2:0", "1:2:3:4", "4294967295:0:2", "a:b:c"] {
            assert!(wrong.parse::<IdRange>().is_err(), "{wrong}");
        }
        assert_eq!("5:6".parse::<Owner>().ok(), Some(Owner { uid: 5, gid: 6 }));
        assert_eq!("7".parse::<Owner>().ok(), Some(Owner { uid: 7, gid: 7 }));
        assert!("root".parse::<Owner>().is_err());
    }
}
