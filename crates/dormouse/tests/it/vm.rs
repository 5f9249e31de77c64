//! VMs, whole: a real guest runs, sleeps, wakes, is forked, and its forks sleep.

use std::fs;
use std::process::Command;
use std::time::Duration;

use dormouse_testkit::guest::{Assets, Console, Machine, cache_dir, guest_for_run};
use serde_json::Value;

use crate::fixture::{Home, code, errors};
use crate::live_full::Tmpfs;
use crate::mounted::path;
use crate::vm_fixture::Vms;

impl Vms {
    /// Of real guests.
    pub(crate) fn new(machine: Machine) -> Vms {
        let assets = Assets::prepare(&cache_dir(), &mut |_| {}).unwrap();
        let home = Home::with_store();
        home.ok(&["commit", "base", "--disk", path(&assets.disk())]);
        let guest = guest_for_run(&assets, machine, 256, "base:root").unwrap();
        home.file("guest.json", guest.to_string().as_bytes());
        Vms { home }
    }

    pub(crate) fn console(&self, live: &str) -> Console {
        Console::connect(&self.folder(live).join("vmm/serial")).unwrap()
    }
}

#[test]
fn a_guest_sleeps_wakes_is_forked_and_its_forks_sleep() {
    let vms = Vms::new(Machine::Q35);
    let home = &vms.home;
    home.json(&["run", "guest.json", "box"]);
    let mut guest = vms.console("box");
    guest.wait_ready().unwrap();
    guest.check("mount -t tmpfs tmp /mnt && head -c 3000000 /dev/urandom > /mnt/note").unwrap();
    let sum = guest.check("cat /mnt/note > /root/note; sync; sha256sum < /mnt/note").unwrap();
    let stopped_at = guest.wait_counter().unwrap();
    let slept = home.json(&["sleep", "box", "--as", "vm"]);
    assert_eq!(slept["snapshot"], "vm@1");
    assert!(vms.state("box").is_none(), "it ended");
    assert!(!vms.folder("box").exists());

    let woken = home.json(&["wake", "vm", "--as", "box"]);
    assert_eq!(woken["over"], "vm@1");
    let mut guest = vms.console("box");
    let goes_on_at = guest.wait_counter().unwrap();
    assert!(goes_on_at > stopped_at && goes_on_at < stopped_at + 60, "{goes_on_at} {stopped_at}");
    assert_eq!(guest.check("sha256sum < /mnt/note").unwrap(), sum);
    assert_eq!(guest.check("sha256sum < /root/note").unwrap(), sum);
    guest.check("echo second | tee /mnt/second > /root/second; sync").unwrap();
    // It goes on, and is stored all the same. It need not wait for its memory to be copied: that was while
    // QEMU wrote its state.
    let said = home.run(&["-v", "-v", "--json", "sleep", "box", "--keep-running"]);
    assert!(errors(&said).contains("was_copied=true"), "{said:?}");
    let slept: Value = serde_json::from_slice(&said.stdout).unwrap();
    assert_eq!(slept["snapshot"], "vm@2");
    assert_eq!(slept["goes_on"], true);
    assert!(slept["frozen_seconds"].as_f64() <= slept["durable_seconds"].as_f64(), "{slept}");
    guest.wait_counter().unwrap();
    guest.check("rm /mnt/second /root/second; sync").unwrap();
    let state = vms.state("box").unwrap();
    assert_eq!((&state["state"], &state["over"]), (&"awake".into(), &"vm@2".into()));

    let forks = home.json(&["fork", "vm@2", "one", "two"]);
    assert_eq!(forks["forks"].as_array().unwrap().len(), 2);
    for live in ["one", "two"] {
        let mut fork = vms.console(live);
        fork.wait_counter().unwrap();
        assert_eq!(fork.check("cat /mnt/second /root/second").unwrap(), "second\nsecond\n");
        fork.check(&format!("echo {live} | tee /mnt/own > /root/own; sync")).unwrap();
    }
    for live in ["one", "two"] {
        let slept = home.json(&["sleep", live, "--as", live]);
        assert_eq!(slept["snapshot"], format!("{live}@1"));
    }
    // A grandchild, with both what it had and what it did not.
    home.ok(&["wake", "two"]);
    let mut grandchild = vms.console("two");
    grandchild.wait_counter().unwrap();
    assert_eq!(grandchild.check("cat /mnt/own /root/own").unwrap(), "two\ntwo\n");
    assert_eq!(grandchild.check("sha256sum < /mnt/note").unwrap(), sum);
    home.ok(&["kill", "two"]);
    home.ok(&["kill", "box"]);
    assert!(vms.state("box").is_none());
    let left: Vec<_> = fs::read_dir(home.store().join("live")).unwrap().collect();
    assert_eq!(left.len(), 1, "the data plane alone: {left:?}");
    home.ok(&["verify", "--deep"]);
    home.fails(code::NOT_FOUND, &["sleep", "box"]);
    home.fails(code::NOT_FOUND, &["kill", "box"]);
}

/// The process that serves disks and memory is killed with the guest at work: another one is started
/// without anybody's doing, goes on with what was there, and the guest sees nothing but a pause.
#[test]
fn a_guest_outlives_its_data_plane() {
    let vms = Vms::new(Machine::Q35);
    let home = &vms.home;
    home.ok(&["run", "guest.json", "box"]);
    let mut guest = vms.console("box");
    guest.wait_ready().unwrap();
    let sum =
        guest.check("head -c 3000000 /dev/urandom > /root/note; sha256sum < /root/note").unwrap();
    // Not synced: what the server had answered is not lost with it.
    vms.kill_plane();
    home.ok(&["sleep", "box", "--as", "vm"]);
    home.ok(&["wake", "vm", "--as", "box"]);
    let mut guest = vms.console("box");
    guest.wait_counter().unwrap();
    for _ in 0..3 {
        vms.kill_plane();
        guest.check("echo 3 > /proc/sys/vm/drop_caches").unwrap();
        assert_eq!(guest.check("sha256sum < /root/note").unwrap(), sum);
    }
    // Whatever is done next may start it, too; this does nothing.
    vms.kill_plane();
    home.fails(code::NOT_FOUND, &["sleep", "nobody"]);
    guest.check("echo 3 > /proc/sys/vm/drop_caches").unwrap();
    assert_eq!(guest.check("sha256sum < /root/note").unwrap(), sum);
    guest.check("echo more > /root/more; sync").unwrap();
    home.ok(&["sleep", "box"]);
    home.ok(&["wake", "vm@2", "--as", "box"]);
    let mut guest = vms.console("box");
    guest.wait_counter().unwrap();
    assert_eq!(
        guest.check("cat /root/more; sha256sum < /root/note").unwrap(),
        format!("more\n{sum}")
    );
}

/// Whoever wakes or stores a VM is killed at any moment: the VM is as it was, or there is a snapshot of
/// it; nothing else is left.
#[test]
fn a_guest_outlives_whoever_stores_it_and_nothing_is_left_of_one_that_did_not_wake() {
    let vms = Vms::new(Machine::Q35);
    let home = &vms.home;
    home.ok(&["run", "guest.json", "box"]);
    let mut guest = vms.console("box");
    guest.wait_ready().unwrap();
    guest.check("mount -t tmpfs tmp /mnt; echo 0 > /mnt/round").unwrap();
    home.ok(&["sleep", "box", "--as", "vm"]);
    home.ok(&["wake", "vm", "--as", "box"]);
    let mut guest = vms.console("box");
    for round in 0..12 {
        guest.check(&format!("echo {round} | tee /mnt/round > /root/round; sync")).unwrap();
        let delay = Duration::from_millis(40 * round);
        vms.kill_after(&["sleep", "box", "--as", "vm", "--keep-running"], delay, || {});
        // The next command brings it to rest, and another sleep is one like any other.
        let said = vms.at_rest();
        let state = vms.state("box").unwrap();
        assert_eq!(state["state"], "awake", "round {round}: {said}");
        assert_eq!(
            guest.check("cat /mnt/round /root/round").unwrap(),
            format!("{round}\n{round}\n")
        );
        let newest = home.json(&["sleep", "box", "--as", "vm", "--keep-running"]);
        let newest = newest["snapshot"].as_str().unwrap().to_owned();

        vms.kill_after(&["wake", &newest, "--as", "fork"], delay, || {});
        vms.at_rest();
        match vms.state("fork") {
            None => {
                assert!(!vms.folder("fork").exists(), "round {round}");
                assert!(vms.processes_of("fork").is_empty(), "round {round}");
            }
            Some(state) => {
                assert_eq!(state["state"], "awake", "round {round}");
                let mut fork = vms.console("fork");
                fork.wait_counter().unwrap();
                let told = fork.check("cat /mnt/round /root/round").unwrap();
                assert_eq!(told, format!("{round}\n{round}\n"));
                home.ok(&["kill", "fork"]);
            }
        }
    }
    vms.nothing_is_left();
}

/// Thirty generations of one guest, every third through a wake, with what each wrote; then its last is
/// forked, and a grandchild of that has all of it. A process in the guest holds a pattern in its memory
/// and looks at it all the time.
#[test]
fn a_grandchild_at_generation_thirty_has_what_each_generation_wrote() {
    let vms = Vms::new(Machine::Q35);
    let home = &vms.home;
    home.ok(&["run", "guest.json", "box"]);
    let mut guest = vms.console("box");
    guest.wait_ready().unwrap();
    guest.check("mount -t tmpfs tmp /mnt; mkdir /root/log").unwrap();
    let hold = "(v=$(head -c 100000 /dev/urandom | od -x); s=$(echo \"$v\" | sha256sum); \
                while sleep 0.1; do if [ \"$(echo \"$v\" | sha256sum)\" = \"$s\" ]; \
                then echo good >> /mnt/held; else echo bad >> /mnt/held; fi; done) > /dev/null 2>&1 &";
    guest.check(hold).unwrap();
    for generation in 1..=30 {
        let note =
            format!("head -c 40000 /dev/urandom | tee /mnt/{generation} > /root/log/{generation}");
        guest.check(&note).unwrap();
        if generation % 3 > 0 {
            guest.check("sync").unwrap();
            home.ok(&["sleep", "box", "--as", "vm", "--keep-running"]);
        } else {
            home.ok(&["sleep", "box", "--as", "vm"]);
            home.ok(&["wake", "vm", "--as", "box"]);
            guest = vms.console("box");
            guest.wait_counter().unwrap();
        }
    }
    let sums = guest.check("cd /mnt && sha256sum $(seq 30)").unwrap();
    home.ok(&["kill", "box"]);
    home.json(&["fork", "vm@30", "one"]);
    vms.console("one").wait_counter().unwrap();
    home.ok(&["sleep", "one", "--as", "child"]);
    home.json(&["fork", "child@1", "two"]);
    vms.console("two").wait_counter().unwrap();
    home.ok(&["sleep", "two", "--as", "grandchild"]);
    home.ok(&["wake", "grandchild", "--as", "last"]);
    let mut last = vms.console("last");
    last.wait_counter().unwrap();
    last.check("echo 3 > /proc/sys/vm/drop_caches").unwrap();
    for folder in ["/mnt", "/root/log"] {
        let seen = last.check(&format!("cd {folder} && sha256sum $(seq 30)")).unwrap();
        assert_eq!(seen, sums, "{folder}");
    }
    let before: u32 = last.check("wc -l < /mnt/held").unwrap().trim().parse().unwrap();
    last.check("sleep 1").unwrap();
    let after: u32 = last.check("wc -l < /mnt/held").unwrap().trim().parse().unwrap();
    assert!(after > before, "the process goes on");
    assert_eq!(last.check("grep -c bad /mnt/held || true").unwrap().trim(), "0");
}

/// The host's file system fills under a guest, which QEMU stops then; there is room again: the guest sleeps,
/// and what it wrote is right. It could neither sleep nor go on.
#[test]
fn a_guest_that_found_no_room_goes_on_when_there_is() {
    let vms = Vms::new(Machine::Q35);
    let home = &vms.home;
    home.json(&["run", "guest.json", "box"]);
    let guest = vms.console("box");
    guest.wait_ready().unwrap();
    home.ok(&["sleep", "box", "--as", "vm"]);
    drop(guest);
    let live = home.store().join("live");
    let unmounted = Command::new("umount").arg(live.join(".plane/files")).status().unwrap();
    assert!(unmounted.success());
    let room = Tmpfs::mount(&live, 16);
    home.ok(&["wake", "vm", "--as", "box"]);
    let mut guest = vms.console("box");
    guest.check("true").unwrap();
    let writes = "head -c 24000000 /dev/urandom > /root/note; sync; sha256sum < /root/note";
    let writing = std::thread::spawn(move || (guest.check(writes), guest));
    // It stops within these, or before the sleep that finds no room either.
    std::thread::sleep(Duration::from_secs(4));
    // Stored or not, it goes on, and waits for room.
    let said = home.run(&["sleep", "box", "--as", "vm", "--keep-running"]);
    assert_eq!(vms.word("box").as_deref(), Some("awake"), "{said:?}");
    assert!(!writing.is_finished(), "there was room: {said:?}");
    room.resize(200);
    home.ok(&["sleep", "box", "--as", "vm", "--keep-running"]);
    let (sum, guest) = writing.join().unwrap();
    let sum = sum.unwrap();
    drop(guest);
    home.ok(&["sleep", "box", "--as", "vm"]);
    home.ok(&["wake", "vm", "--as", "box"]);
    let mut guest = vms.console("box");
    let again = guest.check("echo 3 > /proc/sys/vm/drop_caches; sha256sum < /root/note").unwrap();
    assert_eq!(again, sum);
    home.ok(&["kill", "box"]);
    let _ = Command::new("umount").arg(live.join(".plane/files")).status();
}
