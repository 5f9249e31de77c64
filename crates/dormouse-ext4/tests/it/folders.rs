//! Folders with many entries, deep ones, and the kernel's use of them.

use std::fs::{self, File};
use std::path::Path;

use dormouse_ext4::layout::{Layout, Options, Size};
use dormouse_ext4::stage::Staged;
use dormouse_ext4::tree::{Attributes, Kind, ROOT, Time, Tree};
use dormouse_ext4::write::{Unwatched, write};

use crate::build::build;
use crate::judge::{Mount, fsck};
use crate::sample;

const PLAIN: Attributes =
    Attributes { mode: 0o755, uid: 0, gid: 0, mtime: Time { seconds: 1, nanoseconds: 0 } };

fn image_of(tree: &mut Tree, path: &Path, options: &Options) {
    let layout = Layout::plan(tree, options, &Staged::nothing()).unwrap();
    let file = File::options().read(true).write(true).create_new(true).open(path).unwrap();
    write(tree, &layout, &file, &Unwatched).unwrap();
}

#[test]
fn a_hundred_thousand_entries() {
    let mut tree = Tree::new();
    let many = tree.add(ROOT, b"many", 0, &PLAIN, Kind::Folder).unwrap();
    for index in 0..100_000 {
        // Bytes beyond 127 are negative to the hash.
        let name = [format!("entry-{index}-").as_bytes(), &[0xc3, 0xa9]].concat();
        tree.add(many, &name, 0, &PLAIN, Kind::Fifo).unwrap();
    }
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("image");
    image_of(&mut tree, &image, &Options::new(Size::Slack(16 << 20)));
    fsck(&image);
    let mount = Mount::new(&image, &dir.path().join("mount"), "rw");
    let many = mount.0.join("many");
    for index in (0..100_000).step_by(97) {
        assert!(many.join(format!("entry-{index}-é")).exists(), "{index}");
    }
    assert!(!many.join("entry-100000-é").exists());
    assert_eq!(fs::read_dir(&many).unwrap().count(), 100_000);
    // The kernel splits leaves that are full.
    for index in 0..2000 {
        fs::write(many.join(format!("new-{index}")), b"new").unwrap();
    }
    drop(mount);
    fsck(&image);
}

/// An index with two levels: names are long, so that a leaf has few of them.
#[test]
fn an_index_of_two_levels() {
    let mut tree = Tree::new();
    for index in 0..9000 {
        let name = format!("{index:0>250}");
        tree.add(ROOT, name.as_bytes(), 0, &PLAIN, Kind::Fifo).unwrap();
    }
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("image");
    image_of(&mut tree, &image, &Options::new(Size::Slack(0)));
    fsck(&image);
    let mount = Mount::new(&image, &dir.path().join("mount"), "ro");
    for index in (0..9000).step_by(13) {
        assert!(mount.0.join(format!("{index:0>250}")).exists(), "{index}");
    }
}

/// More folders in a folder than links can be counted.
#[test]
fn seventy_thousand_folders_in_a_folder() {
    let mut tree = Tree::new();
    let many = tree.add(ROOT, b"many", 0, &PLAIN, Kind::Folder).unwrap();
    for index in 0..70_000 {
        tree.add(many, format!("{index}").as_bytes(), 0, &PLAIN, Kind::Folder).unwrap();
    }
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("image");
    image_of(&mut tree, &image, &Options::new(Size::Slack(0)));
    fsck(&image);
}

#[test]
fn deeper_than_a_path_is_long() {
    let dir = tempfile::tempdir().unwrap();
    let source = dir.path().join("source");
    fs::create_dir(&source).unwrap();
    sample::deep(&source, 1500);
    let image = dir.path().join("image");
    let report = build(&source, &image, &Options::new(Size::Slack(0)));
    assert_eq!(report.entries, 1502);
    fsck(&image);
    // Step by step, for no path leads there.
    let mount = Mount::new(&image, &dir.path().join("mount"), "ro");
    let flags = rustix::fs::OFlags::RDONLY | rustix::fs::OFlags::DIRECTORY;
    let open =
        |at: &rustix::fd::OwnedFd| rustix::fs::openat(at, "deep", flags, rustix::fs::Mode::empty());
    let mut at = rustix::fs::open(&mount.0, flags, rustix::fs::Mode::empty()).unwrap();
    let mut depth = 0;
    while let Ok(below) = open(&at) {
        at = below;
        depth += 1;
    }
    assert_eq!(depth, 1500);
    drop(at);
}

#[test]
fn the_same_folder_gives_the_same_bytes_wherever_it_lies() {
    let dir = tempfile::tempdir().unwrap();
    let (first, second) = (dir.path().join("first"), dir.path().join("second"));
    for source in [&first, &second] {
        fs::create_dir(source).unwrap();
        sample::fill(source);
    }
    // Whatever was not given a time has that of now, which differs.
    let options = Options { epoch: Some(1_500_000_000), ..Options::new(Size::Slack(0)) };
    let images = [&first, &second].map(|source| {
        let image = source.with_extension("image");
        build(source, &image, &options);
        fsck(&image);
        fs::read(&image).unwrap()
    });
    assert!(images[0] == images[1]);
}
