//! What was measured, as it is kept (JSON) and as it is read (Markdown).

use std::fmt::Write;

use serde::{Deserialize, Serialize};

use super::layout::Part;
use super::plan::{Build, Cell, Mkfs, Mount, Phase, Recipe};

/// The whole experiment.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Results {
    /// Versions of what takes part.
    pub(super) qemu: String,
    pub(super) mke2fs: String,
    pub(super) idle_seconds: u64,
    pub(super) heartbeats: u32,
    /// Block groups left to the guest by a lazy mke2fs that makes the file, and that finds one.
    pub(super) lazy_groups_own_file: u64,
    pub(super) lazy_groups_given_file: u64,
    pub(super) bases: Vec<(Recipe, Base)>,
    pub(super) runs: Vec<Run>,
}

/// An image before any guest ran.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub(super) struct Base {
    pub(super) lazy_groups: u64,
    pub(super) nonzero_bytes: u64,
    pub(super) stored_bytes: u64,
}

/// One guest's life.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Run {
    #[serde(flatten)]
    pub(super) cell: Cell,
    /// As the guest's `/proc/mounts` has it.
    pub(super) mounted: String,
    pub(super) kernel: String,
    pub(super) measures: Vec<Measure>,
}

/// One pause. Blocks have 4 KiB.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub(super) struct Measure {
    pub(super) phase: Phase,
    /// In the overlay before the commit.
    pub(super) dirty_blocks: u64,
    pub(super) zero_blocks: u64,
    /// Other than in the snapshot before, by what ext4 keeps there, in the order of [`Part::ALL`].
    pub(super) changed_blocks: [u64; Part::ALL.len()],
    /// Of those, zero now.
    pub(super) freed_blocks: u64,
    /// Found nowhere in the store.
    pub(super) new_blocks: u64,
    /// Those, compressed.
    pub(super) stored_bytes: u64,
    /// All that the commit wrote: pack, maps, index and manifest.
    pub(super) written_bytes: u64,
}

impl Measure {
    /// Changed blocks that hold something. What was freed were files' blocks.
    pub(super) fn filled_blocks(&self) -> [u64; Part::ALL.len()] {
        let mut blocks = self.changed_blocks;
        let files = &mut blocks[Part::Files as usize];
        *files = files.saturating_sub(self.freed_blocks);
        blocks
    }

    /// For progress.
    pub(super) fn line(&self) -> String {
        format!(
            "{:<22} {:>6} blocks dirty, {:>6} zero, {:>6} new, {:>6} freed, {:>9} KiB stored",
            self.phase.title(),
            self.dirty_blocks,
            self.zero_blocks,
            self.new_blocks,
            self.freed_blocks,
            kib(self.stored_bytes),
        )
    }
}

impl Results {
    /// The measures of all runs of a cell at a phase, in the order of the runs.
    pub(super) fn of(&self, cell: Cell, phase: Phase) -> Vec<&Measure> {
        let runs = self.runs.iter().filter(|run| run.cell == cell);
        runs.flat_map(|run| &run.measures).filter(|measure| measure.phase == phase).collect()
    }

    /// The first run of a cell, which stands for it in pictures.
    pub(super) fn first(&self, cell: Cell, phase: Phase) -> Option<&Measure> {
        self.of(cell, phase).into_iter().next()
    }

    /// All tables of the page.
    pub(super) fn markdown(&self) -> String {
        let mut page = String::new();
        self.summary(&mut page);
        self.bases_table(&mut page);
        page.push_str("\n<details><summary>All blocks, phase by phase</summary>\n\n");
        for phase in Phase::ALL {
            self.phase_table(&mut page, phase);
        }
        page.push_str("</details>\n");
        page
    }

    /// Stored KiB by cell and phase; a range where a cell ran more than once.
    fn summary(&self, page: &mut String) {
        page.push_str("### KiB stored per pause\n\n| mkfs | built under | guest's options |");
        for phase in Phase::ALL {
            let _ = write!(page, " {} |", phase.title());
        }
        page.push_str(" sum |\n|---|---|---|");
        page.push_str(&"---:|".repeat(Phase::ALL.len() + 1));
        page.push('\n');
        for cell in self.cells() {
            let Cell { mount, recipe } = cell;
            let (mkfs, build) = (recipe.mkfs.title(), recipe.build.title());
            let _ = write!(page, "| {mkfs} | {build} | {} |", mount.title());
            let mut sums = Vec::new();
            for phase in Phase::ALL {
                let stored: Vec<u64> =
                    self.of(cell, phase).iter().map(|measure| measure.stored_bytes).collect();
                let _ = write!(page, " {} |", range(&stored, kib));
                sums.resize(stored.len().max(sums.len()), 0);
                stored.iter().zip(&mut sums).for_each(|(bytes, sum)| *sum += bytes);
            }
            let _ = writeln!(page, " {} |", range(&sums, kib));
        }
        page.push('\n');
    }

    fn phase_table(&self, page: &mut String, phase: Phase) {
        let _ = write!(
            page,
            "### {}\n\n| mkfs | built under | guest's options | dirty | zero | new | freed |",
            phase.title()
        );
        for part in Part::ALL {
            let _ = write!(page, " {} |", part.title());
        }
        page.push_str(" stored KiB | written KiB |\n|---|---|---|");
        page.push_str(&"---:|".repeat(Part::ALL.len() + 6));
        page.push('\n');
        for cell in self.cells() {
            let measures = self.of(cell, phase);
            let column = |value: &dyn Fn(&Measure) -> u64, show: fn(u64) -> String| {
                let values: Vec<u64> = measures.iter().map(|measure| value(measure)).collect();
                range(&values, show)
            };
            let Cell { mount, recipe } = cell;
            let _ = write!(
                page,
                "| {} | {} | {} | {} | {} | {} | {} |",
                recipe.mkfs.title(),
                recipe.build.title(),
                mount.title(),
                column(&|measure| measure.dirty_blocks, count),
                column(&|measure| measure.zero_blocks, count),
                column(&|measure| measure.new_blocks, count),
                column(&|measure| measure.freed_blocks, count),
            );
            for part in Part::ALL {
                let _ = write!(
                    page,
                    " {} |",
                    column(&|measure| measure.filled_blocks()[part as usize], count)
                );
            }
            let _ = writeln!(
                page,
                " {} | {} |",
                column(&|measure| measure.stored_bytes, kib),
                column(&|measure| measure.written_bytes, kib),
            );
        }
        page.push('\n');
    }

    fn bases_table(&self, page: &mut String) {
        page.push_str(
            "### The image itself\n\n\
             | mkfs | built under | groups left to the guest | non-zero MiB | stored MiB |\n\
             |---|---|---:|---:|---:|\n",
        );
        for (recipe, base) in &self.bases {
            let _ = writeln!(
                page,
                "| {} | {} | {} | {} | {} |",
                recipe.mkfs.title(),
                recipe.build.title(),
                base.lazy_groups,
                mib(base.nonzero_bytes),
                mib(base.stored_bytes),
            );
        }
    }

    /// The cells that ran, in the order of the tables.
    fn cells(&self) -> Vec<Cell> {
        let mut cells = Vec::new();
        for build in [Build::Default, Build::Tuned] {
            for mkfs in [Mkfs::Eager, Mkfs::Lazy] {
                for mount in Mount::ALL {
                    let cell = Cell { mount, recipe: Recipe { mkfs, build } };
                    if self.runs.iter().any(|run| run.cell == cell) {
                        cells.push(cell);
                    }
                }
            }
        }
        cells
    }
}

/// The value, or the smallest and the largest.
fn range(values: &[u64], show: fn(u64) -> String) -> String {
    match (values.iter().min(), values.iter().max()) {
        (Some(&low), Some(&high)) if show(low) == show(high) => show(low),
        (Some(&low), Some(&high)) => format!("{} to {}", show(low), show(high)),
        _ => "-".to_owned(),
    }
}

/// With separators between thousands.
pub(super) fn count(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (index, digit) in digits.char_indices() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// One decimal below 100 KiB.
pub(super) fn kib(bytes: u64) -> String {
    let tenths = (bytes * 10 + 512) / 1024;
    if tenths == 0 || tenths >= 1000 {
        return count((bytes + 512) / 1024);
    }
    format!("{}.{}", tenths / 10, tenths % 10)
}

fn mib(bytes: u64) -> String {
    let tenths = (bytes * 10 + (1 << 19)) >> 20;
    format!("{}.{}", tenths / 10, tenths % 10)
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// One run, whose n-th pause stored n KiB of files and freed one block.
    pub(in crate::experiment) fn sample() -> Results {
        let measures = Phase::ALL.iter().enumerate().map(|(index, &phase)| {
            let number = index as u64 + 1;
            Measure {
                phase,
                dirty_blocks: 4,
                zero_blocks: 1,
                changed_blocks: [number + 1, 2, 1, 1],
                freed_blocks: 1,
                new_blocks: 3,
                stored_bytes: number << 10,
                written_bytes: 5000,
            }
        });
        let cell = Cell { mount: Mount::Default, recipe: Recipe::PLAIN };
        let run = |measures| Run { cell, mounted: "rw".into(), kernel: "6".into(), measures };
        let first: Vec<Measure> = measures.collect();
        let mut second = first.clone();
        second[0].stored_bytes = 100 << 10;
        Results {
            qemu: "7".into(),
            mke2fs: "1".into(),
            idle_seconds: 1,
            heartbeats: 1,
            lazy_groups_own_file: 64,
            lazy_groups_given_file: 0,
            bases: vec![(
                Recipe::PLAIN,
                Base { lazy_groups: 0, nonzero_bytes: 3 << 20, stored_bytes: 1 << 20 },
            )],
            runs: vec![run(first), run(second)],
        }
    }

    #[test]
    fn tables_have_ranges_and_sums() {
        let page = sample().markdown();
        let summary = "| eager | default | default (relatime) | 1.0 to 100 | 2.0 | 3.0 | 4.0 | 5.0 | 6.0 | 21.0 to 120 |";
        assert!(page.contains(summary), "{page}");
        assert!(page.contains("| 4 | 1 | 3 | 1 | 1 | 2 | 1 | 1 | 1.0 to 100 | 4.9 |"), "{page}");
        assert!(page.contains("| eager | default | 0 | 3.0 | 1.0 |"), "{page}");
    }

    #[test]
    fn numbers_are_short() {
        assert_eq!([0, 999, 1000, 1_234_567].map(count), ["0", "999", "1,000", "1,234,567"]);
        assert_eq!([0, 20, 1024, 1536, 102_400].map(kib), ["0", "0", "1.0", "1.5", "100"]);
    }
}
