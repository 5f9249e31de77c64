//! `cargo xtask pauses`: records the pinned five pauses for benches, and shows what is in them.

use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;

use anyhow::{Context, Result};
use comfy_table::Table;
use dormouse_testkit::guest::{Pause, Pauses, cache_dir};

const BLOCK_BYTES: usize = 4096;

/// Records the pauses unless they are there, and prints a table of them.
pub(crate) fn record() -> Result<()> {
    let pauses = Pauses::prepare(&cache_dir(), &mut |line| println!("{line}"))?;
    let mut table = Table::new();
    table.set_header(["pause", "before it", "memory non-zero", "changed", "disk data", "state"]);
    let mut parent: Option<std::path::PathBuf> = None;
    for pause in Pause::ALL {
        let files = pauses.files(pause);
        let (nonzero, changed) = compare(&files.memory, parent.as_deref())?;
        table.add_row([
            pause.number().to_string(),
            pause.title().to_owned(),
            mib(nonzero),
            mib(changed),
            mib(File::open(&files.disk)?.metadata()?.blocks() * 512),
            mib(File::open(&files.state)?.metadata()?.len()),
        ]);
        parent = Some(files.memory);
    }
    println!("{table}");
    Ok(())
}

/// Bytes in non-zero blocks of `memory`, and in blocks that differ from `parent`'s.
fn compare(memory: &Path, parent: Option<&Path>) -> Result<(u64, u64)> {
    let open = |path: &Path| File::open(path).with_context(|| format!("no {}", path.display()));
    let (file, parent) = (open(memory)?, parent.map(open).transpose()?);
    let (mut block, mut before) = ([0; BLOCK_BYTES], [0; BLOCK_BYTES]);
    let (mut nonzero, mut changed) = (0, 0);
    let length = file.metadata()?.len();
    for offset in (0..length).step_by(BLOCK_BYTES) {
        file.read_exact_at(&mut block, offset)?;
        if let Some(parent) = &parent {
            parent.read_exact_at(&mut before, offset)?;
        }
        nonzero += if block == [0; BLOCK_BYTES] { 0 } else { BLOCK_BYTES as u64 };
        changed += if block == before { 0 } else { BLOCK_BYTES as u64 };
    }
    Ok((nonzero, changed))
}

fn mib(bytes: u64) -> String {
    let tenths = bytes * 10 / (1 << 20);
    format!("{}.{} MiB", tenths / 10, tenths % 10)
}
