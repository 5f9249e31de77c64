//! Memory of this very process, served by a pager of this process: every byte a guest reads is
//! compared with what an oracle says.

use std::collections::BTreeSet;
use std::ops::Range;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicU8, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::thread;
use std::time::Duration;

use dormouse_live::pages::{PAGE_BYTES, PageEvent, PageState, Tracking};
use dormouse_serve::uffd::handshake::{Handshake, Region, SocketEnd};
use dormouse_serve::uffd::{
    Content, Effort, End, MemorySource, Pager, PagerConfig, Piece, SourceError, Vm, VmConfig,
};
use dormouse_sys::mapping::{Mapping, PageSize};
use dormouse_sys::peer::Peer;
use dormouse_sys::userfaultfd::{Features, Register, Userfaultfd};

const PAGE: usize = 4096;

/// An image of which each page is a function of its number: some zero, the others one byte.
#[derive(Debug, Default)]
struct Patterns {
    pages: u64,
    reads: AtomicUsize,
    touched: Mutex<Vec<Range<u64>>>,
    /// Who looked for what is at hand.
    lookers: Mutex<BTreeSet<String>>,
}

fn pattern(page: u64) -> u8 {
    if page % 5 == 3 { 0 } else { (page % 251) as u8 + 1 }
}

impl Patterns {
    fn new(pages: u64) -> Arc<Patterns> {
        Arc::new(Patterns { pages, ..Patterns::default() })
    }
}

impl MemorySource for Patterns {
    fn size_bytes(&self) -> u64 {
        self.pages * PAGE_BYTES
    }

    fn pieces(
        &self,
        range: Range<u64>,
        effort: Effort,
        pieces: &mut Vec<Piece>,
    ) -> Result<(), SourceError> {
        self.reads.fetch_add(1, Ordering::Relaxed);
        if effort == Effort::AtHand {
            let name = thread::current().name().unwrap_or_default().to_owned();
            self.lookers.lock().unwrap().insert(name);
        }
        for page in range.start / PAGE_BYTES..range.end / PAGE_BYTES {
            let at = page * PAGE_BYTES;
            // Every seventh page comes at a cost.
            let is_wanted = match effort {
                Effort::All => true,
                Effort::Block(wanted) => wanted == at || page % 7 != 0,
                Effort::AtHand => page % 7 != 0,
            };
            if is_wanted {
                let content = match pattern(page) {
                    0 => Content::Zeros(PAGE_BYTES),
                    byte => Content::Bytes { keeper: Arc::new(vec![byte; PAGE]), range: 0..PAGE },
                };
                pieces.push(Piece { at, content });
            }
        }
        Ok(())
    }

    fn touched(&self, range: Range<u64>) {
        self.touched.lock().unwrap().push(range);
    }
}

/// A guest in this process.
struct Guest {
    memory: Mapping,
    vm: Arc<Vm>,
    ended: Mutex<mpsc::Receiver<End>>,
}

fn config() -> PagerConfig {
    PagerConfig { threads: 3, prefetch_threads: 1 }
}

fn wake(pager: &Pager, source: Arc<dyn MemorySource>, config: VmConfig) -> Guest {
    let len = usize::try_from(source.size_bytes()).unwrap();
    let memory = Mapping::anonymous(len, PageSize::Small).unwrap();
    let uffd = Userfaultfd::open(Features::EVENT_REMOVE).unwrap();
    uffd.register(&memory.addresses(), Register::Missing).unwrap();
    let region =
        Region { address: memory.addresses().start, size: len as u64, offset: 0, page_bytes: 4096 };
    let handshake = Handshake {
        regions: vec![region],
        uffd,
        features: Features::EVENT_REMOVE,
        others: Vec::new(),
        peer: Peer::by_pid(std::process::id()).unwrap(),
        socket_end: SocketEnd::VmGone,
    };
    let (ours, theirs) = UnixStream::pair().unwrap();
    let (tell, ended) = mpsc::channel();
    let vm = pager
        .serve(handshake, ours, source, config, move |_, end| {
            drop(theirs);
            tell.send(end).unwrap();
        })
        .unwrap();
    Guest { memory, vm, ended: Mutex::new(ended) }
}

impl Guest {
    fn byte(&self, page: usize, at: usize) -> &AtomicU8 {
        &self.memory.bytes()[page * PAGE + at]
    }
}

/// A generator of numbers that need not be good.
struct Random(u64);

impl Random {
    fn below(&mut self, end: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 8) as usize % end
    }
}

/// Threads of a guest that read, write and give back pages of their own, each page next to one of
/// another thread.
fn work(guest: &Guest, pages: usize, threads: usize, rounds: usize) -> Vec<Option<u8>> {
    let known: Vec<Vec<(usize, Option<u8>)>> = thread::scope(|scope| {
        let all: Vec<_> = (0..threads)
            .map(|thread| {
                scope.spawn(move || {
                    let mine: Vec<usize> = (thread..pages).step_by(threads).collect();
                    let mut written: Vec<Option<u8>> = vec![None; mine.len()];
                    let mut random = Random(0x9e37_79b9 + thread as u64);
                    for round in 0..rounds {
                        let number = random.below(mine.len());
                        let page = mine[number];
                        let expected = written[number].unwrap_or(pattern(page as u64));
                        match random.below(10) {
                            0 => {
                                guest.memory.give_back(page * PAGE..(page + 1) * PAGE).unwrap();
                                written[number] = Some(0);
                            }
                            1..=3 => {
                                let byte = (round % 255) as u8 + 1;
                                for at in [0, 1, 2048, 4095] {
                                    guest.byte(page, at).store(byte, Ordering::Relaxed);
                                }
                                for at in [0, 1, 2048, 4095] {
                                    let got = guest.byte(page, at).load(Ordering::Relaxed);
                                    assert_eq!(got, byte, "page {page}, just written");
                                }
                                // The rest of the page is not worth keeping apart.
                                for at in 0..PAGE {
                                    guest.byte(page, at).store(byte, Ordering::Relaxed);
                                }
                                written[number] = Some(byte);
                            }
                            _ => {
                                let at = random.below(PAGE);
                                let got = guest.byte(page, at).load(Ordering::Relaxed);
                                assert_eq!(got, expected, "page {page} at {at}, round {round}");
                            }
                        }
                    }
                    mine.into_iter().zip(written).collect()
                })
            })
            .collect();
        all.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    let mut written = vec![None; pages];
    for (page, byte) in known.into_iter().flatten() {
        written[page] = byte;
    }
    written
}

#[test]
fn a_guest_reads_what_it_wrote_and_the_image_elsewhere() {
    for tracking in [Tracking::Exact, Tracking::Off] {
        let pager = Pager::start(config()).unwrap();
        let source = Patterns::new(700);
        let guest = wake(&pager, source, VmConfig { tracking, ..VmConfig::STANDARD });
        let written = work(&guest, 700, 3, 4_000);
        for (page, byte) in written.iter().enumerate() {
            let expected = byte.unwrap_or(pattern(page as u64));
            assert_eq!(guest.byte(page, 77).load(Ordering::Relaxed), expected, "page {page}");
        }
        assert!(guest.vm.stats().removed_bytes > 0 && guest.vm.stats().faults > 0);
        pager.release(&guest.vm);
        assert!(matches!(guest.ended.lock().unwrap().recv().unwrap(), End::Released));
    }
}

#[test]
fn changed_pages_are_known_exactly() {
    let pager = Pager::start(config()).unwrap();
    let guest = wake(&pager, Patterns::new(400), VmConfig::STANDARD);
    for page in 0..200 {
        assert_eq!(guest.byte(page, 9).load(Ordering::Relaxed), pattern(page as u64));
    }
    for page in (0..400).step_by(10) {
        guest.byte(page, 9).store(1, Ordering::Relaxed);
    }
    guest.memory.give_back(50 * PAGE..53 * PAGE).unwrap();
    let capture = guest.vm.seal().unwrap();
    assert!(capture.is_live());
    let dirty: Vec<u32> = capture.changes().dirty.iter().collect();
    let expected: Vec<u32> = (0..400).step_by(10).filter(|page| *page != 50).collect();
    assert_eq!(dirty, expected);
    assert_eq!(capture.changes().zero.iter().collect::<Vec<_>>(), [50, 51, 52]);
    assert!(guest.vm.seal().is_err(), "one capture at a time");
    capture.finish();

    // After a capture only what changed since is dirty; what was given back stays zero.
    guest.byte(10, 9).store(2, Ordering::Relaxed);
    guest.byte(51, 9).store(2, Ordering::Relaxed);
    let capture = guest.vm.seal().unwrap();
    assert_eq!(capture.changes().dirty.iter().collect::<Vec<_>>(), [10, 51]);
    drop(capture);
    // And what a capture that came to nothing would have taken is dirty again.
    let capture = guest.vm.seal().unwrap();
    assert_eq!(capture.changes().dirty.iter().collect::<Vec<_>>(), [10, 51]);
    pager.release(&guest.vm);
}

#[test]
fn a_capture_shows_the_moment_of_its_seal_while_the_guest_writes_on() {
    let pager = Pager::start(config()).unwrap();
    let guest = wake(&pager, Patterns::new(300), VmConfig::STANDARD);
    for page in 0..300 {
        for at in 0..PAGE {
            guest.byte(page, at).store(100, Ordering::Relaxed);
        }
    }
    let capture = guest.vm.seal().unwrap();
    assert_eq!(capture.changes().dirty.len(), 300);
    thread::scope(|scope| {
        scope.spawn(|| {
            for page in (0..300).rev() {
                for at in 0..PAGE {
                    guest.byte(page, at).store(200, Ordering::Relaxed);
                }
            }
        });
        for first in (0..300).step_by(30) {
            let mut buffer = vec![0; 30 * PAGE];
            capture.read(first, &mut buffer).unwrap();
            assert!(buffer.iter().all(|&byte| byte == 100), "pages {first} and on");
        }
    });
    capture.finish();
    assert_eq!(guest.vm.seal().unwrap().changes().dirty.len(), 300);
    pager.release(&guest.vm);
}

#[test]
fn a_capture_fails_when_pages_it_has_not_read_are_given_back() {
    let pager = Pager::start(config()).unwrap();
    let guest = wake(&pager, Patterns::new(50), VmConfig::STANDARD);
    guest.byte(7, 0).store(5, Ordering::Relaxed);
    let capture = guest.vm.seal().unwrap();
    guest.memory.give_back(7 * PAGE..8 * PAGE).unwrap();
    let mut buffer = vec![0; PAGE];
    assert!(capture.read(7, &mut buffer).is_err());
    drop(capture);
    let capture = guest.vm.seal().unwrap();
    assert!(capture.changes().dirty.is_empty());
    assert_eq!(capture.changes().zero.iter().collect::<Vec<_>>(), [7]);
    drop(capture);
    pager.release(&guest.vm);
}

/// Windows grow with a guest that goes in order, and it faults once in each. Of what it came through in
/// between a trace had the last 64 KiB, and the next wake waited for the rest.
#[test]
fn what_a_guest_came_through_in_order_is_all_told() {
    let pager = Pager::start(config()).unwrap();
    let source = Patterns::new(3000);
    let guest = wake(&pager, Arc::clone(&source) as _, VmConfig::STANDARD);
    for page in 5..2500 {
        let expected = pattern(page as u64);
        assert_eq!(guest.byte(page, 9).load(Ordering::Relaxed), expected, "page {page}");
    }
    let faults = guest.vm.stats().faults;
    pager.release(&guest.vm);
    let mut touched = vec![false; 3000];
    let mut last = 0;
    for range in source.touched.lock().unwrap().iter() {
        last = last.max(range.end / PAGE_BYTES);
        let pages = range.start / PAGE_BYTES..range.end / PAGE_BYTES;
        pages.for_each(|page| touched[usize::try_from(page).unwrap()] = true);
    }
    // Behind its last fault everything was there.
    assert!((2000..=2500).contains(&last), "{last}");
    for (page, touched) in touched.into_iter().enumerate() {
        assert_eq!(touched, (5..last).contains(&(page as u64)), "page {page}, of {last}");
    }
    // Every seventh page is one that costs.
    assert!(faults < 2500 / 4, "{faults} faults of 2,495 pages");
}

/// A second thread that is woken beside the first is one more change of threads for each fault, and on
/// a busy machine takes the processor that the guest would have.
#[test]
fn a_guest_whose_pages_are_at_hand_has_one_thread() {
    let pager = Pager::start(config()).unwrap();
    let source = Patterns::new(700);
    let alone = VmConfig { window_bytes: PAGE_BYTES, tracking: Tracking::Exact };
    let guest = wake(&pager, Arc::clone(&source) as _, alone);
    for page in (0..700).filter(|page| page % 7 != 0) {
        let expected = pattern(page as u64);
        assert_eq!(guest.byte(page, 9).load(Ordering::Relaxed), expected, "page {page}");
        guest.byte(page, 9).store(1, Ordering::Relaxed);
    }
    assert_eq!(source.lookers.lock().unwrap().len(), 1);
    pager.release(&guest.vm);
}

/// Prefetching left zeros to their faults, also where a trace said that they are asked for: half of
/// the faults that a replay was to spare came all the same.
#[test]
fn what_is_replayed_has_its_zeros() {
    let pager = Pager::start(config()).unwrap();
    let guest = wake(&pager, Patterns::new(100), VmConfig::STANDARD);
    pager.replay(&guest.vm, vec![20 * PAGE_BYTES..30 * PAGE_BYTES, 3 * PAGE_BYTES..4 * PAGE_BYTES]);
    let is_there = |page: u64| guest.vm.pages().get(page).state == PageState::Clean;
    for _ in 0..1000 {
        if (20..30).chain([3]).all(is_there) {
            break;
        }
        thread::sleep(Duration::from_millis(5));
    }
    for page in (20..30).chain([3]) {
        let expected = pattern(page as u64);
        assert_eq!(guest.byte(page, 9).load(Ordering::Relaxed), expected, "page {page}");
    }
    assert_eq!(guest.vm.stats().faults, 0);
    pager.release(&guest.vm);
}

#[test]
fn what_is_decoded_before_a_guest_comes_is_not_decoded_again() {
    let pager = Pager::start(config()).unwrap();
    let asked = Arc::new(Mutex::new(Vec::new()));
    let note = Arc::clone(&asked);
    let image = crate::guests::Image::numbered(512).hooked(move |page, effort| {
        note.lock().unwrap().push((page, effort));
        Ok(())
    });
    let image: Arc<dyn MemorySource> = Arc::new(image);
    let far = 512 * PAGE_BYTES;
    let ranges = vec![0..16 * PAGE_BYTES, far..far + PAGE_BYTES, 64 * PAGE_BYTES..u64::MAX];
    pager.decode(Arc::clone(&image), ranges);
    // Cut where chunks of 256 KiB end.
    let chunks: Vec<_> =
        [0].into_iter().chain((64..512).step_by(64)).map(|page| (page, Effort::All)).collect();
    crate::guests::wait_until("the decoder", || asked.lock().unwrap().len() == chunks.len());
    assert_eq!(std::mem::take(&mut *asked.lock().unwrap()), chunks);
    let guest = wake(&pager, image, VmConfig::STANDARD);
    for page in (0..16).chain(64..512) {
        let expected = crate::guests::number_of(page as u64);
        assert_eq!(guest.byte(page, 9).load(Ordering::Relaxed), expected, "page {page}");
    }
    assert!(asked.lock().unwrap().is_empty(), "{:?}", asked.lock().unwrap());
    pager.release(&guest.vm);
}

#[test]
fn what_is_prefetched_is_there_without_a_fault() {
    let pager = Pager::start(config()).unwrap();
    let source = Patterns::new(1000);
    let guest = wake(&pager, source.clone(), VmConfig::STANDARD);
    guest.byte(500, 0).store(9, Ordering::Relaxed);
    let first = 400 * PAGE_BYTES..600 * PAGE_BYTES;
    pager.prefetch(&guest.vm, vec![first, 0..100 * PAGE_BYTES, 590 * PAGE_BYTES..(1 << 40)]);
    let is_there =
        |page: u64| pattern(page) == 0 || guest.vm.pages().get(page).state != PageState::Missing;
    for _ in 0..1000 {
        if (0..100).chain(400..1000).all(is_there) {
            break;
        }
        thread::sleep(Duration::from_millis(5));
    }
    assert!((0..100).chain(400..1000).all(is_there));
    assert_eq!(guest.vm.pages().get(150).state, PageState::Missing);
    let faults = guest.vm.stats().faults;
    for page in (0..100).chain(400..1000).filter(|page| pattern(*page as u64) != 0) {
        let expected = if page == 500 { 9 } else { pattern(page as u64) };
        assert_eq!(guest.byte(page, 0).load(Ordering::Relaxed), expected);
    }
    assert_eq!(guest.vm.stats().faults, faults);
    pager.release(&guest.vm);
}

#[test]
fn a_successor_takes_over_with_threads_waiting() {
    let pager = Pager::start(config()).unwrap();
    let source = Patterns::new(300);
    let guest = wake(&pager, source.clone(), VmConfig::STANDARD);
    for page in 0..100 {
        guest.byte(page, 0).store(1, Ordering::Relaxed);
    }
    guest.memory.give_back(90 * PAGE..95 * PAGE).unwrap();
    let pages = guest.vm.pages().fd().try_clone().unwrap();
    let regions = guest.vm.regions().copied().collect();
    let uffd = rustix::io::dup(&*guest.vm).unwrap();
    pager.release(&guest.vm);
    drop(pager);
    thread::scope(|scope| {
        let waits = scope.spawn(|| {
            (guest.byte(250, 3).load(Ordering::Relaxed), guest.byte(91, 3).load(Ordering::Relaxed))
        });
        thread::sleep(Duration::from_millis(30));
        assert!(!waits.is_finished());
        let pager = Pager::start(config()).unwrap();
        let handshake = Handshake {
            regions,
            uffd: Userfaultfd::from_fd(uffd).unwrap(),
            features: Features::EVENT_REMOVE,
            others: Vec::new(),
            peer: Peer::by_pid(std::process::id()).unwrap(),
            socket_end: SocketEnd::Nothing,
        };
        let pages = dormouse_live::pages::Pages::adopt(pages).unwrap();
        let vm = pager
            .take_over(handshake, None, source.clone(), pages, VmConfig::STANDARD, |_, _| {})
            .unwrap();
        assert_eq!(waits.join().unwrap(), (pattern(250), 0));
        guest.byte(200, 3).store(1, Ordering::Relaxed);
        let capture = vm.seal().unwrap();
        let dirty: Vec<u32> = capture.changes().dirty.iter().collect();
        assert_eq!(dirty, (0..90).chain(95..100).chain([200]).collect::<Vec<u32>>());
        drop(capture);
        pager.release(&vm);
    });
}

/// A page that the kernel was asked to take away and could not, as the memory was locked meanwhile,
/// stays there and is written to untold. It counted as zero, and what the guest wrote was lost.
#[test]
fn a_page_that_is_still_there_is_not_captured_as_zero() {
    let pager = Pager::start(config()).unwrap();
    let guest = wake(&pager, Patterns::new(20), VmConfig::STANDARD);
    guest.byte(7, 0).store(5, Ordering::Relaxed);
    guest.memory.give_back(8 * PAGE..9 * PAGE).unwrap();
    guest.vm.pages().note(7..8, PageEvent::Removed).unwrap();
    let capture = guest.vm.seal().unwrap();
    assert_eq!(capture.changes().dirty.iter().collect::<Vec<_>>(), [7]);
    assert_eq!(capture.changes().zero.iter().collect::<Vec<_>>(), [8]);
    let mut buffer = vec![0; PAGE];
    capture.read(7, &mut buffer).unwrap();
    assert_eq!(buffer[0], 5);
    capture.finish();
    pager.release(&guest.vm);
}
