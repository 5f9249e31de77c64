//! Huge pages for a test, reserved while it runs (`vm.nr_hugepages`).

use std::fs::{self, File};

use anyhow::{Context, Result, ensure};

const COUNT: &str = "/proc/sys/vm/nr_hugepages";

/// Huge pages of 2 MiB that were added to the machine's; taken away when dropped.
///
/// Processes take turns at changing the number, by a lock on a file.
#[derive(Debug)]
pub struct HugePages {
    count: u64,
}

impl HugePages {
    /// Adds `count`. Wants root, and memory that is not in pieces.
    pub fn reserve(count: u64) -> Result<HugePages> {
        let _turn = turn()?;
        let before = read()?;
        write(before + count)?;
        let reserved = HugePages { count: read()?.saturating_sub(before) };
        ensure!(reserved.count == count, "{} of {count} huge pages", reserved.count);
        Ok(reserved)
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        let given = turn().and_then(|_turn| write(read()?.saturating_sub(self.count)));
        if let Err(error) = given
            && !std::thread::panicking()
        {
            panic!("huge pages stay reserved: {error:#}");
        }
    }
}

fn turn() -> Result<File> {
    let path = std::env::temp_dir().join("dormouse-huge-pages.lock");
    let file = File::create(&path).with_context(|| format!("no {}", path.display()))?;
    rustix::fs::flock(&file, rustix::fs::FlockOperation::LockExclusive)?;
    Ok(file)
}

fn read() -> Result<u64> {
    let text = fs::read_to_string(COUNT).context(COUNT)?;
    text.trim().parse().with_context(|| format!("{COUNT} says {text:?}"))
}

fn write(count: u64) -> Result<()> {
    fs::write(COUNT, count.to_string()).with_context(|| format!("cannot write to {COUNT}"))
}
