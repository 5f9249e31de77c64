//! Lock-free bits against a roaring bitmap behind a lock, as a write and a read use them.
//!
//! `cargo run --release -p dormouse-live --example states`
#![allow(clippy::print_stdout, reason = "an example prints what it measures")]

use std::sync::RwLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use dormouse_live::states::{BlockState, States};
use roaring::RoaringBitmap;

/// 32 GiB of disk.
const BLOCKS: u64 = 8 << 20;
const OPERATIONS: u64 = 2_000_000;

/// The two sets of the simplest tracker.
#[derive(Default)]
struct Bitmaps {
    dirty: RoaringBitmap,
    zero: RoaringBitmap,
}

fn main() {
    println!("nanoseconds for each operation of a thread, blocks at random in 32 GiB");
    println!("{:>8} {:>22} {:>22}", "threads", "mark: bits / roaring", "look: bits / roaring");
    for threads in [1, 2, 4] {
        let states = States::new(BLOCKS);
        // Two threads may set the same stripe here; that is the overlay's business, not the bits'.
        let mark = measure(threads, |block| states.set(block..block + 1, BlockState::Dirty));
        let look = measure(threads, |block| {
            std::hint::black_box(states.run(block, block + 8));
        });
        let bitmaps = RwLock::new(Bitmaps::default());
        let roaring_mark = measure(threads, |block| {
            let mut bitmaps = bitmaps.write().expect("nobody panics");
            let block = u32::try_from(block).expect("blocks fit");
            bitmaps.dirty.insert(block);
            bitmaps.zero.remove(block);
        });
        let roaring_look = measure(threads, |block| {
            let bitmaps = bitmaps.read().expect("nobody panics");
            for block in block..block + 8 {
                let block = u32::try_from(block).expect("blocks fit");
                std::hint::black_box(bitmaps.dirty.contains(block) || bitmaps.zero.contains(block));
            }
        });
        println!("{threads:>8} {mark:>13} / {roaring_mark:>6} {look:>13} / {roaring_look:>6}");
        if threads == 1 {
            let bitmaps = bitmaps.into_inner().expect("nobody panics");
            println!(
                "{:>8} {} KiB of bits, {} KiB of bitmaps, {:?} dirty",
                "",
                states.memory_bytes() >> 10,
                (bitmaps.dirty.serialized_size() + bitmaps.zero.serialized_size()) >> 10,
                states.counts().dirty
            );
            let begin = Instant::now();
            let mut runs = 0;
            let mut at = 0;
            while at < BLOCKS {
                let (state, end) = states.run(at, BLOCKS);
                runs += u64::from(state == BlockState::Dirty);
                at = end;
            }
            println!("{:>8} all {runs} runs of the bits in {:.2?}", "", begin.elapsed());
            let begin = Instant::now();
            let mut runs = 0;
            let mut blocks = bitmaps.dirty.iter();
            while blocks.next_range().is_some() {
                runs += 1;
            }
            println!("{:>8} all {runs} runs of the bitmap in {:.2?}", "", begin.elapsed());
        }
    }
}

/// The nanoseconds that `run` takes in each of `threads` threads.
fn measure(threads: u64, run: impl Fn(u64) + Sync) -> u128 {
    let total = AtomicU64::new(0);
    std::thread::scope(|scope| {
        for thread in 0..threads {
            let (run, total) = (&run, &total);
            scope.spawn(move || {
                let mut seed = thread;
                let begin = Instant::now();
                for _ in 0..OPERATIONS {
                    seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695);
                    run((seed >> 33) % (BLOCKS - 8));
                }
                let nanos = u64::try_from(begin.elapsed().as_nanos()).unwrap_or(u64::MAX);
                total.fetch_add(nanos, Ordering::Relaxed);
            });
        }
    });
    let total = Duration::from_nanos(total.into_inner());
    total.as_nanos() / u128::from(threads * OPERATIONS)
}
