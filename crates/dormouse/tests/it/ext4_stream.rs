//! `ext4 build --commit` of streams: the bytes of the file, nothing in between, and nothing left of a
//! build that comes to no end.

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use sha2::{Digest as _, Sha256};

use crate::ext4::{fsck, root, same};
use crate::fixture::{Home, code, errors, noise, walk};
use crate::live_full::Tmpfs;

/// Waits for something that another process does.
const PATIENCE: Duration = Duration::from_secs(60);

fn run(command: &mut Command) -> Vec<u8> {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{command:?}: {}", errors(&output));
    output.stdout
}

/// A tar of a folder, packed as `how` says.
fn tar(folder: &Path, how: &str) -> Vec<u8> {
    run(Command::new("tar").arg("-C").arg(folder).args(["--format=posix", "--sparse", how, "."]))
}

/// A member of a tar that is one more name of what is there.
fn hard_link(name: &str, target: &str) -> Vec<u8> {
    let mut header = [0; 512];
    for (at, text) in [(0, name), (100, "0000644"), (136, "00000000001"), (157, target)] {
        header[at..at + text.len()].copy_from_slice(text.as_bytes());
    }
    header[124..135].fill(b'0');
    header[156] = b'1';
    header[257..265].copy_from_slice(b"ustar\x0000");
    header[148..156].fill(b' ');
    let sum: u32 = header.iter().map(|&byte| u32::from(byte)).sum();
    header[148..155].copy_from_slice(format!("{sum:06o}\0").as_bytes());
    header.to_vec()
}

/// A layout folder whose image has these layers, the lowest first.
fn layout(at: &Path, layers: &[Vec<u8>]) {
    let blobs = at.join("blobs/sha256");
    fs::create_dir_all(&blobs).unwrap();
    let put = |bytes: &[u8]| {
        let hex: String = Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect();
        fs::write(blobs.join(&hex), bytes).unwrap();
        format!(r#""digest":"sha256:{hex}","size":{}"#, bytes.len())
    };
    let kind = "application/vnd.oci.image";
    let layers: Vec<String> = layers
        .iter()
        .map(|layer| format!(r#"{{"mediaType":"{kind}.layer.v1.tar+gzip",{}}}"#, put(layer)))
        .collect();
    let manifest = put(format!(r#"{{"layers":[{}]}}"#, layers.join(",")).as_bytes());
    fs::write(at.join("index.json"), format!(r#"{{"manifests":[{{{manifest}}}]}}"#)).unwrap();
}

/// Three layers: files, links and a sparse one; some hidden, some replaced, some linked to by later
/// layers. What the last ones removed is the most of what was read.
fn layers(home: &Home) -> Vec<Vec<u8>> {
    root(home);
    let sparse = File::create(home.path("tree/sparse")).unwrap();
    sparse.set_len(40 << 20).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&sparse, b"far behind", 30 << 20).unwrap();
    drop(sparse);
    fs::create_dir_all(home.path("tree/opt/old")).unwrap();
    for index in 0..300 {
        home.file(&format!("tree/opt/old/{index}"), &noise(index, 3)[..9000]);
    }
    home.file("tree/opt/large", &noise(1000, 2000));
    fs::hard_link(home.path("tree/opt/large"), home.path("tree/linked")).unwrap();
    for folder in ["second/opt/old", "second/etc", "third/bin"] {
        fs::create_dir_all(home.path(folder)).unwrap();
    }
    home.file("second/opt/.wh.large", b"");
    home.file("second/opt/old/.wh..wh..opq", b"");
    home.file("second/opt/old/7", &noise(2000, 40));
    home.file("second/etc/hostname", b"another\n");
    home.file("third/bin/tool", &noise(3000, 100));
    home.file("third/.wh.sparse", b"");
    symlink("tool", home.path("third/bin/link")).unwrap();
    let mut layers: Vec<Vec<u8>> =
        ["tree", "second"].iter().map(|name| tar(&home.path(name), "-zc")).collect();
    // Links to what lower layers have, one of it replaced by this very layer.
    let third = [
        hard_link("notes", "root/notes"),
        hard_link("old tool", "bin/tool"),
        tar(&home.path("third"), "-c"),
    ];
    let third = home.file("third.tar", &third.concat());
    let third = run(Command::new("gzip").arg("-c").arg(third));
    layers.push(third);
    layers
}

/// Files of the store but those of its index, which a collection may merge anew, and the lock of a name,
/// which a build may have made that was killed before it had a snapshot.
fn kept(home: &Home) -> Vec<(PathBuf, u64)> {
    let mut files = home.published();
    files.retain(|(path, _)| {
        !path.starts_with(home.store().join("index")) && !path.ends_with("next.lock")
    });
    files
}

/// The image in a file and that in a commit, by the same options.
fn assert_both_ways(home: &Home, source: &str, more: &[&str]) {
    for file in ["a.ext4", "back.ext4"] {
        let _ = fs::remove_file(home.path(file));
    }
    home.ok(&[&["ext4", "build", source, "-o", "a.ext4"][..], more].concat());
    let told = home.json(&[&["ext4", "build", source, "--commit", "box"][..], more].concat());
    home.ok(&["export", "box:root", "back.ext4"]);
    fsck(&home.path("back.ext4"));
    assert!(same(&home.path("a.ext4"), &home.path("back.ext4")), "{source} {more:?}");
    let shown = home.json(&["show", "box"]);
    let figures = &shown["manifest"]["figures"];
    let size = home.path("a.ext4").metadata().unwrap().len();
    assert_eq!(figures["raw_bytes"], size.next_multiple_of(4096), "{shown}");
    assert_eq!(figures["new_bytes"], told["new_bytes"], "{shown}");
    // All that is not zero is new, or was in the store, or twice in the image.
    let sum =
        |names: &[&str]| names.iter().map(|name| figures[*name].as_u64().unwrap()).sum::<u64>();
    let found = sum(&["new_bytes", "elsewhere_bytes", "self_bytes", "unchanged_bytes"]);
    assert!(found >= sum(&["nonzero_bytes"]), "{shown}");
}

#[test]
fn a_commit_has_the_bytes_of_the_file_whatever_it_is_made_of() {
    let home = Home::with_store();
    let layers = layers(&home);
    home.file("plain.tar", &tar(&home.path("tree"), "-c"));
    home.file("packed.tar.gz", &layers[0]);
    layout(&home.path("image"), &layers);
    run(Command::new("tar")
        .arg("-C")
        .arg(home.path("image"))
        .arg("-cf")
        .arg(home.path("image.tar"))
        .args(["index.json", "blobs"]));
    home.file("exclude.list", b"/opt/old\n/linked\n");
    home.file("agent", &noise(7, 30));
    let all = ["--size", "300M", "--inject", "agent:/bin/agent", "--exclude-from", "exclude.list"];
    for source in ["tree", "plain.tar", "packed.tar.gz", "oci:image", "oci-archive:image.tar"] {
        assert_both_ways(&home, source, &[]);
        assert_both_ways(&home, source, &all);
        assert_both_ways(&home, source, &["--size", "300000001", "--journal", "none"]);
    }
    home.ok(&["verify", "--deep"]);
    // What the layers say, not only that both ways agree.
    home.ok(&["ext4", "build", "oci:image", "--commit", "layers"]);
    let cat = |path: &str| home.run(&["ext4", "cat", "layers:root", path]);
    assert_eq!(cat("/etc/hostname").stdout, b"another\n");
    assert_eq!(cat("/opt/old/7").stdout, noise(2000, 40));
    assert_eq!(cat("/linked").stdout, noise(1000, 2000));
    assert_eq!(cat("/bin/tool").stdout, noise(3000, 100));
    assert_eq!(cat("/notes").stdout, b"remember\n");
    assert_eq!(cat("/old tool").stdout, vec![7; 1 << 20]);
    let told = home.json(&["ext4", "ls", "layers:root", "/root/notes"]);
    assert_eq!(told["entries"][0]["links"], 2, "{told}");
    for gone in ["/opt/large", "/opt/old/8", "/sparse"] {
        assert_eq!(cat(gone).status.code(), Some(code::NOT_FOUND), "{gone}");
    }
}

/// A commit of what is there already stores next to nothing, whichever blocks it lies in.
#[test]
fn a_second_stream_stores_what_changed() {
    let home = Home::with_store();
    let layers = layers(&home);
    layout(&home.path("image"), &layers);
    let first = home.json(&["ext4", "build", "oci:image", "--commit", "box"]);
    assert!(first["new_bytes"].as_u64().unwrap() > 8 << 20, "{first}");
    let second = home.json(&["ext4", "build", "oci:image", "--commit", "box"]);
    assert_eq!((&second["snapshot"], &second["new_bytes"]), (&"box@2".into(), &0.into()));
    let other = home.json(&["ext4", "build", "oci:image", "--commit", "other", "--slack", "1G"]);
    // Descriptors, and inodes that name other blocks.
    let metadata = other["metadata_bytes"].as_u64().unwrap();
    assert!(other["new_bytes"].as_u64().unwrap() <= metadata, "{other}");
    assert!(metadata < 400_000, "{other}");
    home.file("tree/bin/more", &noise(9, 10));
    layout(&home.path("changed"), &[tar(&home.path("tree"), "-zc"), layers[1].clone()]);
    let changed = home.json(&["ext4", "build", "oci:changed", "--commit", "box"]);
    assert!(changed["new_bytes"].as_u64().unwrap() < 2 << 20, "{changed}");
    // What a later layer removed is in no image; compaction takes it out of the pack.
    home.ok(&["gc"]);
    home.ok(&["verify", "--deep"]);
}

/// A build that waits for the rest of its archive on standard input.
struct Halfway {
    child: Child,
    archive: Vec<u8>,
    fed: usize,
}

impl Halfway {
    /// Starts a build, and gives it half of a tar of 48 MiB, of which the store has some by then.
    fn start(home: &Home) -> Halfway {
        fs::create_dir(home.path("large")).unwrap();
        for index in 0..24u64 {
            home.file(&format!("large/{index:02}"), &noise(100 + index, 512));
        }
        let archive = tar(&home.path("large"), "-c");
        let child = Command::new(env!("CARGO_BIN_EXE_dormouse"))
            .current_dir(home.path("."))
            .env_remove("DORMOUSE_STORE")
            .args(["ext4", "build", "-", "--commit", "box"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let fed = archive.len() / 2;
        let mut halfway = Halfway { child, archive, fed };
        halfway.child.stdin.as_mut().unwrap().write_all(&halfway.archive[..fed]).unwrap();
        let begun = Instant::now();
        let mut stored = 0;
        // Less than was fed: some of it is still on its way.
        while stored <= 12 << 20 {
            assert!(
                begun.elapsed() < PATIENCE,
                "{stored} bytes in the store of {fed} that were fed"
            );
            thread::sleep(Duration::from_millis(5));
            let mut files = Vec::new();
            walk(&home.store().join("tmp"), &mut files);
            stored = files.iter().map(|(_, bytes)| bytes).sum::<u64>();
        }
        halfway
    }

    /// Feeds the rest, and waits for the end.
    fn finish(mut self) -> std::process::Output {
        let mut stdin = self.child.stdin.take().unwrap();
        stdin.write_all(&self.archive[self.fed..]).unwrap();
        drop(stdin);
        self.child.wait_with_output().unwrap()
    }

    /// All open files: what their links say, and how many names they have.
    fn open_files(&self) -> Vec<(PathBuf, u64)> {
        let folder = format!("/proc/{}/fd", self.child.id());
        let links = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
        let files = links.filter_map(|link| {
            let metadata = fs::metadata(&link).ok()?;
            metadata.is_file().then(|| (fs::read_link(&link).unwrap(), metadata.nlink()))
        });
        files.collect()
    }
}

/// Contents are in the store while the archive is still being read, and the only file that grows is
/// the store's pack: none without a name, none elsewhere.
#[test]
fn no_file_is_made_in_between() {
    let home = Home::with_store();
    let halfway = Halfway::start(&home);
    let open = halfway.open_files();
    let store = fs::canonicalize(home.store()).unwrap();
    assert!(open.iter().any(|(path, _)| path.starts_with(store.join("tmp"))), "{open:?}");
    for (path, names) in &open {
        assert!(*names > 0, "{} has no name", path.display());
        assert!(path.starts_with(&store), "{} is not the store's", path.display());
    }
    let mut entries: Vec<_> = fs::read_dir(home.path(".")).unwrap().map(Result::unwrap).collect();
    entries.retain(|entry| entry.file_name() != "large");
    assert_eq!(entries.len(), 1, "{entries:?}");
    let output = halfway.finish();
    assert!(output.status.success(), "{}", errors(&output));
    home.file("large.tar", &tar(&home.path("large"), "-c"));
    home.ok(&["ext4", "build", "large.tar", "-o", "a.ext4"]);
    home.ok(&["export", "box:root", "back.ext4"]);
    assert!(same(&home.path("a.ext4"), &home.path("back.ext4")));
}

#[test]
fn of_a_killed_build_nothing_is_left_after_a_collection() {
    let home = Home::with_store();
    home.file("d", &noise(1, 100));
    home.ok(&["commit", "vm", "--disk", "d"]);
    let before = kept(&home);
    let mut halfway = Halfway::start(&home);
    halfway.child.kill().unwrap();
    halfway.child.wait().unwrap();
    assert_ne!(kept(&home), before);
    home.ok(&["gc"]);
    assert_eq!(kept(&home), before);

    // At any moment, those when contents are stored and in no snapshot among them.
    home.file("large.tar", &halfway.archive);
    let mut cut = 0;
    for step in 0..24u64 {
        let mut build = Command::new(env!("CARGO_BIN_EXE_dormouse"))
            .current_dir(home.path("."))
            .args(["ext4", "build", "large.tar", "--commit", "box"])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        thread::sleep(Duration::from_millis(10 + 25 * step));
        build.kill().unwrap();
        build.wait().unwrap();
        home.ok(&["gc"]);
        if home.snapshots().len() == 1 {
            cut += 1;
            assert_eq!(kept(&home), before);
        } else {
            home.ok(&["rm", "box@1"]);
            break;
        }
    }
    assert!(cut > 0, "no build was killed before its end");
    home.ok(&["verify", "--deep"]);
}

/// A signal is heard while contents go by, and whoever was asked to stop leaves nothing.
#[test]
fn a_build_that_is_asked_to_stop_leaves_nothing() {
    let home = Home::with_store();
    let before = home.published();
    let mut halfway = Halfway::start(&home);
    let pid = rustix::process::Pid::from_child(&halfway.child);
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
    // It may wait for the pipe until there is something.
    let rest = halfway.archive[halfway.fed..].to_vec();
    let mut stdin = halfway.child.stdin.take().unwrap();
    let feeder = thread::spawn(move || stdin.write_all(&rest));
    let output = halfway.child.wait_with_output().unwrap();
    // The pipe may have been closed before its end.
    let _ = feeder.join().unwrap();
    assert_eq!(output.status.code(), Some(code::CANCELLED), "{}", errors(&output));
    assert_eq!(home.published(), before);
}

#[test]
fn an_archive_that_breaks_off_leaves_nothing() {
    let home = Home::with_store();
    let before = home.published();
    let halfway = Halfway::start(&home);
    let Halfway { mut child, .. } = halfway;
    drop(child.stdin.take());
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(code::CORRUPT), "{}", errors(&output));
    assert!(errors(&output).contains("standard input"), "{}", errors(&output));
    assert_eq!(home.published(), before);
    // Nor does one that turns out not to fit.
    home.file("large.tar", &tar(&home.path("large"), "-c"));
    let told = home
        .fails(code::REFUSED, &["ext4", "build", "large.tar", "--commit", "b", "--size", "40M"]);
    assert!(told.contains("room"), "{told}");
    assert_eq!(home.published(), before);
}

/// A store whose file system is full says so, keeps what it has, and takes the image when there is
/// room.
#[test]
fn a_full_file_system_is_told_and_leaves_the_store_as_it_was() {
    let home = Home::new();
    let tmpfs = Tmpfs::mount(&home.store(), 24);
    home.ok(&["init"]);
    home.file("d", &noise(1, 1000));
    home.ok(&["commit", "vm", "--disk", "d"]);
    let before = kept(&home);
    fs::create_dir(home.path("large")).unwrap();
    for index in 0..24u64 {
        home.file(&format!("large/{index:02}"), &noise(100 + index, 512));
    }
    home.file("large.tar", &tar(&home.path("large"), "-c"));
    for source in ["large.tar", "large"] {
        let told = home.fails(code::IO, &["ext4", "build", source, "--commit", "box"]);
        assert!(told.contains("No space left") && told.contains("make room"), "{told}");
        home.ok(&["gc"]);
        assert_eq!(kept(&home), before);
    }
    home.ok(&["verify", "--deep"]);
    tmpfs.resize(96);
    home.ok(&["ext4", "build", "large.tar", "--commit", "box"]);
    home.ok(&["export", "box:root", "back.ext4"]);
    fsck(&home.path("back.ext4"));
}
