//! Which part of an ext4 a block belongs to, from what `dumpe2fs` and `debugfs` print.

use std::ops::Range;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};

use super::image::sbin;
use crate::command::output_of;

/// What a file system keeps in a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Part {
    /// Contents of files and folders.
    Files,
    /// The inode tables.
    Inodes,
    /// Superblocks, group descriptors and bitmaps.
    Groups,
    /// The journal.
    Journal,
}

impl Part {
    pub(super) const ALL: [Part; 4] = [Part::Files, Part::Inodes, Part::Groups, Part::Journal];

    pub(super) fn title(self) -> &'static str {
        match self {
            Part::Files => "files and folders",
            Part::Inodes => "inode tables",
            Part::Groups => "superblock, descriptors, bitmaps",
            Part::Journal => "journal",
        }
    }
}

/// Where the parts are; what is nowhere belongs to files.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Layout {
    /// Block numbers, sorted and apart from each other.
    parts: Vec<(Range<u64>, Part)>,

    /// Groups whose inode table nobody has written yet.
    pub(super) lazy_groups: u64,
}

impl Layout {
    pub(super) fn read(image: &Path) -> Result<Layout> {
        let groups = output_of(Command::new(sbin("dumpe2fs")).arg(image))?;
        let journal =
            output_of(Command::new(sbin("debugfs")).args(["-R", "blocks <8>"]).arg(image))?;
        Layout::parse(&groups, &journal)
    }

    fn parse(groups: &str, journal: &str) -> Result<Layout> {
        let mut layout = Layout::default();
        for line in groups.lines() {
            if line.starts_with("Group ")
                && line.contains("(Blocks ")
                && !line.contains("ITABLE_ZEROED")
            {
                layout.lazy_groups += 1;
            }
            for clause in line.split(", ") {
                let Some((what, place)) = clause.trim().split_once(" at ") else { continue };
                let part = match what {
                    "Inode table" => Part::Inodes,
                    "Primary superblock" | "Backup superblock" | "Group descriptors"
                    | "Block bitmap" | "Inode bitmap" => Part::Groups,
                    _ => continue,
                };
                let place = place.split(' ').next().unwrap_or(place);
                let (first, last) = place.split_once('-').unwrap_or((place, place));
                layout.parts.push((number(first)?..number(last)? + 1, part));
            }
        }
        for word in journal.split_whitespace() {
            let block = number(word)?;
            match layout.parts.last_mut() {
                Some((range, Part::Journal)) if range.end == block => range.end += 1,
                _ => layout.parts.push((block..block + 1, Part::Journal)),
            }
        }
        layout.parts.sort_by_key(|(range, _)| range.start);
        ensure!(
            layout.parts.windows(2).all(|pair| pair[0].0.end <= pair[1].0.start),
            "parts of the file system lie over each other"
        );
        Ok(layout)
    }

    /// Blocks of `blocks` in each part, in the order of [`Part::ALL`].
    pub(super) fn count(&self, blocks: Range<u64>) -> [u64; Part::ALL.len()] {
        let mut counts = [0; Part::ALL.len()];
        let mut rest = blocks.end - blocks.start;
        let first = self.parts.partition_point(|(range, _)| range.end <= blocks.start);
        for (range, part) in &self.parts[first..] {
            if range.start >= blocks.end {
                break;
            }
            let shared = range.end.min(blocks.end) - range.start.max(blocks.start);
            counts[*part as usize] += shared;
            rest -= shared;
        }
        counts[Part::Files as usize] += rest;
        counts
    }
}

fn number(text: &str) -> Result<u64> {
    text.parse().with_context(|| format!("{text:?} is no block number"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const GROUPS: &str = "\
Group descriptor size:    64
Group 0: (Blocks 0-32767) csum 0x7a96 [ITABLE_ZEROED]
  Primary superblock at 0, Group descriptors at 1-1
  Reserved GDT blocks at 2-1024
  Block bitmap at 1025 (+1025), csum 0xfe87e96b
  Inode bitmap at 1041 (+1041), csum 0xee91d158
  Inode table at 1057-1568 (+1057)
  23513 free blocks, 8181 free inodes, 2 directories, 8181 unused inodes
Group 1: (Blocks 32768-65535) csum 0xa506 [INODE_UNINIT, BLOCK_UNINIT]
  Backup superblock at 32768, Group descriptors at 32769-32769
  Inode table at 1569-2080 (bg #0 + 1569)
";

    #[test]
    fn blocks_find_their_part() {
        let layout = Layout::parse(GROUPS, "5000 5001 5002 7000\n").unwrap();
        assert_eq!(layout.lazy_groups, 1);
        let cases = [
            (0..2, [0, 0, 2, 0]),
            (1024..1027, [2, 0, 1, 0]),
            // 1042 to 1056 are other groups' bitmaps in a real list, and nobody's in this one.
            (1041..2081, [15, 1024, 1, 0]),
            (4999..7001, [1998, 0, 0, 4]),
            (32767..32771, [2, 0, 2, 0]),
        ];
        for (blocks, expected) in cases {
            assert_eq!(layout.count(blocks.clone()), expected, "{blocks:?}");
        }
    }

    #[test]
    fn what_is_no_layout_is_refused() {
        assert!(Layout::parse("  Inode table at x-y (+1)\n", "").is_err());
        assert!(Layout::parse(GROUPS, "1060").is_err());
    }
}
