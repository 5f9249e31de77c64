//! Images that a sink takes, as a store does: never back, and the bytes are those of the file.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use dormouse_ext4::error::Result;
use dormouse_ext4::input::{Limits, folder};
use dormouse_ext4::layout::{Layout, Options, Size, Uuid};
use dormouse_ext4::sink::Sink;
use dormouse_ext4::stage::{Stage, Staged};
use dormouse_ext4::tree::{ROOT, Tree};
use dormouse_ext4::write::{LazyImage, Run, Unwatched};

use crate::archive::{self, apply_all};
use crate::build::build;
use crate::hostile::{Member, file, folder as folder_of, link, tar};
use crate::judge::fsck;
use crate::sample;

/// Takes what comes, as long as it comes in order and in whole blocks.
struct Ascending<'a> {
    file: &'a File,
    end: u64,
}

impl Ascending<'_> {
    fn new(file: &File) -> Ascending<'_> {
        Ascending { file, end: 0 }
    }
}

impl Sink for Ascending<'_> {
    fn write(&mut self, bytes: &[u8], offset: u64) -> io::Result<()> {
        assert!(offset >= self.end, "{offset} comes after {}", self.end);
        if offset > self.end {
            assert_eq!(
                (offset % 4096, self.end % 4096),
                (0, 0),
                "a run ends and begins in a block"
            );
        }
        self.end = offset + bytes.len() as u64;
        self.file.write_all_at(bytes, offset)
    }
}

/// Writes an image by way of sinks; `read` fills the tree.
pub(crate) fn write(
    image: &Path,
    options: &Options,
    read: impl FnOnce(&mut Stage<'_>) -> Result<Tree>,
) -> Result<()> {
    let file = File::options().read(true).write(true).create_new(true).open(image).unwrap();
    let mut contents = Ascending::new(&file);
    let mut stage = Stage::into_sink(&mut contents, options.size);
    let mut tree = read(&mut stage)?;
    let staged = stage.finish()?;
    let layout = Layout::plan(&mut tree, options, &staged)?;
    write_rest(tree, &layout, &file)
}

/// Writes metadata, and over it what a sink is not given.
fn write_rest(tree: Tree, layout: &Layout, file: &File) -> Result<()> {
    file.set_len(layout.size_bytes()).unwrap();
    let mut metadata = Ascending::new(file);
    let (lazy, _) = LazyImage::new(tree, layout, &mut metadata, &Unwatched)?;
    assert_eq!(metadata.end % 4096, 0);
    let mut end = 0;
    let walked = lazy.for_each_run(&mut |range, run| {
        assert!(range.start >= end && range.end > range.start, "{range:?} after {end}");
        assert!(range.start % 4096 == 0 && range.end % 4096 == 0, "{range:?}");
        end = range.end;
        let mut at = range.start;
        while at < range.end {
            // In pieces that begin and end anywhere.
            let mut piece = vec![0; usize::try_from((range.end - at).min(77_777)).unwrap()];
            if run == Run::Data {
                lazy.read_at(&mut piece, at)?;
            }
            file.write_all_at(&piece, at)?;
            at += piece.len() as u64;
        }
        Ok(())
    });
    walked.unwrap();
    Ok(())
}

fn assert_equal(a: &Path, b: &Path) {
    let (a, b) = (fs::read(a).unwrap(), fs::read(b).unwrap());
    assert_eq!(a.len(), b.len());
    let differing = a.chunks(4096).zip(b.chunks(4096)).position(|(a, b)| a != b);
    assert_eq!(differing, None, "the first block that differs");
}

/// Both ways for a few sizes.
fn check(layers: &[Vec<u8>]) {
    let dir = tempfile::tempdir().unwrap();
    let (one, other) = (dir.path().join("one"), dir.path().join("other"));
    for options in [
        Options::new(Size::Slack(0)),
        Options { uuid: Uuid::Given([7; 16]), ..Options::new(Size::Slack(300 << 20)) },
        Options::new(Size::Exactly(1 << 30)),
    ] {
        archive::build(archive::from_bytes(layers), &one, &options).unwrap();
        write(&other, &options, |stage| apply_all(stage, archive::from_bytes(layers))).unwrap();
        fsck(&other);
        assert_equal(&one, &other);
        fs::remove_file(&one).unwrap();
        fs::remove_file(&other).unwrap();
    }
}

#[test]
fn a_tar_is_the_same_through_a_sink() {
    let dir = tempfile::tempdir().unwrap();
    let (source, archive) = (dir.path().join("source"), dir.path().join("archive"));
    fs::create_dir(&source).unwrap();
    sample::fill(&source);
    archive::tar(&source, &archive, &["--format=posix", "--sparse"]);
    check(&[fs::read(&archive).unwrap()]);
}

/// More than a group of 128 MiB, so that contents are cut by a copy of the superblock.
#[test]
fn many_groups_are_the_same_through_a_sink() {
    let dir = tempfile::tempdir().unwrap();
    let (source, archive) = (dir.path().join("source"), dir.path().join("archive"));
    fs::create_dir(&source).unwrap();
    for index in 0..5 {
        fs::write(source.join(format!("{index}")), sample::noise(37 << 20, index)).unwrap();
    }
    archive::tar(&source, &archive, &["--format=posix"]);
    check(&[fs::read(&archive).unwrap()]);
}

/// What lower layers had and upper ones hide, replace and link to.
#[test]
fn what_layers_remove_is_gone_through_a_sink() {
    let large = "x".repeat(300_000);
    let lower = tar(&[
        folder_of("etc"),
        file("etc/a", &large),
        file("etc/b", "kept"),
        file("etc/b", "written twice in one layer"),
        folder_of("opt"),
        file("opt/one", &large),
        file("opt/two", "2"),
        link("linked", b'1', "etc/a"),
        link("again", b'1', "opt/one"),
    ]);
    let upper = tar(&[
        // Goes on under its other name.
        file("etc/.wh.a", ""),
        file("opt/.wh..wh..opq", ""),
        file("opt/three", "3"),
        file("etc/b", &large),
        link("etc/c", b'1', "again"),
    ]);
    let top = tar(&[file(".wh.opt", ""), file(".wh.linked", ""), file("last", "4")]);
    check(std::slice::from_ref(&lower));
    check(&[lower.clone(), upper.clone()]);
    check(&[lower, upper, top]);
}

/// Blocks that were given out and are free again lie between, before and behind those in use.
#[test]
fn every_other_file_may_go() {
    let names: Vec<String> = (0..200).map(|index| format!("{index:03}")).collect();
    let content = "y".repeat(9000);
    let lower: Vec<Member<'_>> = names.iter().map(|name| file(name, &content)).collect();
    for remainder in [0, 1] {
        let hidden: Vec<String> =
            names.iter().skip(remainder).step_by(2).map(|name| format!(".wh.{name}")).collect();
        let upper: Vec<Member<'_>> = hidden.iter().map(|name| file(name, "")).collect();
        check(&[tar(&lower), tar(&upper)]);
    }
    let all: Vec<String> = names.iter().map(|name| format!(".wh.{name}")).collect();
    let upper: Vec<Member<'_>> = all.iter().map(|name| file(name, "")).collect();
    check(&[tar(&lower), tar(&upper)]);
}

#[test]
fn a_folder_is_the_same_though_it_is_read_later() {
    let dir = tempfile::tempdir().unwrap();
    let source = dir.path().join("source");
    fs::create_dir(&source).unwrap();
    sample::fill(&source);
    // Cut by a copy of the superblock.
    fs::write(source.join("large"), sample::noise(150 << 20, 3)).unwrap();
    for options in [Options::new(Size::Exactly(400 << 20)), Options::new(Size::Slack(0))] {
        let (one, other) = (dir.path().join("one"), dir.path().join("other"));
        build(&source, &one, &options);
        let mut tree = Tree::new();
        folder::read(&mut tree, ROOT, &source, &Limits::STANDARD, None, &Unwatched).unwrap();
        let layout = Layout::plan(&mut tree, &options, &Staged::nothing()).unwrap();
        let file = File::options().read(true).write(true).create_new(true).open(&other).unwrap();
        write_rest(tree, &layout, &file).unwrap();
        assert_equal(&one, &other);
        fs::remove_file(&one).unwrap();
        fs::remove_file(&other).unwrap();
    }
}

/// Whoever asks for what is not there is told so.
#[test]
fn bytes_between_the_runs_are_not_read() {
    let mut tree = Tree::new();
    let layout =
        Layout::plan(&mut tree, &Options::new(Size::Slack(0)), &Staged::nothing()).unwrap();
    let taken = tempfile::tempfile().unwrap();
    let (lazy, _) = LazyImage::new(tree, &layout, &mut &taken, &Unwatched).unwrap();
    let mut block = [0; 4096];
    lazy.read_at(&mut block, 0).unwrap();
    assert_eq!(block[1024 + 0x38..1024 + 0x3a], [0x53, 0xef]);
    assert!(lazy.read_at(&mut block, 4096).unwrap_err().to_string().contains("byte 4096"));
}
