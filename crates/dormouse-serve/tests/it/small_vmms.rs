//! Small VMMs in processes of their own, served by a pager of this one: every byte they read is
//! checked by themselves, every byte that is captured by this test.
//!
//! `DORMOUSE_PAGER_SECONDS` makes the random work of each test so long, for hours if need be.

use std::fs;
use std::time::Duration;

use dormouse_live::pages::{PAGE_BYTES, PageState, Tracking};
use dormouse_serve::error::ErrorKind;
use dormouse_serve::uffd::{End, VmConfig};
use dormouse_testkit::vmm::{
    Backing, Config, HugePages, Lie, Manner, Mix, PageKind, RegionConfig, Version, image,
};

use crate::guests::{Guest, Host, Image, PAGE, apply, first_difference, wait_until};

/// How long random work goes on.
fn work_time() -> Duration {
    let seconds = std::env::var("DORMOUSE_PAGER_SECONDS").ok().and_then(|text| text.parse().ok());
    seconds.map_or(Duration::from_millis(700), Duration::from_secs)
}

fn config(host: &Host, seed: u64, pages: u64) -> Config {
    Config::small(seed, pages, Backing::firecracker(&host.socket(), Version::V1_12))
}

fn tracked(tracking: Tracking) -> VmConfig {
    VmConfig { tracking, ..VmConfig::STANDARD }
}

#[test]
fn every_form_of_the_handshake_is_served() {
    use Manner::{AmongOthers, AtOnce, InPieces, TableFirst};
    let cases = [
        (Version::V1_1, AtOnce),
        (Version::V1_7, AtOnce),
        (Version::V1_7, TableFirst),
        (Version::V1_12, AtOnce),
        (Version::V1_12, InPieces),
        (Version::V1_12, AmongOthers),
    ];
    let host = Host::start(3);
    for (number, (version, manner)) in (0..).zip(cases) {
        let mix = if version == Version::V1_1 { Mix::KEEPING } else { Mix::ALL };
        let backing = Backing::Uffd { socket: host.socket(), version, manner };
        let config = Config { backing, mix, ..config(&host, number, 700) };
        let mut guest = host.wake_checked(&config, VmConfig::STANDARD);
        guest.small.run(4000).unwrap_or_else(|error| panic!("{version:?} {manner:?}: {error:#}"));
        guest.small.verify().unwrap();
        let Guest { small, vm, .. } = &guest;
        assert!(small.pid() == vm.peer().pid() && vm.is_tracked());
        guest.small.quit().unwrap();
    }
}

#[test]
fn threads_at_random_work_see_no_wrong_byte() {
    for tracking in [Tracking::Exact, Tracking::Off] {
        for window_bytes in [PAGE_BYTES, 64 << 10] {
            let host = Host::start(3);
            // Regions that end in the middle of windows.
            let pages = [1000, 37, 1, 1003];
            let regions = pages.map(|pages| RegionConfig { pages, kind: PageKind::Small });
            let mix = Mix { give_back: 6, ..Mix::ALL };
            let (regions, threads) = (regions.to_vec(), 6);
            let config = Config { regions, mix, threads, ..config(&host, window_bytes, 2048) };
            let mut guest = host.wake_checked(&config, VmConfig { tracking, window_bytes });
            guest.small.start_for(work_time()).unwrap();
            host.pager.prefetch(&guest.vm, vec![3 << 20..u64::MAX, 5000..2 << 20]);
            guest.small.idle().unwrap();
            guest.small.verify().unwrap();
            let stats = guest.vm.stats();
            assert!(stats.removed_bytes > 0 && stats.faults > 0, "{stats:?}");
            assert_eq!(stats.around_bytes == 0, window_bytes == PAGE_BYTES, "{stats:?}");
            guest.small.quit().unwrap();
        }
    }
}

#[test]
fn several_guests_of_one_pager_do_not_see_each_other() {
    let host = Host::start(2);
    let configs: Vec<_> = (0..4).map(|seed| config(&host, 100 + seed, 1024)).collect();
    let mut guests: Vec<_> =
        configs.iter().map(|config| host.wake_checked(config, VmConfig::STANDARD)).collect();
    for guest in &mut guests {
        guest.small.start_for(work_time()).unwrap();
        host.pager.prefetch(&guest.vm, vec![0..4 << 20]);
    }
    for guest in &mut guests {
        guest.small.idle().unwrap();
        guest.small.verify().unwrap();
    }
    assert_eq!(host.pager.guests().len(), 4);
    for guest in guests {
        guest.small.quit().unwrap();
        assert!(matches!(guest.ended.lock().unwrap().recv().unwrap(), End::Gone));
    }
}

/// What is sealed while the guest is paused is what it says its memory must be; so is every later
/// capture on top of the one before. With live ones the guest works on while they are read.
#[test]
fn captures_on_top_of_each_other_are_the_guests_memory() {
    let kept = Mix { fill: 3, ..Mix::KEEPING };
    for (tracking, mix) in
        [(Tracking::Exact, kept), (Tracking::Exact, Mix::ALL), (Tracking::Off, Mix::ALL)]
    {
        let host = Host::start(3);
        let config = Config { mix, ..config(&host, 5, 1500) };
        let mut guest = host.wake_checked(&config, tracked(tracking));
        let page_of = image(config.seed, config.pages());
        let mut stored: Vec<u8> = (0..config.pages()).flat_map(page_of).collect();
        guest.small.start(u64::MAX / 2).unwrap();
        let mut lost = 0;
        for round in 0..12 {
            std::thread::sleep(work_time() / 12);
            guest.small.pause().unwrap();
            let expected = guest.expected(host.folder.path());
            let capture = guest.vm.seal().unwrap();
            let is_live = capture.is_live();
            assert_eq!(is_live, tracking == Tracking::Exact);
            let runs_on = is_live && round % 3 != 0;
            if runs_on {
                guest.small.resume().unwrap();
            }
            let mut taken = stored.clone();
            match apply(&capture, &mut taken) {
                Ok(()) => {
                    let different = first_difference(&taken, &expected);
                    assert_eq!(different, None, "{tracking:?}, round {round}");
                    stored = taken;
                    capture.finish();
                }
                // Pages were given back before they were read: nothing is stored.
                Err(error) => {
                    assert!(runs_on && mix.give_back > 0, "{error}");
                    assert_eq!(error.kind(), ErrorKind::Busy, "{error}");
                    lost += 1;
                }
            }
            if !runs_on {
                guest.small.resume().unwrap();
            }
        }
        assert!(lost <= 8, "only captures that run beside the guest can be lost");
    }
}

#[test]
fn only_what_changed_since_is_captured_again() {
    let host = Host::start(3);
    let mut guest = host.wake_checked(&config(&host, 8, 800), VmConfig::STANDARD);
    guest.small.touch(&(0..800).collect::<Vec<u64>>()).unwrap();
    use dormouse_testkit::vmm::Access::Write;
    guest.small.touch_with(&[3, 4, 700], Write).unwrap();
    let dirty = |guest: &Guest| {
        let capture = guest.vm.seal().unwrap();
        let dirty: Vec<u32> = capture.changes().dirty.iter().collect();
        capture.finish();
        dirty
    };
    assert_eq!(dirty(&guest), [3, 4, 700]);
    assert!(dirty(&guest).is_empty());
    guest.small.touch_with(&[4, 5], Write).unwrap();
    assert_eq!(dirty(&guest), [4, 5]);
    assert_eq!(guest.vm.stats().first_writes, 5);
}

/// Firecracker asks for no protection of huge pages. The kernel gives it all the same (6.18, whatever
/// was asked for): then changes are known to the huge page. Where it does not, all that was installed
/// counts as changed, and the guest is served no less.
#[test]
fn huge_pages_are_served_and_captured() {
    let _reserved = HugePages::reserve(24).unwrap();
    let host = Host::start(3);
    let regions = [6, 3].map(|huge| RegionConfig { pages: huge * 512, kind: PageKind::Huge });
    let config = Config { regions: regions.to_vec(), ..config(&host, 4, 1) };
    for tracking in [Tracking::Exact, Tracking::Off] {
        let mut guest = host.wake_checked(&config, tracked(tracking));
        assert_eq!(guest.vm.regions().next().unwrap().page_bytes, 2 << 20);
        host.pager.prefetch(&guest.vm, vec![4 << 20..7 << 20]);
        guest.small.touch(&[0, 511, 513]).unwrap();
        guest.small.touch_with(&[600], dormouse_testkit::vmm::Access::Write).unwrap();
        wait_until("prefetching", || guest.vm.pages().get(1024).state != PageState::Missing);
        let capture = guest.vm.seal().unwrap();
        let dirty: Vec<u32> = capture.changes().dirty.iter().collect();
        if guest.vm.is_tracked() {
            assert_eq!(dirty, (512..1024).collect::<Vec<u32>>());
        } else {
            assert!(dirty.len() >= 1024, "all that was installed");
        }
        println!("huge pages, {tracking:?}: tracked: {}", guest.vm.is_tracked());
        drop(capture);
        guest.small.run(3000).unwrap();
        guest.small.verify().unwrap();
        let expected = guest.expected(host.folder.path());
        let mut taken: Vec<u8> =
            (0..config.pages()).flat_map(image(config.seed, config.pages())).collect();
        let capture = guest.vm.seal().unwrap();
        apply(&capture, &mut taken).unwrap();
        assert_eq!(first_difference(&taken, &expected), None, "{tracking:?}");
        capture.finish();
        guest.small.quit().unwrap();
    }
}

/// A page that cannot be read stops its guest, with the reason; its neighbours go on.
#[test]
fn a_page_that_cannot_be_read_stops_its_guest_alone() {
    let host = Host::start(2);
    let mut other = host.wake_checked(&config(&host, 1, 1000), VmConfig::STANDARD);
    other.small.start_for(work_time()).unwrap();
    let bad = config(&host, 2, 1000);
    let image = Image::of(&bad).hooked(|page, _| match page {
        777 => Err("the pack is damaged".into()),
        _ => Ok(()),
    });
    let mut guest = host.wake(&bad, image, VmConfig::STANDARD);
    guest.small.touch(&[1, 2, 700, 784, 767]).unwrap();
    let small = guest.small.touch(&[777]).unwrap_err();
    assert!(small.to_string().contains("signal 9"), "{small:#}");
    let End::Stopped(error) = guest.end() else { panic!("it was not stopped") };
    assert_eq!(error.kind(), ErrorKind::Source);
    let source = std::error::Error::source(&error).unwrap();
    assert_eq!(source.to_string(), "the pack is damaged");
    other.small.idle().unwrap();
    other.small.verify().unwrap();
}

/// The source of a neighbour, or of what nobody has asked for yet, is no reason to stop a guest.
#[test]
fn a_page_that_nobody_asks_for_stops_nobody() {
    let host = Host::start(2);
    let config = config(&host, 2, 1000);
    let image = Image::of(&config).hooked(|page, effort| match effort {
        dormouse_serve::uffd::Effort::All if page >= 512 => Err("the pack is damaged".into()),
        _ => Ok(()),
    });
    let mut guest = host.wake(&config, image, VmConfig::STANDARD);
    host.pager.prefetch(&guest.vm, vec![600 * PAGE_BYTES..700 * PAGE_BYTES]);
    guest.small.verify().unwrap();
    guest.small.quit().unwrap();
}

/// Whether in an answer or ahead of one, a panic stops the guest, and the pager goes on.
#[test]
fn a_source_that_panics_stops_its_guest_alone() {
    let host = Host::start(2);
    let mut other = host.wake_checked(&config(&host, 1, 500), VmConfig::STANDARD);
    // More often than there are threads.
    for round in 0..4 {
        let bad = config(&host, 2, 500);
        let image = Image::of(&bad).hooked(|page, _| {
            assert!(page < 304, "page {page} is one too many");
            Ok(())
        });
        let mut guest = host.wake(&bad, image, VmConfig::STANDARD);
        if round % 2 == 0 {
            guest.small.touch(&[1, 303]).unwrap();
            guest.small.touch(&[304]).unwrap_err();
        } else {
            host.pager.prefetch(&guest.vm, vec![304 * PAGE_BYTES..305 * PAGE_BYTES]);
        }
        let End::Stopped(error) = guest.end() else { panic!("it was not stopped") };
        assert_eq!(error.kind(), ErrorKind::Panicked);
        assert!(error.to_string().contains("is one too many"), "{error}");
        assert_eq!(guest.small.wait().unwrap().signal, Some(9));
    }
    host.pager.prefetch(&other.vm, vec![0..500 * PAGE_BYTES]);
    other.small.run(3000).unwrap();
    other.small.verify().unwrap();
}

#[test]
fn a_fault_at_an_impossible_address_stops_the_guest() {
    let host = Host::start(2);
    let manner = Manner::Lie(Lie::Elsewhere);
    let backing = Backing::Uffd { socket: host.socket(), version: Version::V1_12, manner };
    let config = Config { backing, ..config(&host, 1, 100) };
    // Untracked, as what is nowhere cannot be registered.
    let mut guest = host.wake(&config, Image::of(&config), tracked(Tracking::Off));
    guest.small.touch(&[5]).unwrap_err();
    let End::Stopped(error) = guest.end() else { panic!("it was not stopped") };
    assert_eq!(error.kind(), ErrorKind::Protocol);
    assert!(error.to_string().contains("is in no region"), "{error}");
}

/// Descriptors of this process; no other test runs in it.
fn descriptors() -> usize {
    fs::read_dir("/proc/self/fd").unwrap().count()
}

/// However a VMM ends, nothing of it is kept: no descriptor, no memory of its states.
#[test]
fn a_guest_that_ends_leaves_nothing_behind() {
    let host = Host::start(2);
    let before = descriptors();
    for round in 0..6 {
        let version = if round % 2 == 0 { Version::V1_12 } else { Version::V1_7 };
        let backing = Backing::firecracker(&host.socket(), version);
        let config = Config { backing, ..config(&host, round, 600) };
        let mut guest = host.wake_checked(&config, VmConfig::STANDARD);
        guest.small.start(u64::MAX / 2).unwrap();
        // Most of it is still to be done when the guest ends.
        host.pager.prefetch(&guest.vm, vec![0..600 * PAGE_BYTES; 50]);
        std::thread::sleep(Duration::from_millis(20 * round));
        let small = std::mem::replace(&mut guest.small, vmm_of_nothing());
        small.kill().unwrap();
        assert!(matches!(guest.end(), End::Gone), "round {round}");
    }
    assert!(host.pager.guests().is_empty());
    wait_until("descriptors to be closed", || descriptors() <= before);
}

fn vmm_of_nothing() -> dormouse_testkit::vmm::SmallVmm {
    dormouse_testkit::vmm::SmallVmm::spawn(&Config::small(1, 1, Backing::Own)).unwrap()
}

/// A commit reads from outside, and a page that was given back since is a fault like any other. If
/// the VMM ends before it is answered, the reader is not left waiting for it.
#[test]
fn a_capture_of_a_guest_that_ends_ends_too() {
    let host = Host::start(2);
    let config = Config { mix: Mix::ALL, ..config(&host, 3, 3000) };
    for round in 0..8 {
        let mut guest = host.wake_checked(&config, VmConfig::STANDARD);
        guest.small.run(6000).unwrap();
        let capture = guest.vm.seal().unwrap();
        guest.small.start(u64::MAX / 2).unwrap();
        let mut image = vec![0; 3000 * PAGE];
        let taken = std::thread::scope(|scope| {
            let taking = scope.spawn(|| (0..1000).try_for_each(|_| apply(&capture, &mut image)));
            std::thread::sleep(Duration::from_millis(5 * round));
            let small = std::mem::replace(&mut guest.small, vmm_of_nothing());
            small.kill().unwrap();
            taking.join().unwrap()
        });
        let kind = taken.unwrap_err().kind();
        assert!(matches!(kind, ErrorKind::Gone | ErrorKind::Busy), "{kind:?}");
        drop(capture);
        assert_eq!(guest.vm.seal().unwrap_err().kind(), ErrorKind::Gone);
    }
}
