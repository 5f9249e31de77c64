//! What can be chosen about an image, as dumpe2fs tells it; what is zero takes no space; and the
//! same bytes for ever.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::process::Command;

use dormouse_ext4::layout::{Journal, Layout, Options, Size, Uuid};
use dormouse_ext4::stage::Staged;
use dormouse_ext4::tree::content::InMemory;
use dormouse_ext4::tree::{Attributes, FileId, Kind, ROOT, Time, Tree, Xattr};
use dormouse_ext4::write::{Unwatched, write};
use sha2::{Digest, Sha256};

use crate::build::build;
use crate::judge::{fsck, said};
use crate::sample;

fn told(image: &Path) -> String {
    said(Command::new("dumpe2fs").arg("-h").arg(image))
}

/// A field that dumpe2fs tells.
fn field<'a>(told: &'a str, name: &str) -> &'a str {
    let line = told.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    line.unwrap_or_else(|| panic!("no {name} in {told}")).trim()
}

fn number(told: &str, name: &str) -> u64 {
    field(told, name).parse().unwrap()
}

#[test]
fn what_is_chosen_is_told() {
    let dir = tempfile::tempdir().unwrap();
    let (source, image) = (dir.path().join("source"), dir.path().join("image"));
    fs::create_dir(&source).unwrap();
    fs::write(source.join("file"), b"content").unwrap();
    let options = Options {
        label: "sixteen bytes ok".to_owned(),
        uuid: Uuid::Given(*b"0123456789abcdef"),
        journal: Journal::Bytes(16 << 20),
        reserved_percent: 5,
        inodes: Some(100_000),
        epoch: Some(1_700_000_000),
        ..Options::new(Size::Exactly(1 << 30))
    };
    build(&source, &image, &options);
    fsck(&image);
    let text = told(&image);
    assert_eq!(field(&text, "Filesystem volume name"), "sixteen bytes ok");
    assert_eq!(field(&text, "Filesystem UUID"), "30313233-3435-3637-3839-616263646566");
    assert_eq!(number(&text, "Block count"), (1 << 30) / 4096);
    assert_eq!(number(&text, "Block size"), 4096);
    assert_eq!(number(&text, "Reserved block count"), (1 << 30) / 4096 / 100 * 5);
    assert_eq!(number(&text, "Inode size"), 256);
    assert_eq!(number(&text, "Journal inode"), 8);
    assert_eq!(number(&text, "Total journal blocks"), (16 << 20) / 4096);
    assert!((100_000..110_000).contains(&number(&text, "Inode count")), "{text}");
    assert_eq!(field(&text, "Filesystem state"), "clean");
    let features: Vec<&str> = field(&text, "Filesystem features").split_whitespace().collect();
    for feature in [
        "has_journal",
        "ext_attr",
        "resize_inode",
        "dir_index",
        "filetype",
        "extent",
        "64bit",
        "flex_bg",
        "sparse_super",
        "large_file",
        "huge_file",
        "dir_nlink",
        "extra_isize",
        "metadata_csum",
        "metadata_csum_seed",
    ] {
        assert!(features.contains(&feature), "{feature} is not among {features:?}");
    }

    let bare = dir.path().join("bare");
    let without = Options { journal: Journal::None, ..Options::new(Size::Exactly(64 << 20)) };
    build(&source, &bare, &without);
    fsck(&bare);
    let text = told(&bare);
    assert!(!field(&text, "Filesystem features").contains("has_journal"));
    assert_eq!(field(&text, "Filesystem volume name"), "<none>");
    assert_eq!(number(&text, "Reserved block count"), 0);
    assert!(Sha256::digest(field(&text, "Filesystem UUID")) != Sha256::digest(""));
}

#[test]
fn what_cannot_be_is_refused() {
    let small = Size::Exactly(64 << 20);
    for options in [
        Options { label: "seventeen bytes!!".to_owned(), ..Options::new(small) },
        Options { journal: Journal::Bytes(1 << 20), ..Options::new(small) },
        Options { reserved_percent: 51, ..Options::new(small) },
        Options::new(Size::Exactly(1 << 19)),
        Options { journal: Journal::Bytes(64 << 20), ..Options::new(small) },
        Options { inodes: Some(u32::MAX), ..Options::new(small) },
    ] {
        let mut tree = Tree::new();
        let planned = Layout::plan(&mut tree, &options, &Staged::nothing());
        assert!(planned.is_err(), "{options:?}");
    }
}

/// Inode tables and the journal's log are holes, groups in no use are not initialised, and of what
/// is written no block is zero.
#[test]
fn nothing_zero_is_written() {
    let dir = tempfile::tempdir().unwrap();
    let (source, image) = (dir.path().join("source"), dir.path().join("image"));
    fs::create_dir(&source).unwrap();
    sample::fill(&source);
    build(&source, &image, &Options::new(Size::Exactly(100 << 30)));
    fsck(&image);
    let file = File::open(&image).unwrap();
    let mut block = vec![0; 4096];
    for extent in dormouse_sys::sparse::data_extents(&file, 0..100 << 30) {
        let extent = extent.unwrap();
        assert!(extent.start % 4096 == 0 && extent.end % 4096 == 0, "{extent:?}");
        for at in extent.step_by(4096) {
            file.read_exact_at(&mut block, at).unwrap();
            assert!(block.iter().any(|&byte| byte != 0), "the block at {at} is zero");
        }
    }
    // Five MiB of content, and little more: tables and journal would take 2 GiB.
    assert!(file.metadata().unwrap().blocks() * 512 < 24 << 20);
    let text = said(Command::new("dumpe2fs").arg(&image));
    let groups = text.lines().filter(|line| line.contains(": (Blocks ")).count();
    let unused = text.matches("INODE_UNINIT, BLOCK_UNINIT").count();
    assert!(groups == 800 && unused > 700, "{unused} of {groups} are not initialised");
}

/// A tree of everything, with all that could differ between machines fixed.
fn fixed() -> Tree {
    let plain = |mode, seconds| Attributes {
        mode,
        uid: 1000,
        gid: 70_000,
        mtime: Time { seconds, nanoseconds: 5 },
    };
    let mut tree = Tree::new();
    let mut contents = InMemory::default();
    let (one, large) = (contents.push(b"one".to_vec()), contents.push(sample::noise(3 << 20, 9)));
    let source = tree.add_source(std::sync::Arc::new(contents)).unwrap();
    let many = tree.add(ROOT, b"many", 0, &plain(0o1777, 7), Kind::Folder).unwrap();
    for index in 0..500 {
        let name = format!("entry-{index}");
        tree.add(many, name.as_bytes(), 0, &plain(0o600, index), Kind::Fifo).unwrap();
    }
    let file = |bytes, key| Kind::File { bytes, content: FileId::new(source, key), data: None };
    let first = tree.add(ROOT, b"one", 0, &plain(0o4755, -9), file(3, one)).unwrap();
    tree.link(many, b"again", 0, first).unwrap();
    let second = tree.add(ROOT, b"large", 0, &plain(0o644, 1 << 33), file(3 << 20, large)).unwrap();
    let xattr = |name: &str, len| Xattr { name: name.into(), value: sample::noise(len, 3) };
    tree.set_xattrs(second, vec![xattr("user.b", 2000), xattr("user.a", 3)]).unwrap();
    tree.add(ROOT, b"link", 0, &plain(0o777, 1), Kind::Symlink(&[b'x'; 100])).unwrap();
    let null = Kind::CharDevice { major: 1, minor: 3 };
    tree.add(ROOT, b"null", 0, &plain(0o666, 1), null).unwrap();
    tree
}

/// The digest stands for every machine, kernel and version: if it has to change, so do all images
/// that anybody compares, and the changelog says so.
#[test]
fn the_bytes_are_the_same_for_ever() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image");
    let mut tree = fixed();
    let options = Options { epoch: Some(1 << 33), ..Options::new(Size::Exactly(256 << 20)) };
    let layout = Layout::plan(&mut tree, &options, &Staged::nothing()).unwrap();
    let file = File::options().read(true).write(true).create_new(true).open(&path).unwrap();
    write(&tree, &layout, &file, &Unwatched).unwrap();
    fsck(&path);
    let digest = Sha256::digest(fs::read(&path).unwrap());
    let hex: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
    assert_eq!(hex, "7490a407555528d8f43f1cee7cd16a7fd7fc6b560e56bd7b2c5e0cafd3c4586c");
}
