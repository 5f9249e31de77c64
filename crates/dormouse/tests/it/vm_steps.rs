//! Whoever does something to a VM is killed at one step after the other, and not at some moment: at each
//! call to the kernel that changes something, which `strace` counts, and at each call to the VMM, which
//! does not answer. And what a VM relies on is durable before its guest goes on.

use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use dormouse_testkit::double::{Action, Program, Rule};
use serde_json::json;

use crate::mounted::path;
use crate::vm_fixture::Vms;

/// What changes something that others see, or may: files, processes, what is said to a VMM or the data
/// plane, and what is heard.
const CHANGES: &str = "openat,rename,renameat,renameat2,unlink,unlinkat,rmdir,mkdir,mkdirat,symlink,\
                       symlinkat,link,linkat,write,fsync,fdatasync,ftruncate,flock,connect,sendto,sendmsg,\
                       recvfrom,recvmsg,clone3,vfork";

/// The command, watched by `strace`, which lets go of whatever it starts.
fn watched(vms: &Vms, options: &[&str], arguments: &[&str]) -> Command {
    let mut command = Command::new("strace");
    command
        .current_dir(vms.home.path("."))
        .env_remove("DORMOUSE_STORE")
        .args(["-f", "-qqq", "-b", "execve", "--seccomp-bpf"])
        .args(options)
        .arg(env!("CARGO_BIN_EXE_dormouse"))
        .args(arguments)
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    command
}

/// Runs a command that is killed at the `number`th change that one of its threads is about to make; how it
/// ended.
fn killed_at(vms: &Vms, number: usize, arguments: &[&str]) -> ExitStatus {
    let inject = format!("inject={CHANGES}:signal=KILL:when={number}");
    let trace = format!("trace={CHANGES}");
    watched(vms, &["-o", "/dev/null", "-e", &trace, "-e", &inject], arguments).status().unwrap()
}

/// A Firecracker whose guest sleeps as `vm`.
fn asleep() -> Vms {
    let vms = Vms::of_doubles(&Program::firecracker("1.13.1"), "firecracker");
    vms.home.ok(&["run", "guest.json", "box"]);
    vms.home.ok(&["sleep", "box", "--as", "vm"]);
    vms
}

/// The same, awake again as `box`.
fn woken() -> Vms {
    let vms = asleep();
    vms.home.ok(&["wake", "vm", "--as", "box"]);
    vms
}

impl Vms {
    /// A sleep that somebody was killed at: the VM goes on, over the snapshot if there is one, and no trace
    /// of it is left; or it is gone, and there is one. Whether there is one.
    fn is_whole(&self, before: usize, may_end: bool, what: &str) -> bool {
        let said = self.at_rest();
        let all = self.home.snapshots();
        let is_stored = all.len() > before;
        assert!(all.len() <= before + 1, "{what}: {all:?}");
        match self.state("box") {
            Some(vm) => {
                assert_eq!(vm["state"], "awake", "{what}: {said}");
                assert!(!(is_stored && may_end), "{what}: it is stored, and was to end");
                let newest = all.last().unwrap();
                assert_eq!(vm["over"] == newest.as_str(), is_stored || before > 0, "{what}: {vm}");
            }
            None => {
                assert!(is_stored && may_end, "{what}: it is gone: {said}");
                assert!(!self.folder("box").exists(), "{what}");
                assert!(self.processes_of("box").is_empty(), "{what}");
                self.home.ok(&["wake", all.last().unwrap(), "--as", "box"]);
            }
        }
        for left in ["vmm/save", "vmm/offload"] {
            assert!(!self.folder("box").join(left).exists(), "{what}: {left} is left");
        }
        self.work("box");
        is_stored
    }

    /// A wake that somebody was killed at: there is a VM that is right, or nothing. Whether there is one.
    fn woke_or_not(&self, what: &str) -> bool {
        let said = self.at_rest();
        match self.word("fork").as_deref() {
            Some("awake") => {
                self.work("fork");
                self.home.ok(&["kill", "fork"]);
                true
            }
            None => {
                assert!(!self.folder("fork").exists(), "{what}: {said}");
                self.wait_for_ends("fork", what);
                false
            }
            other => panic!("{what}: {other:?}: {said}"),
        }
    }
}

/// Kills the command at each of its changes in turn, until it gets through.
fn at_each_change(vms: &Vms, arguments: &[&str], mut look: impl FnMut(&str)) -> usize {
    for number in 1.. {
        let status = killed_at(vms, number, arguments);
        let what = format!("{arguments:?} killed at change {number}");
        look(&what);
        if status.success() {
            return number - 1;
        }
        assert_eq!(status.signal(), Some(9), "{what}: {status:?}");
    }
    unreachable!("a command makes finitely many changes");
}

#[test]
fn a_sleep_that_is_killed_before_any_of_its_changes_costs_nothing() {
    let vms = woken();
    let home = &vms.home;
    for goes_on in [true, false] {
        let mut arguments = vec!["sleep", "box", "--as", "vm"];
        arguments.extend(goes_on.then_some("--keep-running"));
        let (mut before, mut seen) = (home.snapshots().len(), [0; 2]);
        let killed = at_each_change(&vms, &arguments, |what| {
            let is_stored = vms.is_whole(before, !goes_on, what);
            before += usize::from(is_stored);
            seen[usize::from(is_stored)] += 1;
        });
        println!("{arguments:?}: {killed} changes; not stored, stored: {seen:?}");
        assert!(killed >= 20 && seen.iter().all(|count| *count > 0), "{killed} {seen:?}");
    }
    vms.nothing_is_left();
}

#[test]
fn a_wake_that_is_killed_before_any_of_its_changes_leaves_nothing() {
    for backend in ["file", "uffd"] {
        let vms = Vms::of_doubles(&Program::firecracker("1.13.1"), "firecracker");
        let home = &vms.home;
        vms.change_guest("guest.json", |guest| guest["memory_backend"] = json!(backend));
        home.ok(&["run", "guest.json", "box"]);
        home.ok(&["sleep", "box", "--as", "vm"]);
        let mut seen = [0; 2];
        let killed = at_each_change(&vms, &["wake", "vm", "--as", "fork"], |what| {
            seen[usize::from(vms.woke_or_not(what))] += 1;
        });
        println!("{backend}: {killed} changes; not awake, awake: {seen:?}");
        assert!(killed >= 20 && seen.iter().all(|count| *count > 0), "{killed} {seen:?}");
        vms.nothing_is_left();
    }
}

fn start(vms: &Vms, arguments: &[&str]) -> Child {
    let mut command = Command::new(env!("CARGO_BIN_EXE_dormouse"));
    command.current_dir(vms.home.path(".")).env_remove("DORMOUSE_STORE").args(arguments);
    command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap()
}

/// Kills a command that waits for a VMM.
fn kill_waiting(mut child: Child, what: &str) {
    std::thread::sleep(Duration::from_millis(800));
    assert!(child.try_wait().unwrap().is_none(), "{what}: it does not wait");
    child.kill().unwrap();
    child.wait().unwrap();
}

fn rule(call: &str, skip: u32, action: Action) -> Rule {
    Rule { call: call.to_owned(), skip, times: Some(1), action }
}

/// What a sleep asks of a Firecracker: the second change of its state lets the guest go on.
const CALLS: [(&str, u32); 3] = [("PATCH /vm", 0), ("PUT /snapshot/create", 0), ("PATCH /vm", 1)];

/// Whoever stores a VM is killed while the VMM has not answered one of its calls, carried out or not; the
/// next sleep is one like any other.
#[test]
fn a_sleep_that_is_killed_at_any_call_of_its_vmm_costs_nothing() {
    let vms = woken();
    let home = &vms.home;
    for (call, skip) in CALLS {
        for action in [Action::Hang, Action::HangAfter] {
            let what = format!("{call} {skip} {action:?}");
            let before = home.snapshots().len();
            vms.rules("box", &[rule(call, skip, action)]);
            let child = start(&vms, &["sleep", "box", "--as", "vm", "--keep-running"]);
            kill_waiting(child, &what);
            let is_stored = vms.is_whole(before, false, &what);
            assert_eq!(is_stored, skip == 1, "{what}");
            home.ok(&["sleep", "box", "--as", "vm", "--keep-running"]);
            vms.work("box");
        }
    }
    vms.nothing_is_left();
}

/// Nobody comes after whoever is killed, and there is no daemon: the guest that it paused goes on by
/// itself, and of the VM that it was about to wake nothing is left.
#[test]
fn what_a_killed_command_leaves_is_undone_with_no_other_command() {
    let vms = woken();
    let home = &vms.home;
    let wait_for = |what: &str, is_so: &dyn Fn() -> bool| {
        let begun = Instant::now();
        while !is_so() {
            assert!(begun.elapsed() < Duration::from_secs(20), "{what}: {:?}", vms.state("box"));
            std::thread::sleep(Duration::from_millis(20));
        }
    };
    for (call, skip) in CALLS {
        let before = home.snapshots().len();
        vms.rules("box", &[rule(call, skip, Action::HangAfter)]);
        let child = start(&vms, &["sleep", "box", "--as", "vm", "--keep-running"]);
        kill_waiting(child, call);
        // Looking mends nothing.
        wait_for(call, &|| vms.word("box").as_deref() == Some("awake"));
        assert_eq!(home.snapshots().len() - before, usize::from(skip == 1), "{call} {skip}");
        vms.work("box");
    }
    let folder = home.path("bad");
    fs::create_dir_all(&folder).unwrap();
    let bad = Program::firecracker("1.13.1").rule(rule("PUT /snapshot/load", 0, Action::Hang));
    let program = bad.install(&folder).unwrap();
    kill_waiting(start(&vms, &["wake", "vm", "--as", "fork", "--vmm", path(&program)]), "wake");
    wait_for("wake", &|| !vms.folder("fork").exists());
    vms.wait_for_ends("fork", "wake");
    vms.nothing_is_left();
}

/// The same of a Cloud Hypervisor that hands its guest over: the socket that it was to come to is in
/// nobody's way.
#[test]
fn a_sleep_that_is_killed_while_a_guest_is_handed_over_costs_nothing() {
    let vms = Vms::of_doubles(&Program::cloud_hypervisor("54.0"), "cloud-hypervisor");
    let home = &vms.home;
    vms.change_guest("guest.json", |guest| guest["launch"]["transfer"] = json!("descriptors"));
    home.ok(&["run", "guest.json", "box"]);
    home.ok(&["sleep", "box", "--as", "vm"]);
    home.ok(&["wake", "vm", "--as", "box"]);
    for call in ["PUT /api/v1/vm.pause", "PUT /api/v1/vm.send-migration"] {
        vms.work("box");
        vms.rules("box", &[rule(call, 0, Action::Hang)]);
        let child = start(&vms, &["sleep", "box", "--as", "vm"]);
        kill_waiting(child, call);
        vms.at_rest();
        assert_eq!(vms.word("box").as_deref(), Some("awake"), "{call}");
        vms.work("box");
        home.ok(&["sleep", "box", "--as", "vm"]);
        home.ok(&["wake", "vm", "--as", "box"]);
    }
    vms.work("box");
    vms.nothing_is_left();
}

/// The data plane is killed while the VMM is at one of a sleep's calls: that sleep is done or comes to
/// nothing, and the next one is done.
#[test]
fn a_data_plane_that_is_killed_at_any_call_of_a_sleep_costs_that_sleep_alone() {
    let vms = woken();
    let home = &vms.home;
    for (call, skip) in CALLS {
        let what = format!("{call} {skip}");
        let before = home.snapshots().len();
        vms.rules("box", &[rule(call, skip, Action::Slow(1500))]);
        let mut child = start(&vms, &["sleep", "box", "--as", "vm", "--keep-running"]);
        std::thread::sleep(Duration::from_millis(700));
        vms.kill_plane();
        let status = child.wait().unwrap();
        let is_stored = vms.is_whole(before, false, &what);
        // Once it is sealed the data plane's death may find it stored, or not.
        assert!(is_stored || !status.success(), "{what}: {status:?}");
        home.ok(&["sleep", "box", "--as", "vm", "--keep-running"]);
        vms.work("box");
    }
    vms.nothing_is_left();
}

/// Whoever wakes a VM is killed while the VMM has not answered one of its calls: nothing is left of it.
#[test]
fn a_wake_that_is_killed_at_any_call_of_its_vmm_leaves_nothing() {
    let vms = asleep();
    let home = &vms.home;
    let folder = home.path("bad");
    fs::create_dir_all(&folder).unwrap();
    for call in ["GET /", "PUT /snapshot/load", "PATCH /drives", "PATCH /vm"] {
        for action in [Action::Hang, Action::HangAfter] {
            let what = format!("{call} {action:?}");
            let bad = Program::firecracker("1.13.1").rule(rule(call, 0, action));
            let program = bad.install(&folder).unwrap();
            let child = start(&vms, &["wake", "vm", "--as", "fork", "--vmm", path(&program)]);
            kill_waiting(child, &what);
            assert!(!vms.woke_or_not(&what), "{what}: nobody was told that it is awake");
        }
    }
    vms.nothing_is_left();
}

/// A VMM that does not let its guest go on once that is stored: the snapshot is there, and is right; the VM
/// goes on if it can, and else says why it does not.
#[test]
fn a_vmm_that_fails_when_its_guest_is_to_go_on_costs_no_snapshot() {
    let vms = asleep();
    let home = &vms.home;
    let refuse = || Action::Refuse(400, "{\"fault_message\":\"no\"}".to_owned());
    for (action, times, goes_on) in [
        (refuse(), Some(1), true),
        (refuse(), Some(2), true),
        (refuse(), None, false),
        (Action::Close, Some(1), true),
        (Action::Garbage, Some(1), true),
        (Action::Die, Some(1), false),
        (Action::DieAfter, Some(1), false),
    ] {
        let what = format!("{action:?} {times:?}");
        home.ok(&["wake", "vm", "--as", "box"]);
        vms.work("box");
        let before = home.snapshots().len();
        vms.rules("box", &[Rule { times, ..rule("PATCH /vm", 1, action) }]);
        let said = home.run(&["sleep", "box", "--as", "vm", "--keep-running"]);
        assert_eq!(home.snapshots().len(), before + 1, "{what}: {said:?}");
        assert_eq!(said.status.success(), goes_on, "{what}: {said:?}");
        let newest = home.snapshots().pop().unwrap();
        if goes_on {
            assert_eq!(vms.word("box").as_deref(), Some("awake"), "{what}: {said:?}");
            vms.work("box");
        } else {
            let said = String::from_utf8_lossy(&said.stderr).into_owned();
            assert!(said.contains(&format!("{newest} is stored, but")), "{what}: {said}");
            assert_eq!(vms.word("box").as_deref(), Some("failed"), "{what}: {said}");
        }
        home.ok(&["kill", "box"]);
        assert!(vms.processes_of("box").is_empty(), "{what}");
        home.ok(&["wake", &newest, "--as", "fork"]);
        vms.work("fork");
        home.ok(&["kill", "fork"]);
    }
    vms.nothing_is_left();
}

/// The calls of a command that write, sync and rename, one a line, with the names of what they are about.
fn told(vms: &Vms, arguments: &[&str]) -> Vec<String> {
    let log = vms.home.path("calls");
    let calls = "trace=fsync,fdatasync,rename,renameat,renameat2,write,writev,sendto,sendmsg";
    let options = ["-y", "-s", "300", "-o", path(&log), "-e", calls];
    let status = watched(vms, &options, arguments).status().unwrap();
    assert!(status.success(), "{arguments:?}: {status:?}");
    fs::read_to_string(log).unwrap().lines().map(str::to_owned).collect()
}

/// Where in `calls` a line has all of the words, from `from` on.
fn find(calls: &[String], from: usize, words: &[&str]) -> usize {
    let has_all = |line: &String| words.iter().all(|word| line.contains(word));
    let found = calls.iter().skip(from).position(has_all);
    from + found.unwrap_or_else(|| panic!("no {words:?} from line {from} on\n{}", calls.join("\n")))
}

/// Where something of a name that begins like this was synced, from `from` on: where that call returned.
fn synced(calls: &[String], from: usize, name: &str) -> usize {
    let at = find(calls, from, &["sync(", &format!("<{name}")]);
    let line = &calls[at];
    match (line.contains("<unfinished"), line.split_once(' ')) {
        (true, Some((thread, _))) => find(calls, at, &[&format!("{thread} "), "sync resumed"]),
        _ => at,
    }
}

/// Where a VM's record was put in its place durably: it was synced, and its folder after that.
fn published(calls: &[String], from: usize, folder: &str) -> usize {
    let renamed = find(calls, from, &["rename", &format!("<{folder}>, \"vm\")")]);
    // It has no name yet, or one that is hidden.
    let is_synced = ["#", ".dormouse-"].iter().any(|name| {
        let name = format!("<{folder}/{name}");
        calls[from..renamed].iter().any(|line| line.contains("sync(") && line.contains(&name))
    });
    assert!(is_synced, "the record has its name before it is synced\n{}", calls.join("\n"));
    synced(calls, renamed, &format!("{folder}>"))
}

/// What a power cut leaves is what guests and users were told: the disks of a VM, and what they lie over,
/// are durable before its guest goes on; that it is awake, before its command returns; that it falls
/// asleep, before it is paused.
#[test]
fn what_a_guest_or_a_user_is_told_is_durable_first() {
    let vms = asleep();
    let calls = told(&vms, &["wake", "vm", "--as", "box"]);
    let folder = fs::canonicalize(vms.folder("box")).unwrap();
    let goes_on = find(&calls, 0, &["PATCH /vm "]);
    let disk = folder.join("disk/root");
    let files = fs::read_dir(&disk).unwrap().map(|entry| entry.unwrap().path());
    let mut durable: Vec<_> = files.collect();
    assert!(durable.len() >= 3, "{durable:?}");
    let live = folder.parent().unwrap().to_owned();
    durable.extend([disk, folder.join("disk"), folder.join("pin"), folder.clone(), live]);
    for file in durable {
        let at = synced(&calls, 0, &format!("{}>", path(&file)));
        assert!(at < goes_on, "{}\n{}", file.display(), calls.join("\n"));
    }
    published(&calls, goes_on, path(&folder));

    let calls = told(&vms, &["sleep", "box", "--as", "vm", "--keep-running"]);
    let pauses = find(&calls, 0, &["PATCH /vm ", "Paused"]);
    assert!(published(&calls, 0, path(&folder)) < pauses, "{}", calls.join("\n"));
    let goes_on = find(&calls, pauses, &["PATCH /vm ", "Resumed"]);
    published(&calls, goes_on, path(&folder));
    vms.work("box");
    vms.nothing_is_left();
}
