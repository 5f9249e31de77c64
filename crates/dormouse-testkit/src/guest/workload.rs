//! The pinned five pauses: what a guest does before each of them, and their files.
//!
//! Benches and tests that need real memory and disks take the files and boot nothing.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use super::assets::{Assets, make_once};
use super::copy::copy_sparse;
use super::qemu::{Config, Guest};

/// Names the workload below; whoever changes what it does counts this up.
const VERSION: &str = "workload-1";

/// How long the guest is left alone before the last pause.
const IDLE: Duration = Duration::from_secs(10);
/// The kernel reports free pages two seconds after they became free.
const REPORTING_DELAY: Duration = Duration::from_secs(5);

/// One of the five pauses in a guest's life, in order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Pause {
    /// Freshly booted.
    Boot,
    /// After tar, gzip, sha256, awk and python have read most of the disk.
    Work,
    /// After unpacking, deleting a third, editing, sorting and compressing.
    Rework,
    /// After removing it all, fstrim and dropping the caches.
    Trim,
    /// After ten idle seconds.
    Idle,
}

impl Pause {
    /// All of them, in order.
    pub const ALL: [Pause; 5] = [Pause::Boot, Pause::Work, Pause::Rework, Pause::Trim, Pause::Idle];

    /// Its place in the guest's life, from 1.
    #[must_use]
    pub fn number(self) -> usize {
        match self {
            Pause::Boot => 1,
            Pause::Work => 2,
            Pause::Rework => 3,
            Pause::Trim => 4,
            Pause::Idle => 5,
        }
    }

    /// A few words for tables and progress lines.
    #[must_use]
    pub fn title(self) -> &'static str {
        match self {
            Pause::Boot => "booted",
            Pause::Work => "tar, gzip, sha256, awk, python",
            Pause::Rework => "unpack, delete, edit, sort, compress",
            Pause::Trim => "remove, fstrim, drop caches",
            Pause::Idle => "ten seconds idle",
        }
    }

    /// What the guest does before this pause: a few words for progress lines, and the command.
    fn steps(self) -> &'static [(&'static str, &'static str)] {
        match self {
            Pause::Boot | Pause::Idle => &[],
            Pause::Work => &[
                (
                    "tar and gzip of /usr",
                    "mkdir /job && tar -C / --sort=name -cf - usr | gzip -1 > /job/usr.tar.gz",
                ),
                (
                    "sha256 of the programs",
                    "cd /job && sha256sum usr.tar.gz $(find /usr/bin -type f | sort) > sums",
                ),
                (
                    "counting words with awk",
                    "cd /job && find /usr/lib/python3* /usr/share/perl* -name '*.p[ylm]' | sort \
                     | xargs cat | awk '{ for (i = 1; i <= NF; i++) n[$i]++ } \
                     END { for (w in n) print n[w], w }' > words",
                ),
                (
                    "writing JSON with python",
                    "cd /job && python3 -c 'import json; \
                     json.dump({i: str(i) * 8 for i in range(100000)}, \
                     open(\"numbers.json\", \"w\"))'",
                ),
                ("sync", "sync"),
            ],
            Pause::Rework => &[
                (
                    "unpacking /usr/lib",
                    "mkdir /job/tree && tar -C /job/tree -xzf /job/usr.tar.gz usr/lib",
                ),
                (
                    "deleting every third file",
                    "cd /job/tree && find . -type f | sort | awk 'NR % 3 == 0' | xargs -d '\\n' rm",
                ),
                (
                    "editing the python sources",
                    "cd /job/tree && find . -type f -name '*.py' | sort \
                     | xargs sed -i 's/self/this/g'",
                ),
                ("sorting", "cd /job && sort words numbers.json > sorted && rm numbers.json"),
                (
                    "compressing",
                    "cd /job && tar -C tree --sort=name -cf - $(cd tree && echo usr/lib/python3*) \
                     | gzip -1 > python.tar.gz",
                ),
                ("sync", "sync"),
            ],
            Pause::Trim => &[
                ("removing it all", "rm -rf /job && sync"),
                ("fstrim", "fstrim /"),
                ("dropping the caches", "echo 3 > /proc/sys/vm/drop_caches"),
            ],
        }
    }

    /// How long the guest is left alone after the commands.
    fn rest(self) -> Duration {
        match self {
            Pause::Boot | Pause::Work | Pause::Rework => Duration::ZERO,
            Pause::Trim => REPORTING_DELAY,
            Pause::Idle => IDLE,
        }
    }
}

/// Brings a guest that is at the pause before `pause` to where `pause` is taken.
///
/// `progress` gets a line for every step; together they take up to half a minute.
pub fn drive(guest: &mut Guest, pause: Pause, progress: &mut dyn FnMut(&str)) -> Result<()> {
    for (title, command) in pause.steps() {
        progress(&format!("guest: {title}"));
        guest.check(command)?;
    }
    if !pause.rest().is_zero() {
        progress(&format!("guest: idle for {} s", pause.rest().as_secs()));
        std::thread::sleep(pause.rest());
    }
    // A counter line of this stage, so that a restored guest can be compared with it.
    guest.wait_counter()?;
    Ok(())
}

/// The three files of one pause.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PauseFiles {
    /// Guest-physical memory, flat.
    pub memory: PathBuf,
    /// The root disk, raw.
    pub disk: PathBuf,
    /// QEMU's device state.
    pub state: PathBuf,
}

/// The files of the five pauses, made once.
#[derive(Debug, Clone)]
pub struct Pauses {
    dir: PathBuf,
}

impl Pauses {
    /// Returns the five pauses under `cache_dir/pauses`, made now if they are not there; about two minutes.
    pub fn prepare(cache_dir: &Path, progress: &mut dyn FnMut(&str)) -> Result<Pauses> {
        let assets = Assets::prepare(cache_dir, progress)?;
        let dir = cache_dir.join("pauses");
        let version = format!("{} {}", assets.version(), VERSION);
        let current = || fs::read_to_string(dir.join("version")).is_ok_and(|text| text == version);
        make_once(cache_dir, &dir, &current, |partial| {
            record(&assets, partial, progress)?;
            Ok(fs::write(partial.join("version"), &version)?)
        })
        .context("cannot record the five pauses")?;
        Ok(Pauses { dir })
    }

    /// The files of one pause; read-only by convention, copy what a guest is to write to.
    #[must_use]
    pub fn files(&self, pause: Pause) -> PauseFiles {
        files_in(&self.dir, pause)
    }
}

fn files_in(dir: &Path, pause: Pause) -> PauseFiles {
    let dir = dir.join(pause.number().to_string());
    PauseFiles { memory: dir.join("memory"), disk: dir.join("disk"), state: dir.join("state") }
}

fn record(assets: &Assets, dir: &Path, progress: &mut dyn FnMut(&str)) -> Result<()> {
    let live = dir.join("live");
    fs::create_dir(&live)?;
    let config = Config::in_dir(&live);
    progress("pauses: booting the guest");
    let mut guest = Guest::boot(assets, &config)?;
    for pause in Pause::ALL {
        let begun = Instant::now();
        drive(&mut guest, pause, progress)?;
        let files = files_in(dir, pause);
        fs::create_dir(dir.join(pause.number().to_string()))?;
        guest.pause(&files.state)?;
        copy_sparse(&live.join("memory"), &files.memory)?;
        copy_sparse(&live.join("disk"), &files.disk)?;
        guest.resume()?;
        let seconds = begun.elapsed().as_secs_f64();
        progress(&format!("pauses: {} of 5, {} ({seconds:.1} s)", pause.number(), pause.title()));
    }
    guest.kill()?;
    fs::remove_dir_all(&live)?;
    Ok(())
}
