//! What goes wrong in servers of page faults, each parked at the point where it does.
//!
//! The numbers are those of the list of races and rules that was made before this pager was: U1 to
//! U15. Where a rule is the kernel's, a handler that breaks it shows in the same test what comes of
//! that. U11 (a shared memfd's reads look like writes) cannot happen: memory is private here.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use dormouse_live::pages::{PAGE_BYTES, PageState, Tracking};
use dormouse_serve::error::ErrorKind;
use dormouse_serve::uffd::{Effort, End, Pager, VmConfig};
use dormouse_sys::mapping::Mapping;
use dormouse_sys::peer::Peer;
use dormouse_sys::userfaultfd::{
    Access, Event, Features, MESSAGE_BYTES, Protection, Register, Stop, Userfaultfd,
};
use rustix::event::{PollFd, PollFlags};

use crate::guests::{
    Barrier, Image, Local, OpenAtEnd, PAGE, Sleeper, apply, number_of, observed, own_handshake,
    pager_config, region, wait_until,
};

fn tracked() -> VmConfig {
    // None but the page itself is installed, so that each is parked alone.
    VmConfig { window_bytes: PAGE_BYTES, tracking: Tracking::Exact }
}

fn wait_for_message(uffd: &Userfaultfd) {
    let mut poll = [PollFd::new(uffd, PollFlags::IN)];
    rustix::event::poll(&mut poll, None).unwrap();
}

fn next_event(uffd: &Userfaultfd) -> Event {
    wait_for_message(uffd);
    let mut message = [[0; MESSAGE_BYTES]];
    assert_eq!(uffd.read(&mut message).unwrap(), 1);
    Event::parse(&message[0])
}

fn at(memory: &Mapping, page: u64) -> u64 {
    memory.addresses().start + page * PAGE_BYTES
}

/// A source of which requests for one page wait at a barrier, as long as its frame is not at hand.
fn parked_at(pages: u64, parked: u64) -> (Image, Arc<Barrier>) {
    let barrier = Arc::new(Barrier::default());
    let at = Arc::clone(&barrier);
    let image = Image::numbered(pages).hooked(move |page, effort| {
        if page == parked && matches!(effort, Effort::Block(_)) {
            at.pass();
        }
        Ok(())
    });
    (image, barrier)
}

/// U1. Who installs a page and protects it afterwards misses a write between the two: the page has
/// changed, and nobody knows.
#[test]
fn a_write_between_installing_and_protecting_is_missed() {
    let (memory, uffd) = observed(2);
    uffd.register(&memory.addresses(), Register::MissingAndProtected).unwrap();
    let page = at(&memory, 0)..at(&memory, 1);
    assert!(uffd.zero(&page).stop.is_none());
    memory.bytes()[0].store(7, Ordering::Relaxed);
    uffd.protect(&page, Protection::Protected).unwrap();
    assert_eq!(uffd.read(&mut [[0; MESSAGE_BYTES]]).unwrap(), 0, "it was told after all");
    assert_eq!(memory.bytes()[0].load(Ordering::Relaxed), 7);

    // Installed protected, zeros too, there is no such moment.
    let pager = Pager::start(pager_config(2)).unwrap();
    let guest = Local::wake(&pager, Image::new(vec![0; 4 * PAGE]), tracked());
    assert_eq!(guest.read(1), 0);
    // Whoever asked goes on as soon as it is there; what is known of it follows.
    wait_until("what is known", || guest.vm.pages().get(1).state == PageState::Clean);
    guest.write(1, 7);
    wait_until("the note", || guest.vm.pages().get(1).state == PageState::Dirty);
    wait_until("the count", || guest.vm.stats().first_writes == 1);
    pager.release(&guest.vm);
}

/// U2. A page is given back while its content is fetched for somebody who waits: he must see zero. A
/// handler that looked before it fetched gives him what the guest was told is gone.
#[test]
fn a_page_given_back_while_its_content_is_fetched_is_stale() {
    let (memory, uffd) = observed(2);
    thread::scope(|scope| {
        let reader = scope.spawn(|| memory.bytes()[0].load(Ordering::Relaxed));
        let fault = Event::Fault { address: at(&memory, 0), access: Access::Read };
        assert_eq!(next_event(&uffd), fault);
        // The page is missing, so its content is fetched. Meanwhile:
        let giver = scope.spawn(|| memory.give_back(0..PAGE).unwrap());
        assert!(matches!(next_event(&uffd), Event::Remove(_)));
        giver.join().unwrap();
        let stale = uffd.copy(at(&memory, 0), &[0x55; PAGE], Protection::Writable);
        assert!(stale.stop.is_none(), "{stale:?}");
        assert_eq!(reader.join().unwrap(), 0x55, "the kernel does not help");
    });

    let (image, barrier) = parked_at(8, 5);
    let pager = Pager::start(pager_config(2)).unwrap();
    let guest = Local::wake(&pager, image, tracked());
    thread::scope(|scope| {
        let _open = OpenAtEnd(&barrier);
        let reader = scope.spawn(|| guest.read(5));
        barrier.wait_for(1);
        guest.give_back(5..6);
        barrier.open();
        assert_eq!(reader.join().unwrap(), 0);
    });
    pager.release(&guest.vm);
}

/// U3. An answer that comes late finds the page there and dirty. It must not say otherwise, and
/// whoever still waits must be woken.
#[test]
fn a_late_answer_forgets_a_write() {
    let (image, barrier) = parked_at(8, 5);
    let pager = Pager::start(pager_config(3)).unwrap();
    let guest = Local::wake(&pager, image, tracked());
    thread::scope(|scope| {
        let _open = OpenAtEnd(&barrier);
        let reader = scope.spawn(|| guest.read(5));
        barrier.wait_for(1);
        pager.prefetch(&guest.vm, vec![5 * PAGE_BYTES..6 * PAGE_BYTES]);
        // Prefetching answers the reader, while the answer to its fault is still on its way.
        assert_eq!(reader.join().unwrap(), number_of(5));
        guest.write(5, 200);
        wait_until("the note", || guest.vm.pages().get(5).state == PageState::Dirty);
        barrier.open();
        wait_until("the late answer", || guest.vm.stats().faults >= 2);
    });
    assert_eq!(guest.vm.pages().get(5).state, PageState::Dirty);
    assert_eq!(guest.read(5), 200);
    let capture = guest.vm.seal().unwrap();
    assert_eq!(capture.changes().dirty.iter().collect::<Vec<_>>(), [5]);
    capture.finish();
    pager.release(&guest.vm);
}

/// U4. While memory is being given back the kernel refuses to install anything. Who waits for that to
/// pass, and holds what reading the message needs, waits for ever. Here each of two threads of the
/// pager has a fault that cannot be answered before the other one's message was read.
#[test]
fn a_refused_installation_waits_for_what_it_keeps_from_happening() {
    let (memory, uffd) = observed(2);
    thread::scope(|scope| {
        let giver = scope.spawn(|| memory.give_back(0..PAGE).unwrap());
        wait_for_message(&uffd);
        for _ in 0..100 {
            let refused = uffd.copy(at(&memory, 1), &[1; PAGE], Protection::Writable);
            assert!(matches!(refused.stop, Some(Stop::Changing)), "{refused:?}");
        }
        assert!(matches!(next_event(&uffd), Event::Remove(_)));
        giver.join().unwrap();
    });

    let pager = Pager::start(pager_config(2)).unwrap();
    let guest = Local::wake(&pager, Image::numbered(600), tracked());
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                guest.give_back(0..100);
            }
        });
        let readers: Vec<_> = (0..4)
            .map(|part| {
                let guest = &guest;
                scope.spawn(move || {
                    (100 + part * 125..225 + part * 125)
                        .all(|page| guest.read(page) == number_of(page))
                })
            })
            .collect();
        let all_right = readers.into_iter().all(|reader| reader.join().unwrap());
        done.store(true, Ordering::Relaxed);
        assert!(all_right);
    });
    pager.release(&guest.vm);
}

/// U5. A page counts as given back and a write to it is told, as it is there and protected: as a rule
/// the kernel is about to take it away. But where it could not (the memory was locked meanwhile), it
/// never will. Waking the writer to try again would go on for ever; letting him write blindly would
/// lose what he wrote. Zeros are tried first: only a page that is there refuses them.
#[test]
fn a_page_that_could_not_be_taken_away_is_woken_for_ever() {
    let (memory, uffd) = observed(8);
    uffd.register(&memory.addresses(), Register::MissingAndProtected).unwrap();
    for page in [5, 6] {
        let content = [number_of(page); PAGE];
        assert!(uffd.copy(at(&memory, page), &content, Protection::Protected).stop.is_none());
    }
    let pager = Pager::start(pager_config(2)).unwrap();
    let guest = thread::scope(|scope| {
        let memory_of = &memory;
        // Nobody reads messages yet, so the giver stands where the page is neither here nor there.
        let giver = scope.spawn(move || memory_of.give_back(5 * PAGE..6 * PAGE));
        wait_for_message(&uffd);
        // Locking writes to what it locks, and so waits as well.
        scope.spawn(move || memory_of.lock(5 * PAGE..6 * PAGE).unwrap());
        wait_until("the lock", || {
            let status = std::fs::read_to_string("/proc/self/status").unwrap();
            !status.lines().any(|line| line.starts_with("VmLck:") && line.contains(" 0 kB"))
        });
        let image = Arc::new(Image::numbered(8));
        let regions = vec![region(&memory, 8)];
        let pages = dormouse_live::pages::Pages::new(8).unwrap();
        let handshake = own_handshake(Userfaultfd::from_fd(uffd.into()).unwrap(), regions);
        let vm = pager.take_over(handshake, None, image, pages, tracked(), |_, _| {}).unwrap();
        let refused = giver.join().unwrap().unwrap_err();
        assert_eq!(refused.kind(), std::io::ErrorKind::InvalidInput, "{refused}");
        vm
    });
    let byte = &memory.bytes()[5 * PAGE];
    byte.store(9, Ordering::Relaxed);
    assert_eq!(byte.load(Ordering::Relaxed), 9);
    assert_eq!(memory.bytes()[5 * PAGE + 1].load(Ordering::Relaxed), number_of(5));
    wait_until("the note", || guest.pages().get(5).state == PageState::Dirty);
    pager.release(&guest);
}

/// U6, U12. Between letting a page be written to and noting it, a capture could look: the write would be
/// in none of two captures. And who writes first to a page that is yet to be captured, and who loses
/// that race, must both not write before it is copied. Three threads write to the same pages while
/// captures follow each other; every one is of one moment, and together they are the memory.
#[test]
fn a_write_falls_between_two_captures() {
    const PAGES: u64 = 64;
    let pager = Pager::start(pager_config(3)).unwrap();
    let guest = Local::wake(&pager, Image::numbered(PAGES), tracked());
    let done = AtomicBool::new(false);
    let mut stored: Vec<u8> = (0..PAGES).flat_map(|page| [number_of(page); PAGE]).collect();
    thread::scope(|scope| {
        for thread in 0..3 {
            let (guest, done) = (&guest, &done);
            scope.spawn(move || {
                for round in 0_u32.. {
                    if done.load(Ordering::Relaxed) {
                        return;
                    }
                    let page = u64::from(round.wrapping_mul(2_654_435_761) >> 8) % PAGES;
                    // The last word first: a page that is captured half-way would show it.
                    for word in [511, 0] {
                        let byte = page as usize * PAGE + word * 8 + thread;
                        let counter = &guest.memory.bytes()[byte];
                        counter.fetch_add(1, Ordering::Relaxed);
                    }
                }
            });
        }
        for _ in 0..60 {
            let capture = guest.vm.seal().unwrap();
            apply(&capture, &mut stored).unwrap();
            capture.finish();
        }
        done.store(true, Ordering::Relaxed);
    });
    for page in stored.chunks(PAGE).take(PAGES as usize) {
        for thread in 0..3 {
            let ahead = page[511 * 8 + thread].wrapping_sub(page[thread]);
            assert!(ahead <= 1, "a page of two moments: {ahead}");
        }
    }
    let capture = guest.vm.seal().unwrap();
    apply(&capture, &mut stored).unwrap();
    capture.finish();
    for (got, byte) in stored.iter().zip(guest.memory.bytes()) {
        assert_eq!(*got, byte.load(Ordering::Relaxed));
    }
    pager.release(&guest.vm);
}

/// U7. What a guest gave back before it was paused may stand unread in the kernel, as all threads of
/// the pager are busy. A capture that does not read it stores what is gone. And faults that it reads
/// by the way are not lost.
#[test]
fn a_capture_overlooks_what_is_still_unread() {
    let (image, barrier) = parked_at(32, 17);
    let pager = Pager::start(pager_config(2)).unwrap();
    let (memory, uffd) = observed(32);
    let copy = Userfaultfd::from_fd(rustix::io::dup(&uffd).unwrap()).unwrap();
    let handshake = own_handshake(uffd, vec![region(&memory, 32)]);
    let guest = Local::serve(&pager, memory, handshake, Arc::new(image), tracked());
    guest.write(5, 77);
    thread::scope(|scope| {
        let _open = OpenAtEnd(&barrier);
        // Both threads of the pager fetch the same page: it was read twice.
        let first = scope.spawn(|| guest.read(17));
        barrier.wait_for(1);
        copy.wake(&(at(&guest.memory, 17)..at(&guest.memory, 18))).unwrap();
        barrier.wait_for(2);
        let giver = scope.spawn(|| guest.give_back(5..6));
        let other = scope.spawn(|| guest.read(9));
        wait_for_message(&copy);
        thread::sleep(std::time::Duration::from_millis(20));
        assert!(!giver.is_finished() && !other.is_finished(), "somebody has read it");
        let capture = guest.vm.seal().unwrap();
        assert!(capture.changes().dirty.is_empty());
        assert_eq!(capture.changes().zero.iter().collect::<Vec<_>>(), [5]);
        capture.finish();
        giver.join().unwrap();
        barrier.open();
        assert_eq!(other.join().unwrap(), number_of(9));
        assert_eq!(first.join().unwrap(), number_of(17));
    });
    pager.release(&guest.vm);
}

/// U8. "Somebody else has installed it" is an answer only as long as nobody takes pages away untold.
/// If somebody does, the thread would try for ever; what the page held is lost, and its guest stopped.
#[test]
fn a_page_that_was_taken_away_untold_is_asked_for_for_ever() {
    let memory = Mapping::anonymous(8 * PAGE, dormouse_sys::mapping::PageSize::Small).unwrap();
    // As without EVENT_REMOVE: what is given back is not told.
    let uffd = Userfaultfd::open(Features::NONE).unwrap();
    uffd.register(&memory.addresses(), Register::Missing).unwrap();
    // The test itself is not to be stopped. Of the sleeper's page tables it is true as well that the
    // page is not there.
    let mut sleeper = Sleeper::start();
    let handshake = dormouse_serve::uffd::handshake::Handshake {
        peer: Peer::by_pid(sleeper.0.id()).unwrap(),
        ..own_handshake(uffd, vec![region(&memory, 8)])
    };
    let pager = Pager::start(pager_config(2)).unwrap();
    let guest = Local::serve(&pager, memory, handshake, Arc::new(Image::numbered(8)), tracked());
    assert_eq!(guest.read(3), number_of(3));
    guest.give_back(3..4);
    let Local { memory, vm, ended, _socket } = guest;
    thread::scope(|scope| {
        let reader = scope.spawn(|| memory.bytes()[3 * PAGE].load(Ordering::Relaxed));
        let end = ended.lock().unwrap().recv().unwrap();
        let End::Stopped(error) = end else { panic!("{end:?}") };
        assert_eq!(error.kind(), ErrorKind::Lost, "{error}");
        assert!(error.to_string().contains("page 3 is Clean and not in"), "{error}");
        assert!(!sleeper.0.wait().unwrap().success());
        // The last descriptor: whoever still waits goes on.
        drop((pager, vm));
        reader.join().unwrap();
    });
}

/// U9, U10. A guest that was let go of is not touched any more, by no thread that was about to: the
/// number of its descriptor may be another's, and its successor may be at work. Who waits goes on
/// waiting, and is not given zeros.
#[test]
fn a_guest_that_was_let_go_of_is_touched_once_more() {
    let (image, barrier) = parked_at(8, 5);
    let pager = Pager::start(pager_config(2)).unwrap();
    let (memory, uffd) = observed(8);
    let copy = Userfaultfd::from_fd(rustix::io::dup(&uffd).unwrap()).unwrap();
    let handshake = own_handshake(uffd, vec![region(&memory, 8)]);
    let guest = Local::serve(&pager, memory, handshake, Arc::new(image), tracked());
    thread::scope(|scope| {
        let _open = OpenAtEnd(&barrier);
        let reader = scope.spawn(|| guest.read(5));
        barrier.wait_for(1);
        pager.release(&guest.vm);
        assert!(matches!(guest.end(), End::Released));
        barrier.open();
        // Ends when its threads have: the answer that was under way came to nothing.
        drop(pager);
        assert_eq!(guest.vm.pages().get(5).state, PageState::Missing);
        assert!(!reader.is_finished());
        let other = copy.copy(at(&guest.memory, 5), &[99; PAGE], Protection::Writable);
        assert!(other.stop.is_none(), "{other:?}");
        assert_eq!(reader.join().unwrap(), 99);
    });
}

/// U12. Copying a page before it is written to may not wait for a page: the guest gives back what it
/// writes to at the same time, all threads of the pager wait for faults that none of them answers, and
/// all guests stand still.
#[test]
fn every_thread_waits_for_a_page_that_it_would_have_to_install() {
    const PAGES: u64 = 32;
    let pager = Pager::start(pager_config(2)).unwrap();
    let guest = Local::wake(&pager, Image::numbered(PAGES), tracked());
    let begun = std::time::Instant::now();
    let mut lost = 0;
    while begun.elapsed() < std::time::Duration::from_millis(500) {
        (0..PAGES).for_each(|page| guest.write(page, 1));
        let capture = guest.vm.seal().unwrap();
        thread::scope(|scope| {
            for part in 0..4 {
                let guest = &guest;
                scope.spawn(move || (part..PAGES).step_by(4).for_each(|page| guest.write(page, 2)));
            }
            scope.spawn(|| (0..PAGES).rev().for_each(|page| guest.give_back(page..page + 1)));
        });
        lost += u32::from(apply(&capture, &mut vec![0; PAGES as usize * PAGE]).is_err());
    }
    assert!(lost > 0, "no page was given back in time");
    pager.release(&guest.vm);
}

/// U13. A slow source is no reason to keep a guest from giving memory back, or from being sealed.
#[test]
fn a_slow_source_stalls_the_balloon() {
    let (image, barrier) = parked_at(32, 17);
    let pager = Pager::start(pager_config(2)).unwrap();
    let guest = Local::wake(&pager, image, tracked());
    guest.write(5, 77);
    thread::scope(|scope| {
        let _open = OpenAtEnd(&barrier);
        let reader = scope.spawn(|| guest.read(17));
        barrier.wait_for(1);
        guest.give_back(5..6);
        assert_eq!(guest.read(5), 0);
        guest.vm.seal().unwrap().finish();
        assert!(!reader.is_finished());
        barrier.open();
        assert_eq!(reader.join().unwrap(), number_of(17));
    });
    pager.release(&guest.vm);
}

/// U14. A page that is installed between a removal being read and the kernel taking the page away is
/// gone although it counts as there. Two threads write to a page that a third gives back all the
/// time: none is left waiting, and none sees the image again.
#[test]
fn a_page_installed_as_it_is_taken_away_is_asked_for_for_ever() {
    let pager = Pager::start(pager_config(3)).unwrap();
    let guest = Local::wake(&pager, Image::numbered(8), tracked());
    let done = AtomicBool::new(false);
    guest.give_back(3..4);
    thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                guest.give_back(3..4);
            }
        });
        let users: Vec<_> = (0..2)
            .map(|user| {
                let byte = &guest.memory.bytes()[3 * PAGE + user];
                scope.spawn(move || {
                    (0..2000_u32).all(|_| {
                        byte.store(7, Ordering::Relaxed);
                        matches!(byte.load(Ordering::Relaxed), 0 | 7)
                    })
                })
            })
            .collect();
        let all_right = users.into_iter().all(|user| user.join().unwrap());
        done.store(true, Ordering::Relaxed);
        assert!(all_right, "the image came back");
    });
    assert!(guest.end_if_any().is_none());
    pager.release(&guest.vm);
}

/// U15. Memory is given back at an address that is in no region. Who skips that keeps what it held, and
/// gives it to somebody later; the guest is stopped.
#[test]
fn a_removal_at_an_unknown_address_is_skipped() {
    let (memory, uffd) = observed(8);
    let mut sleeper = Sleeper::start();
    let handshake = dormouse_serve::uffd::handshake::Handshake {
        peer: Peer::by_pid(sleeper.0.id()).unwrap(),
        ..own_handshake(uffd, vec![region(&memory, 4)])
    };
    let pager = Pager::start(pager_config(2)).unwrap();
    let guest = Local::serve(&pager, memory, handshake, Arc::new(Image::numbered(4)), tracked());
    assert_eq!(guest.read(3), number_of(3));
    guest.give_back(2..6);
    let End::Stopped(error) = guest.end() else { panic!("it was not stopped") };
    assert_eq!(error.kind(), ErrorKind::Protocol);
    assert!(error.to_string().contains("is in no region"), "{error}");
    assert!(!sleeper.0.wait().unwrap().success());
}

/// Where a region is made of two mappings the kernel installs nothing across their border. A guest that
/// goes through memory in order is given the rest of a window at once: here that would fail each time,
/// and its thread be woken and ask for ever.
#[test]
fn a_window_across_two_mappings_is_never_installed() {
    let memory = Mapping::anonymous(32 * PAGE, dormouse_sys::mapping::PageSize::Small).unwrap();
    // Of another kind, so that the kernel keeps them apart.
    memory.replace_with_zeros(6 * PAGE..32 * PAGE).unwrap();
    let uffd = Userfaultfd::open(Features::EVENT_REMOVE).unwrap();
    uffd.register(&memory.addresses(), Register::Missing).unwrap();
    let copy = Userfaultfd::from_fd(rustix::io::dup(&uffd).unwrap()).unwrap();
    let across = copy.copy(at(&memory, 5), &[1; 2 * PAGE], Protection::Writable);
    assert!(matches!(across.stop, Some(Stop::Unmapped)), "{across:?}");
    let handshake = own_handshake(uffd, vec![region(&memory, 32)]);
    let pager = Pager::start(pager_config(2)).unwrap();
    let config = VmConfig { window_bytes: 4 * PAGE_BYTES, tracking: Tracking::Exact };
    let guest = Local::serve(&pager, memory, handshake, Arc::new(Image::numbered(32)), config);
    for page in 0..32 {
        assert_eq!(guest.read(page), number_of(page));
    }
    // A removal across both is one for each.
    guest.give_back(2..9);
    assert!((2..9).all(|page| guest.read(page) == 0));
    pager.release(&guest.vm);
}
