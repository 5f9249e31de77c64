//! `import`, `detect`, `have` and `export --as`: the command around the formats, which have tests of
//! their own.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Stdio};

use dormouse_testkit::foreign::random::{PAGE, Random};
use dormouse_testkit::foreign::wrenn::{Generation, write};

use serde_json::Value;

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
    let told = home.run(&["detect", "bytes"]);
    assert_eq!(told.status.code(), Some(code::UNSUPPORTED));
    let told = crate::fixture::errors(&told);
    for format in ["wrenn", "firecracker", "mapped-ram", "vmdk", "carry"] {
        assert!(told.contains(format), "{told}");
    }
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
    assert_eq!((&said["format"], &said["format_version"]), (&"e2b".into(), &"5".into()));
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
        // They were written as qcow2.
        (&["export", "vm", "x", "--as", "vmdk"], code::USAGE),
        (&["export", "vm", "x", "--as", "vhdx"], code::USAGE),
        (&["export", "vm", "x", "--as", "vpc"], code::USAGE),
        (&["export", "vm", "x", "--as", "vdi"], code::USAGE),
        (&["export", "vm", "x", "--as", "qed"], code::USAGE),
    ] {
        assert_eq!(home.run(arguments).status.code(), Some(why), "{arguments:?}");
    }
    // The folder that is there is none of the store's.
    let told = home.fails(code::ALREADY_EXISTS, &["export", "vm", "builds", "--as", "wrenn"]);
    assert!(told.contains("builds is not empty") && !told.contains("the store"), "{told}");
}

/// Options that did nothing were taken without a word, so that nobody noticed that a diff was a whole
/// export.
#[test]
fn options_that_a_format_has_no_use_for_are_refused() {
    let home = Home::with_store();
    chain_of(&home, 2);
    home.ok(&["import", "wrenn", "chain", "vm"]);
    home.file("uuids", b"");
    let id = "0199a3e2-6c1f-7c52-9d0e-6f3c1a2b4d5e";
    for (format, option) in [
        ("qemu", &["--base", "vm@1"][..]),
        ("cloud-hypervisor", &["--base", "vm@1"]),
        ("raw", &["--base", "vm@1"]),
        ("firecracker", &["--build-id", id]),
        ("carry", &["--build-id", id]),
        ("e2b", &["--has", "uuids"]),
        ("wrenn", &["--rewrite", "a=b"]),
        ("wrenn", &["--disk", "root"]),
        ("carry,version=1", &[]),
        ("wrenn,version=1", &[]),
    ] {
        let arguments = [&["export", "vm", "x", "--as", format], option].concat();
        let told = home.fails(code::USAGE, &arguments);
        assert!(told.contains("has no use for"), "{told}");
        assert!(!home.path("x").exists());
    }
    home.file("disk", &[7; PAGE]);
    for (format, path, option) in [
        ("wrenn", "chain", &["--diff"][..]),
        ("wrenn", "chain", &["--state", "disk"]),
        ("auto", "chain", &["--layout", "standard"]),
        ("raw", "disk", &["--origin", "disk"]),
        ("raw", "disk", &["--vmm-version", "1.14.2"]),
        ("raw", "disk", &["--low-memory", "1G"]),
        ("e2b", "chain", &["--disk", "root"]),
        ("carry", "disk", &["--builds", "chain"]),
    ] {
        let told = home.fails(code::USAGE, &[&["import", format, path, "new"], option].concat());
        assert!(told.contains("has no use for"), "{told}");
    }
    assert_eq!(home.snapshots(), ["vm@1", "vm@2"]);
}

/// Loose files of Firecracker were recognised only with their format said.
#[test]
fn a_memory_file_is_recognised_by_its_state() {
    use dormouse_testkit::foreign::firecracker::vmstate;
    let home = Home::with_store();
    home.file("mem", &Random::new(3).device(512));
    home.file("vmstate", &vmstate((6, 0, 0), b"devices"));
    home.file("junk", b"no state");
    let said = home.ok(&["detect", "mem", "--state", "vmstate", "--json"]);
    let said: Value = serde_json::from_str(&said).unwrap();
    assert_eq!((&said["format"], &said["problem"]), (&"firecracker".into(), &Value::Null));
    assert_eq!(home.ok(&["import", "auto", "mem", "vm", "--state", "vmstate"]), "vm@1\n");
    let diff = ["import", "auto", "mem", "vm", "--state", "vmstate", "--diff", "--parent", "vm@1"];
    assert_eq!(home.ok(&diff), "vm@2\n");
    let told = home.fails(code::UNSUPPORTED, &["detect", "mem", "--state", "junk"]);
    assert!(told.contains("junk"), "{told}");
}

/// A carry was reported as nothing, and what a receiver has as nothing where it could not be read.
#[test]
fn a_carry_says_what_it_wrote_and_reads_what_is_there() {
    let home = Home::with_store();
    chain_of(&home, 1);
    home.ok(&["import", "wrenn", "chain", "vm"]);
    let said = home.ok(&["export", "vm", "out.carry", "--as", "carry", "--json"]);
    let said: Value = serde_json::from_str(&said).unwrap();
    assert_eq!(said["files"][0]["name"], "out.carry");
    let len = fs::metadata(home.path("out.carry")).unwrap().len();
    assert_eq!(said["files"][0]["size_bytes"], len);
    home.file("has", b"0199a3e2-6c1f-7c52-9d0e-6f3c1a2b4d5e\nvm@1\n");
    let told = home.fails(code::USAGE, &["export", "vm", "x", "--as", "carry", "--has", "has"]);
    assert!(told.contains("line 2") && told.contains("vm@1"), "{told}");
    let json = home.ok(&["have", "--json"]);
    home.file("has", json.as_bytes());
    home.fails(code::ALREADY_EXISTS, &["export", "vm", "x", "--as", "carry", "--has", "has"]);
}

/// Memory, states and disks have keys and passwords in them; most were written for everybody to read, and
/// their folders for everybody to look into.
#[test]
fn what_is_exported_is_its_owners_alone() {
    let home = Home::with_store();
    let images = [("memory", 1), ("disk", 2), ("state", 3)];
    for (name, seed) in images {
        home.file(name, &Random::new(seed).device(512));
    }
    let all = ["--memory", "memory", "--disk", "disk", "--state", "vmstate=state"];
    home.ok(&[&["commit", "vm"], &all[..], &["--state", "stream=state"]].concat());
    fs::create_dir(home.path("out")).unwrap();
    for (path, options) in [
        ("out/plain", &[][..]),
        ("out/wrenn", &["--as", "wrenn"]),
        ("out/e2b", &["--as", "e2b"]),
        ("out/e2b5", &["--as", "e2b,version=5,compression=lz4"]),
        ("out/firecracker", &["--as", "firecracker"]),
        ("out/qemu", &["--as", "qemu"]),
        ("out/carry", &["--as", "carry"]),
        ("out/qcow2", &["--as", "qcow2"]),
        ("out/raw", &["--as", "raw"]),
    ] {
        home.ok(&[&["export", "vm", path], options].concat());
    }
    for (image, path) in
        [("memory", "out/memory"), ("disk/root", "out/disk"), ("state/vmstate", "out/state")]
    {
        home.ok(&["export", &format!("vm:{image}"), path]);
    }
    let mut files = Vec::new();
    crate::fixture::walk(&home.path("out"), &mut files);
    assert!(files.len() > 20, "{files:?}");
    for (path, _) in files {
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode(&path), 0o600, "{}", path.display());
        let folders = path.ancestors().skip(1).take_while(|folder| *folder != home.path("out"));
        for folder in folders {
            assert_eq!(mode(folder), 0o700, "{}", folder.display());
        }
    }
}
