//! A real guest wakes from the tree: once, and then ten times at once, each on its own disk.

use std::fs;
use std::path::{Path, PathBuf};

use dormouse_testkit::guest::{Assets, Config, Disk, Guest, MemoryMapping, cache_dir};

use crate::fixture::Home;
use crate::mounted::{Mounted, path, run};

const FORKS: usize = 10;

/// What a process has of a file that it maps, in KiB, from `/proc/PID/smaps`.
#[derive(Debug, Default)]
struct Mapped {
    /// Pages that are the file's, and its part of those that it shares.
    clean: u64,
    clean_part: u64,
    /// Pages that it changed for itself.
    dirty: u64,
}

fn mapped(pid: u32, file: &Path) -> Mapped {
    let text = fs::read_to_string(format!("/proc/{pid}/smaps")).unwrap();
    let mut mapped = Mapped::default();
    let (mut is_ours, mut part, mut part_dirty) = (false, 0, 0);
    for line in text.lines() {
        let mut words = line.split_whitespace();
        let (Some(key), value) = (words.next(), words.next()) else { continue };
        let Some(key) = key.strip_suffix(':') else {
            is_ours = line.ends_with(path(file));
            continue;
        };
        if !is_ours {
            continue;
        }
        let value = value.and_then(|value| value.parse().ok()).unwrap_or(0);
        match key {
            "Shared_Clean" | "Private_Clean" => mapped.clean += value,
            "Shared_Dirty" | "Private_Dirty" => mapped.dirty += value,
            "Pss" => part += value,
            "Pss_Dirty" => part_dirty += value,
            _ => {}
        }
    }
    mapped.clean_part = part - part_dirty;
    mapped
}

/// The same guest on a memory file of its own, mapped shared: what it changes is in that file, and no
/// dump is needed to commit it. It sleeps twice, and wakes from that.
fn owns_its_memory(
    home: &Home,
    mounted: &Mounted,
    assets: &Assets,
    config: &dyn Fn(PathBuf, MemoryMapping, &str) -> Config,
) {
    home.ok(&["disk", "create", "own/root", "--from", "vm@2:root"]);
    home.ok(&["disk", "create", "own", "--from", "vm@2:memory"]);
    let memory = mounted.path("live/own/memory");
    let mut state = mounted.path("vm/2/state/vmstate");
    let mut stopped_at = 0;
    for round in 0..2 {
        let shared = config(memory.clone(), MemoryMapping::Shared, "own");
        let mut guest = Guest::restore(assets, &shared, &state).unwrap();
        assert!(guest.wait_counter().unwrap() > stopped_at, "it began anew");
        let note = format!("echo {round} >> /mnt/notes; cat /mnt/notes | tee /root/notes; sync");
        let notes: String = (0..=round).map(|round| format!("{round}\n")).collect();
        assert_eq!(guest.check(&note).unwrap(), notes);
        state = home.path(&format!("own-{round}"));
        guest.pause(&state).unwrap();
        stopped_at = guest.counter().unwrap();
        // While the VMM is there: nobody asks it to write its memory back.
        let state = format!("vmstate={}", path(&state));
        let committed = home.json(&["commit", "own", "--live", "own", "--state", &state]);
        let changed = committed["figures"]["changed_bytes"].as_u64().unwrap();
        assert!(changed < 64 << 20, "{changed} of 256 MiB changed");
        guest.kill().unwrap();
    }
    home.ok(&["disk", "create", "heir", "--from", "own@2:root"]);
    let heir = config(mounted.path("own/2/memory"), MemoryMapping::Private, "heir");
    let state = mounted.path("own/2/state/vmstate");
    let mut guest = Guest::restore(assets, &heir, &state).unwrap();
    assert!(guest.wait_counter().unwrap() > stopped_at, "it began anew");
    assert_eq!(guest.check("cat /mnt/notes /root/notes").unwrap(), "0\n1\n0\n1\n");
}

/// KiB of a file in the page cache.
fn cached(file: &Path) -> u64 {
    let text = run("fincore", &["--bytes", "--noheadings", "--output", "RES", path(file)]);
    text.trim().parse::<u64>().unwrap() / 1024
}

#[test]
fn a_guest_wakes_from_the_tree_ten_times_and_clean_pages_exist_once() {
    let assets = Assets::prepare(&cache_dir(), &mut |_| {}).unwrap();
    let home = Home::with_store();
    home.ok(&["commit", "base", "--disk", path(&assets.disk())]);
    let mounted = Mounted::start(&home);
    home.ok(&["disk", "create", "source", "--from", "base:root"]);
    let config = |memory: PathBuf, mapping, live: &str| Config {
        memory_mib: 256,
        memory,
        mapping,
        disk: Disk::File(mounted.path(&format!("live/{live}/disk/root"))),
        ..Config::in_dir(&home.path("."))
    };
    let source = config(home.path("ram"), MemoryMapping::Shared, "source");
    let mut guest = Guest::boot(&assets, &source).unwrap();
    guest.check("mount -t tmpfs tmp /mnt && head -c 3000000 /dev/urandom > /mnt/note").unwrap();
    let sum = guest.check("cat /mnt/note > /root/note; sync; sha256sum < /mnt/note").unwrap();
    guest.pause(&home.path("state")).unwrap();
    let stopped_at = guest.counter().unwrap();
    guest.kill().unwrap();
    // Disk, memory and state of one moment.
    home.ok(&["disk", "commit", "source", "vm", "--parent", "none"]);
    home.ok(&["commit", "vm", "--memory", "ram", "--state", "state"]);
    let memory = mounted.path("vm/2/memory");
    let before = home.run(&["cat", "vm@2:memory"]).stdout;

    let mut forks = Vec::new();
    for number in 0..FORKS {
        let live = format!("fork-{number}");
        home.ok(&["disk", "create", &live, "--from", "vm@2:root"]);
        let fork = config(memory.clone(), MemoryMapping::Private, &live);
        let state = mounted.path("vm/2/state/vmstate");
        forks.push(Guest::restore(&assets, &fork, &state).unwrap());
    }
    for (number, fork) in forks.iter_mut().enumerate() {
        let goes_on_at = fork.wait_counter().unwrap();
        assert!(goes_on_at > stopped_at, "fork {number} began anew");
        assert_eq!(fork.check("sha256sum < /mnt/note").unwrap(), sum, "fork {number}");
        let own = format!("echo {number} | tee /mnt/own > /root/own; sync; sha256sum < /root/note");
        assert_eq!(fork.check(&own).unwrap(), sum, "fork {number}");
    }
    for (number, fork) in forks.iter_mut().enumerate() {
        let own = fork.check("cat /mnt/own /root/own").unwrap();
        assert_eq!(own, format!("{number}\n{number}\n"), "each goes its own way");
    }
    let each: Vec<Mapped> = forks.iter().map(|fork| mapped(fork.pid(), &memory)).collect();
    let (clean, part) =
        each.iter().fold((0, 0), |(clean, part), one| (clean + one.clean, part + one.clean_part));
    let cached = cached(&memory);
    assert!(each.iter().all(|one| one.clean > 4 << 10 && one.dirty > 1 << 10), "{each:?}");
    assert!(clean > 2 * cached, "{FORKS} forks see {clean} KiB of {cached} KiB");
    assert!(part <= cached + cached / 10, "{part} KiB for {cached} KiB that exist: {each:?}");
    assert!(cached < 200 << 10, "a wake does not read all of the memory: {cached} KiB");
    drop(forks);
    assert!(fs::read(&memory).unwrap() == before, "nobody changed the snapshot");
    owns_its_memory(&home, &mounted, &assets, &config);
    assert!(fs::read(&memory).unwrap() == before, "nobody changed the snapshot");
    mounted.terminate();
}
