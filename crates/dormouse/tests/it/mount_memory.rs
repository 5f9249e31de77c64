//! Memory that a VMM maps out of a mount: privately, and what the guest changed is found in its page
//! tables; or shared, and it is written back; what it touches first is noted.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::FileExt;
use std::process::{Command, Stdio};

use dormouse_testkit::vmm::{Backing, Config, SmallVmm};

use crate::fixture::{Home, code};
use crate::memory_fixture::{PAGES, SEED, with_snapshot};
use crate::mounted::{Mounted, path, run, wait_for};

#[test]
fn what_a_guest_changed_is_committed_out_of_its_page_tables() {
    let home = with_snapshot();
    let mounted = Mounted::start(&home);
    let backing = Backing::PrivateFile(mounted.path("vm/1/memory"));
    let config = Config::small(SEED, PAGES, backing);
    // Once more, with the borders of the VMM's regions.
    commit_with_layout(&home, &config);
    home.ok(&["rm", "vm@1"]);
    let config = Config { backing: Backing::PrivateFile(mounted.path("vm/2/memory")), ..config };
    let mut vmm = SmallVmm::spawn(&config).unwrap();
    let pid = vmm.pid().to_string();
    for number in 3..6 {
        vmm.run(3_000).unwrap();
        vmm.pause().unwrap();
        // Always over the snapshot that it maps, whatever was committed since.
        let committed = home.json(&[
            "commit",
            "vm",
            "--parent",
            "vm@2",
            "--memory-of",
            &pid,
            "--state",
            "state",
        ]);
        vmm.write_expected(&home.path("expected")).unwrap();
        vmm.resume().unwrap();
        assert_eq!(committed["snapshot"], format!("vm@{number}"));
        home.ok(&["export", &format!("vm@{number}:memory"), "got", "--force"]);
        assert!(
            fs::read(home.path("got")).unwrap() == fs::read(home.path("expected")).unwrap(),
            "vm@{number}"
        );
    }
    assert!(fs::read(mounted.path("vm/2/memory")).unwrap() == fs::read(home.path("mem")).unwrap());
    let other = home.fails(
        code::NOT_FOUND,
        &["commit", "vm", "--parent", "vm@3", "--memory-of", &pid, "--state", "state"],
    );
    assert!(other.contains("does not map vm/3/memory"), "{other}");
    home.fails(code::USAGE, &["commit", "vm", "--memory-of", &pid]);
    vmm.quit().unwrap();
    mounted.terminate();
}

/// Commits the memory of the fixture with the borders of a VMM's regions.
pub(crate) fn commit_with_layout(home: &Home, config: &Config) {
    let mut at = 0;
    let rows: Vec<_> = config
        .regions
        .iter()
        .map(|region| {
            let length = region.pages * 4096;
            at += length;
            serde_json::json!({ "image_offset": at - length, "length": length })
        })
        .collect();
    home.file("layout", serde_json::to_string(&rows).unwrap().as_bytes());
    home.ok(&["commit", "vm", "--memory", "mem", "--state", "state", "--memory-layout", "layout"]);
}

#[test]
fn a_snapshot_of_another_store_is_not_taken_for_ours() {
    let (ours, theirs) = (with_snapshot(), with_snapshot());
    let mounted = Mounted::start(&theirs);
    let backing = Backing::PrivateFile(mounted.path("vm/1/memory"));
    let vmm = SmallVmm::spawn(&Config::small(SEED, PAGES, backing)).unwrap();
    let pid = vmm.pid().to_string();
    let refused =
        ours.fails(code::REFUSED, &["commit", "vm", "--parent", "vm@1", "--memory-of", &pid]);
    assert!(refused.contains("another snapshot"), "{refused}");
    vmm.quit().unwrap();
    mounted.terminate();
}

/// Pages that a guest lacked are in the trace of its snapshot, whoever copies the file notes nothing.
#[test]
fn what_a_guest_touches_of_the_file_is_noted_for_the_next() {
    let home = with_snapshot();
    let mounted = Mounted::start(&home);
    let place = mounted.path("vm/1/memory");
    run("cmp", &[path(&place), path(&home.path("mem"))]);
    let file = File::open(&place).unwrap();
    rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::Random).unwrap();
    rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).unwrap();
    drop(file);
    let file = File::open(&place).unwrap();
    rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::Random).unwrap();
    for page in [900, 17, 400] {
        file.read_exact_at(&mut [0; 4096], page * 4096).unwrap();
    }
    drop(file);
    wait_for("the trace", || home.run(&["trace", "show", "vm"]).status.success());
    let trace = home.json(&["trace", "show", "vm"]);
    let page = |page: u64| serde_json::json!({ "offset": page * 4096, "length": 4096 });
    assert_eq!(trace["runs"], serde_json::json!([page(900), page(17), page(400)]), "{trace}");
    assert_eq!(trace["wakes"][0]["kind"], "misses", "what was cached is not seen");
    mounted.terminate();
}

/// A VMM that must own its memory file (QEMU `share=on`): what it changed through a shared mapping is
/// committed, page by page, without its having to say so.
#[test]
fn a_memory_file_is_mapped_shared_and_committed() {
    let home = with_snapshot();
    home.ok(&["disk", "create", "box", "--from", "vm:memory"]);
    home.fails(code::USAGE, &["disk", "create", "b", "--from", "vm:memory", "--size", "1GiB"]);
    let mounted = Mounted::start(&home);
    let place = mounted.path("live/box/memory");
    assert!(!mounted.path("live/box/disk/memory").exists());
    assert!(fs::read(&place).unwrap() == fs::read(home.path("mem")).unwrap());
    let mut child = Command::new("python3")
        .args(["-c", SHARED])
        .arg(&place)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut said = BufReader::new(child.stdout.take().unwrap()).lines();
    let mut ask = child.stdin.take().unwrap();
    let mut expected = fs::read(home.path("mem")).unwrap();
    for number in 2..5_u8 {
        writeln!(ask, "{number}").unwrap();
        assert_eq!(said.next().unwrap().unwrap(), "done");
        for page in [3, 77 * usize::from(number), 500] {
            expected[page * 4096 + 5..][..4].fill(number);
        }
        let committed = home.json(&["commit", "vm", "--live", "box", "--state", "state"]);
        assert_eq!(committed["snapshot"], format!("vm@{number}"));
        // Three pages, whatever the kernel writes back around them.
        let new = committed["figures"]["new_bytes"].as_u64().unwrap();
        assert!(new <= 4 * 4096, "{new}");
        assert!(fs::read(mounted.path(&format!("vm/{number}/memory"))).unwrap() == expected);
    }
    drop(ask);
    assert!(child.wait().unwrap().success());
    let status = home.json(&["disk", "status", "box"]);
    assert_eq!(status["disks"][0]["base"], "vm@4:memory");
    assert!(fs::read(&place).unwrap() == expected);
    mounted.terminate();
    home.ok(&["verify", "--deep"]);
}

/// Changes three pages through a shared mapping each time it is told a number.
const SHARED: &str = "import mmap,os,sys\n\
    f=os.open(sys.argv[1],os.O_RDWR)\nm=mmap.mmap(f,0)\n\
    for line in sys.stdin:\n n=int(line)\n\
    \x20for page in (3,77*n,500): m[page*4096+5:page*4096+9]=bytes([n])*4\n\
    \x20print('done',flush=True)";
