//! Many real processes on one store: all at once, and killed at random moments.

use std::collections::BTreeMap;
use std::fs;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use crate::fixture::{Home, code};

/// Kills in all. Each process lives a few milliseconds at most.
const KILLS: u64 = 300;

fn spread(seed: u64) -> u64 {
    let mut z = seed.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// Bytes that say what they are: any two contents share some blocks and differ in others.
fn content(number: u64) -> Vec<u8> {
    (0..400_u64)
        .flat_map(|block| {
            let word = if block % 3 == 0 { spread(number * 1000 + block) } else { spread(block) };
            let word = if block % 7 == 0 { 0 } else { word };
            word.to_le_bytes().repeat(512)
        })
        .collect()
}

fn spawn(home: &Home, arguments: &[&str]) -> Child {
    Command::new(env!("CARGO_BIN_EXE_dormouse"))
        .current_dir(home.path("."))
        .env_remove("DORMOUSE_STORE")
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap()
}

/// Every listed snapshot reads as the content that its label names.
fn check_all(home: &Home) -> usize {
    let listing = home.json(&["ls"]);
    assert_eq!(listing["damaged"].as_array().map_or(0, Vec::len), 0, "{listing}");
    let rows = listing["snapshots"].as_array().unwrap();
    for row in rows {
        let snapshot = row["snapshot"].as_str().unwrap();
        let number: u64 = row["labels"]["content"].as_str().unwrap().parse().unwrap();
        let output = home.run(&["cat", &format!("{snapshot}:root")]);
        assert_eq!(output.status.code(), Some(code::OK), "{snapshot}");
        assert!(output.stdout == content(number), "{snapshot} is not content {number}");
    }
    rows.len()
}

/// Processes killed at random moments, several hundred times: whatever is listed afterwards is
/// whole, numbers only count up, and nothing is left that a collection does not take away.
#[test]
fn processes_killed_at_random_moments() {
    let home = Home::with_store();
    let files: Vec<String> = (0..8)
        .map(|number| {
            home.file(&format!("c{number}"), &content(number));
            format!("c{number}")
        })
        .collect();
    // How long the whole thing takes here, so that the kills fall all over it.
    let begun = Instant::now();
    home.ok(&["commit", "vm", "--disk", "c0", "--label", "content=0"]);
    let mut within = begun.elapsed();
    let mut killed = 0;
    let mut highest = 0;
    for round in 0..KILLS {
        let label = format!("content={}", round % 8);
        let commit = ["commit", "vm", "--disk", &files[(round % 8) as usize], "--label", &label];
        let arguments: &[&str] = match round % 6 {
            0..=3 => &commit,
            4 => &["gc"],
            _ => &["compact"],
        };
        let mut child = spawn(&home, arguments);
        let wait = u64::try_from(within.as_micros()).unwrap().max(1);
        thread::sleep(Duration::from_micros(spread(round) % wait));
        child.kill().unwrap();
        let was_killed = !child.wait().unwrap().success();
        killed += u64::from(was_killed);
        // The machine is now busy, now not; about half of the kills should come in time.
        within = if was_killed { within * 17 / 16 } else { within * 15 / 16 };
        if round % 10 == 9 {
            check_all(&home);
            let names = home.snapshots();
            let numbers =
                names.iter().map(|name| name.rsplit('@').next().unwrap().parse().unwrap());
            let newest: u64 = numbers.max().unwrap();
            assert!(newest >= highest, "{newest} after {highest}");
            highest = newest;
            home.ok(&["rm", "vm"]);
            home.ok(&["commit", "vm", "--disk", "c1", "--label", "content=1"]);
            highest += 1;
        }
    }
    assert!(killed > KILLS / 4, "only {killed} of {KILLS} were killed before they were done");
    home.ok(&["gc"]);
    check_all(&home);
    home.ok(&["verify", "--deep"]);
    for folder in ["tmp", "pins"] {
        let left: Vec<_> = fs::read_dir(home.store().join(folder)).unwrap().collect();
        assert!(left.is_empty(), "{left:?}");
    }
}

/// Several processes commit, read, remove, collect and compact at once. Commits without a parent
/// never conflict; nobody ever reads anything but what was committed.
#[test]
fn everybody_at_once() {
    let home = Home::with_store();
    for number in 0..6 {
        home.file(&format!("c{number}"), &content(number));
    }
    home.ok(&["commit", "base", "--disk", "c0", "--label", "content=0"]);
    let begun = Instant::now();
    let mut rounds: BTreeMap<&str, u64> = BTreeMap::new();
    thread::scope(|scope| {
        let home = &home;
        let workers = [
            scope.spawn(move || repeat(begun, |round| committer(home, "a", round))),
            scope.spawn(move || repeat(begun, |round| committer(home, "b", round))),
            scope.spawn(move || repeat(begun, |_| reader(home))),
            scope.spawn(move || repeat(begun, |_| collector(home, &["gc"]))),
            scope.spawn(move || repeat(begun, |_| collector(home, &["compact"]))),
        ];
        for (worker, name) in workers.into_iter().zip(["a", "b", "reader", "gc", "compact"]) {
            rounds.insert(name, worker.join().unwrap());
        }
    });
    assert!(rounds.values().all(|&count| count > 2), "{rounds:?}");
    home.ok(&["gc"]);
    assert!(check_all(&home) > 2);
    home.ok(&["verify", "--deep"]);
}

fn repeat(begun: Instant, mut round: impl FnMut(u64)) -> u64 {
    let mut count = 0;
    while begun.elapsed() < Duration::from_secs(6) {
        round(count);
        count += 1;
    }
    count
}

fn committer(home: &Home, name: &str, round: u64) {
    let number = round % 6;
    let (file, label) = (format!("c{number}"), format!("content={number}"));
    let parent = if round.is_multiple_of(2) { "none" } else { "base" };
    home.ok(&["commit", name, "--parent", parent, "--disk", &file, "--label", &label]);
    if round % 3 == 2 {
        home.ok(&["rm", name]);
    }
}

fn reader(home: &Home) {
    for snapshot in home.snapshots() {
        let output = home.run(&["cat", &format!("{snapshot}:root")]);
        match output.status.code() {
            // Removed since it was listed.
            Some(code::NOT_FOUND) => {}
            Some(code::OK) => {
                let known = (0..6).any(|number| output.stdout == content(number));
                assert!(known, "{snapshot} holds what nobody committed");
            }
            other => panic!("{snapshot}: {other:?} {}", String::from_utf8_lossy(&output.stderr)),
        }
    }
}

fn collector(home: &Home, arguments: &[&str]) {
    home.ok(arguments);
    thread::sleep(Duration::from_millis(20));
}
