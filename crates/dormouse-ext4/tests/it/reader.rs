//! Our reader and ext4-view, each beside the kernel, on images of ours and of mke2fs.

use std::fs::{self, File};
use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use dormouse_ext4::input::{Limits, image};
use dormouse_ext4::layout::{Layout, Options, Size};
use dormouse_ext4::read::{Ext4, FileKind, Inode};
use dormouse_ext4::stage::Staged;
use dormouse_ext4::tree::{ROOT, Tree};
use dormouse_ext4::write::{Unwatched, write};

use crate::build::build;
use crate::judge::{Mount, assert_same, fsck, said, walk};
use crate::sample;

fn rebuild(from: &Path, to: &Path, options: &Options) {
    let source = Arc::new(Ext4::open_file(File::open(from).unwrap()).unwrap());
    let mut tree = Tree::new();
    image::read(&mut tree, ROOT, &source, b"/", &Limits::STANDARD, &Unwatched).unwrap();
    let layout = Layout::plan(&mut tree, options, &Staged::nothing()).unwrap();
    let file = File::options().read(true).write(true).create_new(true).open(to).unwrap();
    write(&tree, &layout, &file, &Unwatched).unwrap();
}

/// What is read of an image and written again is the same image.
#[test]
fn an_image_of_an_image_is_the_image() {
    let dir = tempfile::tempdir().unwrap();
    let source = dir.path().join("source");
    fs::create_dir(&source).unwrap();
    sample::fill(&source);
    let (first, second) = (dir.path().join("first"), dir.path().join("second"));
    let options = Options::new(Size::Exactly(200 << 20));
    build(&source, &first, &options);
    rebuild(&first, &second, &options);
    fsck(&second);
    assert!(fs::read(&first).unwrap() == fs::read(&second).unwrap());
}

/// What mke2fs makes, with old and new features, is read like what we make.
#[test]
fn images_of_others_are_read() {
    let dir = tempfile::tempdir().unwrap();
    let source = dir.path().join("source");
    fs::create_dir(&source).unwrap();
    sample::fill(&source);
    // mke2fs leaves sockets out, and in an inode without room it drops what does not fit.
    fs::remove_file(source.join("socket")).unwrap();
    // A target has to fit into a block, which is of 1 KiB in some of them.
    fs::remove_file(source.join("symlink-slow")).unwrap();
    std::os::unix::fs::symlink("z".repeat(900), source.join("symlink-slow")).unwrap();
    for options in [
        &["-t", "ext4", "-b", "4096"][..],
        &["-t", "ext4", "-b", "1024"],
        &["-t", "ext4", "-b", "4096", "-O", "^metadata_csum,^64bit,inline_data"],
        &["-t", "ext4", "-b", "4096", "-O", "meta_bg,^resize_inode"],
        &["-t", "ext3", "-I", "256"],
        &["-t", "ext2", "-I", "256", "-b", "2048"],
    ] {
        let image = dir.path().join("image");
        let mut command = Command::new("mke2fs");
        command.args(["-q", "-F"]).args(options).arg(&image).arg("300M");
        said(&mut command);
        let mount = Mount::new(&image, &dir.path().join("mount"), "rw");
        let mut copy = Command::new("cp");
        said(copy.args(["-a", "--sparse=always"]).arg(source.join(".")).arg(&mount.0));
        // What is not written back yet has its holes elsewhere.
        drop(mount);
        let mount = Mount::new(&image, &dir.path().join("mount"), "ro");
        let expected = walk(&mount.0);
        drop(mount);
        let again = dir.path().join("again");
        rebuild(&image, &again, &Options::new(Size::Slack(0)));
        fsck(&again);
        let mount = Mount::new(&again, &dir.path().join("mount"), "ro");
        assert_same(&expected, &walk(&mount.0));
        drop(mount);
        fs::remove_file(&image).unwrap();
        fs::remove_file(&again).unwrap();
    }
}

/// ext4-view reads an image of ours as we do, entry by entry.
#[test]
fn another_reader_sees_the_same() {
    let dir = tempfile::tempdir().unwrap();
    let source = dir.path().join("source");
    fs::create_dir(&source).unwrap();
    sample::fill(&source);
    // It takes times before 1970 and after 2038 for corruption.
    for name in ["block", "pipe"] {
        said(Command::new("touch").args(["-d", "@5"]).arg(source.join(name)));
    }
    let path = dir.path().join("image");
    build(&source, &path, &Options::new(Size::Slack(0)));
    let other = ext4_view::Ext4::load_from_path(&path).unwrap();
    let ours = Ext4::open_file(File::open(&path).unwrap()).unwrap();
    let mut pending: Vec<(Vec<u8>, Inode)> = vec![(b"/".to_vec(), ours.root().unwrap())];
    let mut seen = 0;
    while let Some((at, inode)) = pending.pop() {
        seen += 1;
        let path = ext4_view::Path::new(&at);
        let metadata = other.symlink_metadata(path).unwrap();
        assert_eq!(metadata.mode() & 0o7777, inode.attributes.mode, "{path:?}");
        assert_eq!((metadata.uid(), metadata.gid()), (inode.attributes.uid, inode.attributes.gid));
        match inode.kind {
            FileKind::Folder => {
                let mut names: Vec<Vec<u8>> = other
                    .read_dir(path)
                    .unwrap()
                    .map(|entry| entry.unwrap().file_name().as_ref().to_vec())
                    .filter(|name| name != b"." && name != b"..")
                    .collect();
                let mut entries = ours.entries(&inode).unwrap();
                entries.sort_by(|a, b| a.name.cmp(&b.name));
                names.sort();
                assert!(names.iter().eq(entries.iter().map(|entry| &entry.name)), "{path:?}");
                for entry in entries {
                    let mut below = at.clone();
                    if !below.ends_with(b"/") {
                        below.push(b'/');
                    }
                    below.extend_from_slice(&entry.name);
                    pending.push((below, ours.inode(entry.inode).unwrap()));
                }
            }
            FileKind::Symlink => {
                let target = other.read_link(path).unwrap();
                assert_eq!(target.as_ref(), ours.target(&inode).unwrap());
            }
            FileKind::File if inode.bytes < 1 << 27 => {
                let mut content = vec![0; usize::try_from(inode.bytes).unwrap()];
                ours.read(&inode, &mut content, 0).unwrap();
                assert!(other.read(path).unwrap() == content, "{path:?}");
            }
            _ => {}
        }
    }
    assert!(seen > 750, "{seen}");
}

/// A file system that was in use when its machine died: what its journal has is read, and the
/// blocks it calls free are.
#[test]
fn a_journal_is_replayed_in_memory() {
    let dir = tempfile::tempdir().unwrap();
    let source = dir.path().join("source");
    fs::create_dir(&source).unwrap();
    sample::fill(&source);
    let (image, torn) = (dir.path().join("image"), dir.path().join("torn"));
    build(&source, &image, &Options::new(Size::Exactly(300 << 20)));
    let mount = Mount::new(&image, &dir.path().join("mount"), "rw");
    for index in 0..300 {
        fs::write(mount.0.join(format!("new-{index}")), sample::noise(9000, index)).unwrap();
    }
    fs::remove_dir_all(mount.0.join("folder")).unwrap();
    rustix::fs::syncfs(File::open(&mount.0).unwrap()).unwrap();
    // What a power cut would leave: all that was synced, the journal not replayed.
    said(Command::new("cp").arg("--sparse=always").arg(&image).arg(&torn));
    drop(mount);
    let read = Ext4::open_file(File::open(&torn).unwrap()).unwrap();
    assert!(read.was_replayed(), "the copy was taken of a mounted image");
    let free = read.free_ranges().unwrap();
    let again = dir.path().join("again");
    rebuild(&torn, &again, &Options::new(Size::Slack(0)));
    fsck(&again);

    // The kernel replays its own way; then both images show the same.
    let kernel = Mount::new(&torn, &dir.path().join("mount"), "rw");
    let expected = walk(&kernel.0);
    let ours = Mount::new(&again, &dir.path().join("again-mount"), "ro");
    assert_same(&expected, &walk(&ours.0));
    drop((kernel, ours));

    // The replay changed no allocation: what was called free is free in the end, too.
    let after = Ext4::open_file(File::open(&torn).unwrap()).unwrap();
    assert!(!after.was_replayed());
    assert_eq!(free, after.free_ranges().unwrap());
}

/// What is called free can be overwritten with anything.
#[test]
fn free_blocks_are_in_no_use() {
    use std::os::unix::fs::FileExt;
    let dir = tempfile::tempdir().unwrap();
    let source = dir.path().join("source");
    fs::create_dir(&source).unwrap();
    sample::fill(&source);
    let expected = walk(&source);
    let path = dir.path().join("image");
    for mke2fs in [false, true] {
        if mke2fs {
            let mut command = Command::new("mke2fs");
            command.args(["-q", "-F", "-t", "ext4", "-d"]).arg(&source).arg(&path).arg("600M");
            said(&mut command);
        } else {
            build(&source, &path, &Options::new(Size::Exactly(600 << 20)));
        }
        let file = File::options().read(true).write(true).open(&path).unwrap();
        let read = Ext4::open_file(file.try_clone().unwrap()).unwrap();
        let free = read.free_ranges().unwrap();
        let bytes: u64 = free.iter().map(|range| range.end - range.start).sum();
        let text = said(Command::new("dumpe2fs").arg("-h").arg(&path));
        let told = text.lines().find_map(|line| line.strip_prefix("Free blocks:")).unwrap();
        assert_eq!(told.trim().parse::<u64>().unwrap() * 4096, bytes);
        for range in free {
            for block in (range.start..range.end).step_by(4096) {
                file.write_all_at(&[0x5a; 4096], block).unwrap();
            }
        }
        fsck(&path);
        let mount = Mount::new(&path, &dir.path().join("mount"), "ro");
        let found = walk(&mount.0);
        if !mke2fs {
            assert_same(&expected, &found);
        }
        drop(mount);
        fs::remove_file(&path).unwrap();
    }
}

/// Bitmaps of a file system that has errors, or that has no journal and was not unmounted, are
/// nobody's word for what is free.
#[test]
fn what_is_not_clean_is_not_judged() {
    use dormouse_ext4::error::ErrorKind;
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image");
    for (journal, state, is_judged) in [
        ("^has_journal", 1, true),
        ("^has_journal", 0, false),
        ("has_journal", 0, true),
        ("has_journal", 3, false),
    ] {
        let mut mke2fs = Command::new("mke2fs");
        said(mke2fs.args(["-q", "-F", "-t", "ext4", "-O", journal]).arg(&path).arg("64M"));
        let mut debugfs = Command::new("debugfs");
        debugfs.args(["-w", "-R", &format!("ssv state {state}")]);
        said(debugfs.arg(&path));
        let read = Ext4::open_file(File::open(&path).unwrap()).unwrap();
        let judged = read.free_ranges();
        assert_eq!(judged.is_ok(), is_judged, "{journal} {state}: {judged:?}");
        if let Err(error) = judged {
            assert_eq!(error.kind(), ErrorKind::Refused);
            assert!(error.to_string().contains("e2fsck"), "{error}");
        }
        fs::remove_file(&path).unwrap();
    }
}
