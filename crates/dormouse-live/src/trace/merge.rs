//! One order out of several wakes.

use std::cmp::Reverse;
use std::collections::HashMap;
use std::ops::Range;

use super::{Wake, WakeKind, push_joined};

/// A touch: the block, and when it came in its wake.
struct Touch {
    block: u32,
    place: u32,
    is_miss: bool,
}

/// The order that `wakes` agree on; see [`Trace::order`](super::Trace::order).
pub(super) fn order(wakes: &[Wake]) -> Vec<Range<u64>> {
    let whole = wakes.iter().filter(|wake| wake.kind == WakeKind::Whole).count();
    let mut touches = Vec::new();
    for wake in wakes {
        let is_miss = wake.kind == WakeKind::Misses;
        let blocks = wake.runs.iter().cloned().flatten();
        touches.extend((0..).zip(blocks).filter_map(|(place, block)| {
            let block = u32::try_from(block).ok()?;
            Some(Touch { block, place, is_miss })
        }));
    }
    touches.sort_unstable_by_key(|touch| (touch.block, touch.place));
    let mut ranked: Vec<_> = touches
        .chunk_by(|one, two| one.block == two.block)
        .map(|of_block| {
            // More than wakes only where a file says so.
            let votes = of_block.len();
            let misses = of_block.iter().filter(|touch| touch.is_miss).count();
            let agree = votes * 2 > whole + misses;
            let median = of_block[(votes - 1) / 2].place;
            // Without agreement the number of votes counts first.
            let votes = if agree { 0 } else { u8::try_from(votes).unwrap_or(u8::MAX) };
            (!agree, Reverse(votes), median, of_block[0].block)
        })
        .collect();
    drop(touches);
    ranked.sort_unstable();
    let mut runs = Vec::new();
    for (.., block) in ranked {
        let block = u64::from(block);
        push_joined(&mut runs, block..block + 1);
    }
    runs
}

/// The blocks of `order`, those of one window together; see [`Trace::runs`](super::Trace::runs).
pub(super) fn in_windows(order: &[Range<u64>], window_blocks: u64) -> Vec<Range<u64>> {
    assert!(window_blocks > 0, "a window of no blocks");
    let mut numbers: HashMap<u64, usize> = HashMap::new();
    let mut windows: Vec<Vec<Range<u64>>> = Vec::new();
    for run in order {
        let mut at = run.start;
        while at < run.end {
            let window = at / window_blocks;
            let end = run.end.min((window + 1).saturating_mul(window_blocks));
            let number = *numbers.entry(window).or_insert_with(|| {
                windows.push(Vec::new());
                windows.len() - 1
            });
            windows[number].push(at..end);
            at = end;
        }
    }
    let mut runs = Vec::new();
    for mut pieces in windows {
        pieces.sort_unstable_by_key(|piece| piece.start);
        // Joined inside a window only: an install is not to be longer.
        let mut joined = Vec::new();
        pieces.into_iter().for_each(|piece| push_joined(&mut joined, piece));
        runs.append(&mut joined);
    }
    runs
}

#[cfg(test)]
#[expect(clippy::single_range_in_vec_init, reason = "lists of runs, here of one")]
mod tests {
    use super::*;

    fn wake(blocks: &[u64]) -> Wake {
        Wake::new(WakeKind::Whole, blocks.iter().map(|&block| block..block + 1))
    }

    fn blocks(runs: &[Range<u64>]) -> Vec<u64> {
        runs.iter().cloned().flatten().collect()
    }

    #[test]
    fn one_wake_is_its_own_order() {
        assert_eq!(blocks(&order(&[wake(&[9, 2, 3, 40])])), [9, 2, 3, 40]);
        assert!(order(&[]).is_empty());
    }

    #[test]
    fn what_most_wakes_touched_comes_first_by_its_median_place() {
        let wakes = [wake(&[10, 20, 30, 99]), wake(&[20, 10, 30]), wake(&[20, 30, 10, 77])];
        // 20 has the places 1, 0, 0; 10 has 0, 1, 2; 30 has 2, 2, 1.
        assert_eq!(blocks(&order(&wakes)), [20, 10, 30, 77, 99]);
    }

    #[test]
    fn one_strange_wake_moves_little() {
        let usual: Vec<u64> = (0..100).map(|n| n * 7 % 100).collect();
        let strange: Vec<u64> = (1000..3000).chain((0..100).rev()).collect();
        let wakes = [wake(&strange), wake(&usual), wake(&usual), wake(&usual)];
        assert_eq!(blocks(&order(&wakes))[..100], usual);
    }

    /// Half is no majority: of two wakes, what both touched comes first.
    #[test]
    fn without_a_majority_votes_count_first() {
        let wakes = [wake(&[1, 2]), wake(&[2, 3]), wake(&[4, 5]), wake(&[5, 6])];
        assert_eq!(blocks(&order(&wakes)), [2, 5, 1, 4, 3, 6]);
    }

    #[test]
    fn a_miss_counts_and_its_silence_does_not() {
        let misses = Wake::new(WakeKind::Misses, [50..51]);
        let order = order(&[misses, wake(&[1, 2]), wake(&[1, 2, 7])]);
        // 50 was missed once; of the others two whole wakes decide: 7 has one vote of two.
        assert_eq!(blocks(&order), [1, 2, 50, 7]);
        let misses = |_| Wake::new(WakeKind::Misses, [50..51]);
        let wakes: Vec<Wake> = (0..3).map(misses).chain([wake(&[1, 2])]).collect();
        assert_eq!(blocks(&super::order(&wakes)), [1, 50, 2]);
    }

    #[test]
    fn windows_keep_order_and_bounds() {
        let order = [100..103, 5..6, 98..100, 6..40, 4..5];
        assert_eq!(in_windows(&order, 16), [98..103, 4..16, 16..32, 32..40]);
        assert_eq!(in_windows(&order, 1).len(), 41);
        assert_eq!(in_windows(&order, u64::MAX), [4..40, 98..103]);
        let mut all = blocks(&in_windows(&order, 16));
        all.sort_unstable();
        let mut expected = blocks(&order);
        expected.sort_unstable();
        assert_eq!(all, expected);
    }
}
