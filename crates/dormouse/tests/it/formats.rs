//! `import`, `detect`, `have` and `export --as`: the command around the formats, which have tests of
//! their own.

use std::fs;
use std::process::{Command, Stdio};

use dormouse_testkit::foreign::random::{PAGE, Random};
use dormouse_testkit::foreign::wrenn::{Generation, write};

use crate::fixture::{Home, code};

fn chain_of(home: &Home, count: u8) -> Vec<Generation> {
    let mut random = Random::new(1);
    let mut memory = random.device(300);
    let mut generations = Vec::new();
    for number in 1..=count {
        generations.push(Generation { build: [number; 16], memory: memory.clone() });
        write(&home.path("chain").join(format!("{number}")), &generations).unwrap();
        random.work(&mut memory, 30);
    }
    generations
}

#[test]
fn a_chain_is_detected_imported_and_compared() {
    let home = Home::with_store();
    let generations = chain_of(&home, 3);
    let said: serde_json::Value =
        serde_json::from_str(&home.ok(&["detect", "chain", "--json"])).unwrap();
    assert_eq!(said["format"], "wrenn");
    assert_eq!(said["problem"], serde_json::Value::Null);
    assert_eq!(home.ok(&["import", "auto", "chain", "vm", "--verify"]), "vm@1\nvm@2\nvm@3\n");
    home.ok(&["export", "vm@2:memory", "out"]);
    assert!(fs::read(home.path("out")).unwrap() == generations[1].memory);
    let said: serde_json::Value =
        serde_json::from_str(&home.ok(&["import", "wrenn", "chain/3", "other", "--json"])).unwrap();
    assert_eq!(said["snapshots"][0]["snapshot"], "other@1");
    assert_eq!(said["snapshots"][0]["figures"]["new_bytes"], 0, "all of it is there");
}

#[test]
fn what_is_wrong_is_told_and_has_its_exit_code() {
    let home = Home::with_store();
    chain_of(&home, 1);
    let header = home.path("chain/1/memfile.header");
    let mut bytes = fs::read(&header).unwrap();
    bytes[64] = 1;
    fs::write(&header, bytes).unwrap();
    let detected = home.run(&["detect", "chain/1"]);
    assert_eq!(detected.status.code(), Some(code::CORRUPT));
    let said = String::from_utf8_lossy(&detected.stdout).into_owned();
    assert!(said.contains("expected multiples of 4096"), "{said}");
    let imported = home.run(&["import", "wrenn", "chain/1", "vm"]);
    assert_eq!(imported.status.code(), Some(code::CORRUPT));
    assert_eq!(home.run(&["detect", "nothing"]).status.code(), Some(code::NOT_FOUND));
    home.file("bytes", &[7; PAGE]);
    assert_eq!(home.run(&["detect", "bytes"]).status.code(), Some(code::UNSUPPORTED));
    assert_eq!(home.run(&["import", "zip", "bytes", "vm"]).status.code(), Some(code::USAGE));
    let pipe = home.run(&["import", "carry", "-", "vm", "--verify"]);
    assert_eq!(pipe.status.code(), Some(code::USAGE));
}

#[test]
fn a_snapshot_goes_through_a_pipe_to_another_store() {
    let (here, there) = (Home::with_store(), Home::with_store());
    chain_of(&here, 2);
    here.ok(&["import", "wrenn", "chain", "vm"]);
    let carry = |arguments: &[&str]| {
        let mut sender = Command::new(env!("CARGO_BIN_EXE_dormouse"))
            .current_dir(here.path(""))
            .args(arguments)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let receiver = Command::new(env!("CARGO_BIN_EXE_dormouse"))
            .current_dir(there.path(""))
            .args(["import", "carry", "-", "vm"])
            .stdin(sender.stdout.take().unwrap())
            .output()
            .unwrap();
        assert!(sender.wait().unwrap().success());
        assert!(receiver.status.success(), "{}", String::from_utf8_lossy(&receiver.stderr));
        String::from_utf8(receiver.stdout).unwrap()
    };
    assert_eq!(carry(&["export", "vm@1", "-", "--as", "carry"]), "vm@1\n");
    fs::write(here.path("has"), there.ok(&["have"])).unwrap();
    assert_eq!(carry(&["export", "vm@2", "-", "--as", "carry", "--has", "has"]), "vm@2\n");
    for snap in ["vm@1:memory", "vm@2:memory"] {
        let [ours, theirs] = [&here, &there].map(|home| home.run(&["cat", snap]).stdout);
        assert!(ours == theirs, "{snap}");
    }
    let again = here.run(&["export", "vm@1", "x", "--as", "carry", "--has", "has"]);
    assert_eq!(again.status.code(), Some(code::ALREADY_EXISTS));
}

#[test]
fn exports_in_other_formats_are_told_apart_by_what_stands_behind_them() {
    let home = Home::with_store();
    chain_of(&home, 2);
    home.ok(&["import", "wrenn", "chain", "vm"]);
    let as_e2b = ["export", "vm", "builds", "--as", "e2b,version=5,compression=zstd", "--json"];
    let said: serde_json::Value = serde_json::from_str(&home.ok(&as_e2b)).unwrap();
    assert_eq!((&said["format"], &said["version"]), (&"e2b".into(), &"5".into()));
    assert!(said["files"].as_array().unwrap().len() >= 4);
    for (arguments, why) in [
        (&["export", "vm", "x", "--as", "wrenn,compression=zstd"][..], code::USAGE),
        (&["export", "vm", "x", "--as", "e2b,version=4"], code::USAGE),
        (&["export", "vm:memory", "x", "--as", "wrenn"], code::USAGE),
        (&["export", "vm", "x", "--base", "vm@1"], code::USAGE),
        (&["export", "vm", "-", "--as", "wrenn"], code::USAGE),
        (&["export", "vm", "x", "--as", "dm-snapshot"], code::UNSUPPORTED),
        (&["export", "vm", "builds", "--as", "wrenn"], code::ALREADY_EXISTS),
        (&["export", "vm@1", "x", "--as", "firecracker", "--base", "vm@2"], code::USAGE),
    ] {
        assert_eq!(home.run(arguments).status.code(), Some(why), "{arguments:?}");
    }
}
