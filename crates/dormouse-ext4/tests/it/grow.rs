//! Images that grow and shrink by resize2fs. That the kernel grows them while they are in use is
//! seen in a guest, as that needs a right that containers lack.

use std::fs::{self, File};
use std::path::Path;
use std::process::Command;

use dormouse_ext4::layout::{Options, Size};

use crate::build::build;
use crate::judge::{Mount, assert_same, fsck, said, walk};
use crate::sample;

fn lengthen(image: &Path, bytes: u64) {
    File::options().write(true).open(image).unwrap().set_len(bytes).unwrap();
}

fn source(dir: &Path) -> std::path::PathBuf {
    let source = dir.join("source");
    fs::create_dir(&source).unwrap();
    sample::fill(&source);
    source
}

#[test]
fn offline_to_ten_times() {
    let dir = tempfile::tempdir().unwrap();
    let source = source(dir.path());
    let expected = walk(&source);
    for size in [64u64 << 20, 300 << 20, 9 << 30] {
        let image = dir.path().join("image");
        build(&source, &image, &Options::new(Size::Exactly(size)));
        lengthen(&image, 10 * size);
        said(Command::new("resize2fs").arg(&image));
        fsck(&image);
        let text = said(Command::new("dumpe2fs").arg("-h").arg(&image));
        let blocks = text.lines().find_map(|line| line.strip_prefix("Block count:"));
        let blocks: u64 = blocks.unwrap().trim().parse().unwrap();
        assert!(blocks * 4096 > 10 * size - (128 << 20), "{blocks}");
        let mount = Mount::new(&image, &dir.path().join("mount"), "ro");
        assert_same(&expected, &walk(&mount.0));
        drop(mount);
        fs::remove_file(&image).unwrap();
    }
}

/// Shrinking moves what lies at the end, so it walks everything.
#[test]
fn shrunk_to_the_least() {
    let dir = tempfile::tempdir().unwrap();
    let source = source(dir.path());
    let expected = walk(&source);
    let image = dir.path().join("image");
    build(&source, &image, &Options::new(Size::Exactly(3 << 30)));
    said(Command::new("resize2fs").arg("-M").arg(&image));
    fsck(&image);
    let mount = Mount::new(&image, &dir.path().join("mount"), "ro");
    assert_same(&expected, &walk(&mount.0));
}
