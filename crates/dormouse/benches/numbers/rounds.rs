//! Taking turns, and medians.

use std::time::Instant;

use anyhow::Result;

/// Rounds of what takes well under a second.
pub(crate) const ROUNDS: usize = 7;

/// Rounds of what takes longer.
pub(crate) const FEW_ROUNDS: usize = 5;

/// Runs the contenders one after the other in each round and returns the median of what each
/// returned.
pub(crate) fn medians<const N: usize>(
    rounds: usize,
    mut contenders: [&mut dyn FnMut() -> Result<f64>; N],
) -> Result<[f64; N]> {
    let mut figures = [const { Vec::new() }; N];
    for _ in 0..rounds {
        for (contender, figures) in contenders.iter_mut().zip(&mut figures) {
            figures.push(contender()?);
        }
    }
    Ok(figures.map(median))
}

/// What two contenders did in rounds of both.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Pair {
    /// Medians.
    pub(crate) ours: f64,
    pub(crate) other: f64,

    /// The median of ours ÷ the other's of each round, which bears a machine whose speed changes.
    pub(crate) ratio: f64,
}

/// Runs both in each round, the other one first in every second.
pub(crate) fn pairs(
    rounds: usize,
    mut ours: impl FnMut() -> Result<f64>,
    mut other: impl FnMut() -> Result<f64>,
) -> Result<Pair> {
    let (mut all_ours, mut all_others, mut ratios) = (Vec::new(), Vec::new(), Vec::new());
    for round in 0..rounds {
        let (mine, theirs) = if round % 2 == 0 {
            let mine = ours()?;
            (mine, other()?)
        } else {
            let theirs = other()?;
            (ours()?, theirs)
        };
        all_ours.push(mine);
        all_others.push(theirs);
        ratios.push(mine / theirs);
    }
    Ok(Pair { ours: median(all_ours), other: median(all_others), ratio: median(ratios) })
}

/// The middle one of some figures.
pub(crate) fn median(mut figures: Vec<f64>) -> f64 {
    figures.sort_by(f64::total_cmp);
    figures.get(figures.len() / 2).copied().unwrap_or(f64::NAN)
}

/// How many seconds `work` took.
pub(crate) fn seconds<T>(work: impl FnOnce() -> Result<T>) -> Result<f64> {
    let begin = Instant::now();
    work()?;
    Ok(begin.elapsed().as_secs_f64())
}

/// How many seconds of processor time this process, with threads that have ended, has used.
pub(crate) fn processor_seconds() -> f64 {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    time.tv_sec as f64 + time.tv_nsec as f64 / 1e9
}

/// Processor time of the machine, for telling how much of it others had.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Shares {
    all: f64,
    busy: f64,
    ours: f64,
}

impl Shares {
    /// As it stands now, in ticks; programs that were started and have ended are ours.
    pub(crate) fn now() -> Result<Shares> {
        let numbers = |text: &str| -> Vec<f64> {
            text.split_whitespace().map_while(|word| word.parse().ok()).collect()
        };
        let stat = std::fs::read_to_string("/proc/stat")?;
        let all = numbers(stat.lines().next().unwrap_or_default().trim_start_matches("cpu"));
        // User, nice, system, idle, waiting for the disk, interrupts, stolen.
        let sum = |range: std::ops::Range<usize>| {
            all.iter().take(8).skip(range.start).take(range.len()).sum::<f64>()
        };
        let own = std::fs::read_to_string("/proc/self/stat")?;
        // The state, and ten numbers on, user and system time of this process and its children.
        let own = own.rsplit_once(") ").map_or("", |(_, rest)| rest);
        let ours = numbers(&own[1..]).iter().skip(10).take(4).sum();
        Ok(Shares { all: sum(0..8), busy: sum(0..3) + sum(5..8), ours })
    }

    /// The part of the machine that others used since `before`, from 0 to 1.
    pub(crate) fn of_others_since(&self, before: &Shares) -> f64 {
        let others = (self.busy - before.busy) - (self.ours - before.ours);
        (others / (self.all - before.all)).clamp(0.0, 1.0)
    }
}

/// Random numbers, the same in every run.
#[derive(Clone, Debug)]
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Random {
        Random(seed)
    }

    /// SplitMix64.
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub(crate) fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }

    /// A block that zstd halves: random bytes, each line of them twice.
    pub(crate) fn block(&mut self) -> [u8; 4096] {
        let mut block = [0; 4096];
        for line in block.chunks_exact_mut(64) {
            let (head, tail) = line.split_at_mut(32);
            for word in head.chunks_exact_mut(8) {
                word.copy_from_slice(&self.next().to_le_bytes());
            }
            tail.copy_from_slice(head);
        }
        block
    }
}
