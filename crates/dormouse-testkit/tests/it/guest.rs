//! A real Linux guest boots, works, pauses, and goes on in another QEMU.

use std::path::{Path, PathBuf};

use dormouse_testkit::guest::{
    Assets, Config, Guest, Machine, MemoryMapping, cache_dir, copy_sparse, private_files_stay_whole,
};

/// A folder under `target/` that is removed at the end of a test that passed.
struct Scratch(PathBuf);

impl Scratch {
    fn new(name: &str) -> Scratch {
        let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
        if dir.exists() {
            std::fs::remove_dir_all(&dir).unwrap();
        }
        std::fs::create_dir_all(&dir).unwrap();
        Scratch(dir)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            std::fs::remove_dir_all(&self.0).unwrap();
        }
    }
}

fn assets() -> Assets {
    Assets::prepare(&cache_dir(), &mut |_| ()).unwrap()
}

/// Boots `machine`, pauses it, and restores it from copies of its files, with the memory mapped as `mapping`.
fn goes_on_where_it_stopped(name: &str, machine: Machine, mapping: MemoryMapping) {
    let scratch = Scratch::new(name);
    let (first, second) = (scratch.0.join("first"), scratch.0.join("second"));
    std::fs::create_dir(&first).unwrap();
    std::fs::create_dir(&second).unwrap();
    let assets = assets();
    let config = Config { machine, ..Config::in_dir(&first) };

    let mut guest = Guest::boot(&assets, &config).unwrap();
    let output = guest.run("echo to disk > /root/note; sync; exit 3").unwrap();
    assert_eq!(output.rc, 3);
    assert_eq!(guest.check("uname -s").unwrap(), "Linux\n");
    // On a tmpfs, so that it is nowhere but in the memory.
    guest.check("mount -t tmpfs tmp /mnt && echo in memory > /mnt/note").unwrap();
    let state = scratch.0.join("state");
    guest.wait_counter().unwrap();
    guest.pause(&state).unwrap();
    let stopped_at = guest.counter().unwrap();
    for file in ["memory", "disk"] {
        copy_sparse(&first.join(file), &second.join(file)).unwrap();
    }
    let memory_before = std::fs::read(second.join("memory")).unwrap();
    guest.kill().unwrap();

    let config = Config { machine, mapping, ..Config::in_dir(&second) };
    let mut guest = Guest::restore(&assets, &config, &state).unwrap();
    let goes_on_at = guest.wait_counter().unwrap();
    // A line that was on its way at the pause may be lost between the two QEMUs.
    assert!((stopped_at + 1..=stopped_at + 2).contains(&goes_on_at), "{goes_on_at}");
    assert_eq!(guest.check("cat /root/note /mnt/note").unwrap(), "to disk\nin memory\n");
    guest.kill().unwrap();

    let memory_after = std::fs::read(second.join("memory")).unwrap();
    match mapping {
        MemoryMapping::Shared => assert!(memory_after != memory_before),
        MemoryMapping::Private if private_files_stay_whole().unwrap() => {
            assert!(memory_after == memory_before);
        }
        // An older QEMU punches what the guest reports as free, and does nothing else.
        MemoryMapping::Private => {
            let pages = memory_after.chunks(4096).zip(memory_before.chunks(4096));
            for (page, (after, before)) in pages.enumerate() {
                assert!(after == before || after == [0; 4096], "page {page}");
            }
        }
    }
}

#[test]
fn q35_goes_on_in_another_qemu() {
    goes_on_where_it_stopped("guest-q35", Machine::Q35, MemoryMapping::Shared);
}

#[test]
fn q35_goes_on_over_a_private_mapping() {
    goes_on_where_it_stopped("guest-private", Machine::Q35, MemoryMapping::Private);
}

#[test]
fn microvm_goes_on_in_another_qemu() {
    goes_on_where_it_stopped("guest-microvm", Machine::Microvm, MemoryMapping::Shared);
}

/// The source of a snapshot is not used up: it goes on after its pause, and can be paused again.
#[test]
fn a_paused_guest_resumes_and_pauses_again() {
    let scratch = Scratch::new("guest-resume");
    let mut guest = Guest::boot(&assets(), &Config::in_dir(&scratch.0)).unwrap();
    for round in 0..2 {
        let before = guest.wait_counter().unwrap();
        let state = scratch.0.join(format!("state-{round}"));
        guest.pause(&state).unwrap();
        assert!(std::fs::metadata(&state).unwrap().len() > 10_000);
        guest.resume().unwrap();
        assert!(guest.wait_counter().unwrap() > before);
    }
}
