//! What is run: the factors, the cells that were chosen of their product, and what a guest does.

use std::time::Duration;

use serde::{Deserialize, Serialize};

/// How the guest mounts its root.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Mount {
    Default,
    Noatime,
    NoatimeLazytime,
    DiscardNoatimeLazytime,
}

impl Mount {
    pub(super) const ALL: [Mount; 4] =
        [Mount::Default, Mount::Noatime, Mount::NoatimeLazytime, Mount::DiscardNoatimeLazytime];

    /// As for `mount -o`.
    pub(super) fn options(self) -> &'static str {
        match self {
            Mount::Default => "defaults",
            Mount::Noatime => "noatime",
            Mount::NoatimeLazytime => "noatime,lazytime",
            Mount::DiscardNoatimeLazytime => "discard,noatime,lazytime",
        }
    }

    /// For tables: what `defaults` means is said there, too.
    pub(super) fn title(self) -> &'static str {
        match self {
            Mount::Default => "default (relatime)",
            other => other.options(),
        }
    }
}

/// Who writes the inode tables and the journal before their first use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Mkfs {
    /// mke2fs.
    Eager,
    /// Nobody, and later the guest's ext4lazyinit thread.
    Lazy,
}

impl Mkfs {
    pub(super) fn options(self) -> &'static str {
        match self {
            Mkfs::Eager => "lazy_itable_init=0,lazy_journal_init=0",
            Mkfs::Lazy => "lazy_itable_init=1,lazy_journal_init=1",
        }
    }

    pub(super) fn title(self) -> &'static str {
        match self {
            Mkfs::Eager => "eager",
            Mkfs::Lazy => "lazy",
        }
    }
}

/// How the host mounts the image while it is filled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Build {
    Default,
    Tuned,
}

impl Build {
    /// `noinit_itable` in both: what mke2fs left is to be left to the guest, however long the build takes.
    pub(super) fn options(self) -> &'static str {
        match self {
            Build::Default => "noinit_itable",
            Build::Tuned => "noinit_itable,noatime,lazytime,discard",
        }
    }

    pub(super) fn title(self) -> &'static str {
        match self {
            Build::Default => "default",
            Build::Tuned => "noatime,lazytime,discard",
        }
    }
}

/// An image that guests start from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Recipe {
    pub(super) mkfs: Mkfs,
    pub(super) build: Build,
}

impl Recipe {
    pub(super) const PLAIN: Recipe = Recipe { mkfs: Mkfs::Eager, build: Build::Default };
    pub(super) const LAZY: Recipe = Recipe { mkfs: Mkfs::Lazy, build: Build::Default };
    pub(super) const TUNED: Recipe = Recipe { mkfs: Mkfs::Eager, build: Build::Tuned };
    pub(super) const ALL: [Recipe; 3] = [Recipe::PLAIN, Recipe::LAZY, Recipe::TUNED];

    /// For file names and progress lines.
    pub(super) fn name(self) -> &'static str {
        match (self.mkfs, self.build) {
            (Mkfs::Eager, Build::Default) => "eager",
            (Mkfs::Lazy, Build::Default) => "lazy",
            (Mkfs::Eager, Build::Tuned) => "eager-tuned",
            (Mkfs::Lazy, Build::Tuned) => "lazy-tuned",
        }
    }
}

/// One guest's life.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Cell {
    pub(super) mount: Mount,
    pub(super) recipe: Recipe,
}

/// The cells in the order of their runs; a cell that is there more than once shows the noise.
///
/// Mount options and mkfs are crossed, for the thread that mkfs leaves work to is the guest's. How the
/// image was built is over before the guest boots, so it is looked at with the first and the last
/// mount options only. Repetitions come last: what drifts with time is part of their noise.
pub(super) fn cells(quick: bool) -> Vec<Cell> {
    let first_and_last = [Mount::Default, Mount::DiscardNoatimeLazytime];
    let with = |recipe| move |mount| Cell { mount, recipe };
    if quick {
        return first_and_last.map(with(Recipe::PLAIN)).to_vec();
    }
    let mut cells = Mount::ALL.map(with(Recipe::PLAIN)).to_vec();
    cells.extend(Mount::ALL.map(with(Recipe::LAZY)));
    cells.extend(first_and_last.map(with(Recipe::TUNED)));
    cells.extend(first_and_last.map(with(Recipe::PLAIN)));
    cells
}

/// What a guest does before a pause, in order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Phase {
    Boot,
    Unpack,
    Delete,
    Idle,
    Walk,
    Heartbeat,
}

/// Waiting times of a run.
#[derive(Debug, Clone, Copy)]
pub(super) struct Pace {
    pub(super) idle: Duration,
    pub(super) heartbeats: u32,
}

impl Pace {
    /// More than the 5 s of a journal commit and the 30 s after which dirty pages are written.
    pub(super) const FULL: Pace = Pace { idle: Duration::from_secs(37), heartbeats: 37 };
    pub(super) const QUICK: Pace = Pace { idle: Duration::from_secs(8), heartbeats: 8 };
}

/// ext4 sends the discards of a journal commit a little after it.
const DISCARD_DELAY: Duration = Duration::from_secs(3);

impl Phase {
    pub(super) const ALL: [Phase; 6] =
        [Phase::Boot, Phase::Unpack, Phase::Delete, Phase::Idle, Phase::Walk, Phase::Heartbeat];

    pub(super) fn title(self) -> &'static str {
        match self {
            Phase::Boot => "boot",
            Phase::Unpack => "unpack 5,000 files",
            Phase::Delete => "delete half",
            Phase::Idle => "idle",
            Phase::Walk => "walk, read only",
            Phase::Heartbeat => "one block, each second",
        }
    }

    /// What the guest runs. A `sync` ends what a tool or an agent would end with one; nobody asks an
    /// idle guest before it is paused.
    pub(super) fn command(self, pace: Pace) -> Option<String> {
        Some(match self {
            Phase::Boot => "sync".to_owned(),
            Phase::Unpack => {
                "mkdir /srv/tree && tar -C /srv/tree -xzf /srv/packages.tar.gz && sync".to_owned()
            }
            Phase::Delete => "cd /srv/tree && find . -type f | sort | awk 'NR % 2 == 0' \
                              | xargs -d '\\n' rm && sync"
                .to_owned(),
            Phase::Idle => return None,
            Phase::Walk => {
                "find / -xdev -type f -print0 | xargs -0 cat > /dev/null && sync".to_owned()
            }
            Phase::Heartbeat => format!(
                "for n in $(seq {}); do printf '%08d' $n 1<>/srv/heartbeat; sleep 1; done",
                pace.heartbeats
            ),
        })
    }

    /// How long the guest is left alone afterwards.
    pub(super) fn rest(self, pace: Pace) -> Duration {
        match self {
            Phase::Delete => DISCARD_DELAY,
            Phase::Idle => pace.idle,
            Phase::Boot | Phase::Unpack | Phase::Walk | Phase::Heartbeat => Duration::ZERO,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_recipe_meets_the_first_and_the_last_mount_options() {
        let cells = cells(false);
        for recipe in Recipe::ALL {
            for mount in [Mount::Default, Mount::DiscardNoatimeLazytime] {
                assert!(cells.contains(&Cell { mount, recipe }), "{mount:?} {recipe:?}");
            }
        }
        let first = cells[0];
        assert_eq!(cells.iter().filter(|cell| **cell == first).count(), 2);
    }
}
