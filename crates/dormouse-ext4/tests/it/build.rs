//! Images of folders: e2fsck finds nothing, and the kernel sees what was there.

use std::fs::{self, File};
use std::path::Path;
use std::process::Command;

use dormouse_ext4::input::{Limits, folder};
use dormouse_ext4::layout::{Layout, Options, Size};
use dormouse_ext4::stage::Staged;
use dormouse_ext4::tree::{ROOT, Tree};
use dormouse_ext4::write::{Report, Unwatched, write};

use crate::judge::{Mount, assert_same, fsck, said, walk};
use crate::sample;

/// Builds an image of a folder.
pub(crate) fn build(source: &Path, image: &Path, options: &Options) -> Report {
    let mut tree = Tree::new();
    folder::read(&mut tree, ROOT, source, &Limits::STANDARD, None, &Unwatched).unwrap();
    let layout = Layout::plan(&mut tree, options, &Staged::nothing()).unwrap();
    let file = File::options().read(true).write(true).create_new(true).open(image).unwrap();
    write(&tree, &layout, &file, &Unwatched).unwrap()
}

#[test]
fn an_empty_image_of_every_size() {
    let dir = tempfile::tempdir().unwrap();
    let source = dir.path().join("source");
    fs::create_dir(&source).unwrap();
    let mib = [1u64, 4, 7, 8, 64, 127, 128, 129, 131, 1000, 2048, 40_000, 65_536, 1 << 20];
    for size in mib {
        let image = dir.path().join("image");
        build(&source, &image, &Options::new(Size::Exactly(size << 20)));
        fsck(&image);
        fs::remove_file(&image).unwrap();
    }
    let image = dir.path().join("image");
    build(&source, &image, &Options::new(Size::Slack(0)));
    fsck(&image);
    assert!(image.metadata().unwrap().len() < 4 << 20);
}

#[test]
fn the_kernel_sees_what_was_in_the_folder() {
    let dir = tempfile::tempdir().unwrap();
    let source = dir.path().join("source");
    fs::create_dir(&source).unwrap();
    sample::fill(&source);
    let expected = walk(&source);
    for size in [Size::Slack(0), Size::Slack(300 << 20), Size::Exactly(20 << 30)] {
        let image = dir.path().join("image");
        build(&source, &image, &Options::new(size));
        fsck(&image);
        let mount = Mount::new(&image, &dir.path().join("mount"), "ro");
        assert_same(&expected, &walk(&mount.0));
        drop(mount);
        fs::remove_file(&image).unwrap();
    }
}

/// What `mke2fs -d` makes of a folder shows the same as what we make.
#[test]
fn mke2fs_makes_the_same_of_it() {
    let dir = tempfile::tempdir().unwrap();
    let source = dir.path().join("source");
    fs::create_dir(&source).unwrap();
    sample::fill(&source);
    let (ours, theirs) = (dir.path().join("ours"), dir.path().join("theirs"));
    build(&source, &ours, &Options::new(Size::Exactly(1 << 30)));
    let mut mke2fs = Command::new("mke2fs");
    mke2fs.args(["-q", "-F", "-t", "ext4", "-d"]).arg(&source).arg(&theirs).arg("1G");
    said(&mut mke2fs);
    let (first, second) = (
        Mount::new(&ours, &dir.path().join("first"), "ro"),
        Mount::new(&theirs, &dir.path().join("second"), "ro"),
    );
    let [mut ours, mut theirs] = [walk(&first.0), walk(&second.0)];
    for seen in ours.iter_mut().chain(&mut theirs) {
        // mke2fs 1.47 keeps seconds of 32 bits only, and the root's own attributes are not its
        // source's.
        seen.mtime = (0, 0);
        if seen.path.is_empty() {
            (seen.mode, seen.owner) = (0, (0, 0));
        }
    }
    assert_same(&theirs, &ours);
}
