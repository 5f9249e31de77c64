//! Tars: what GNU tar packs, in all its formats, packed and from a pipe.

use std::fs::{self, File};
use std::io::{self, Cursor, Read};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;

use dormouse_ext4::error::Result;
use dormouse_ext4::input::Limits;
use dormouse_ext4::input::layers::{Layer, Whiteouts, apply};
use dormouse_ext4::layout::{Layout, Options, Size};
use dormouse_ext4::stage::Stage;
use dormouse_ext4::tree::Tree;
use dormouse_ext4::write::{Unwatched, write};

use crate::judge::{Mount, assert_same, fsck, said, walk};
use crate::sample;

/// Streams to be applied one over the other.
pub(crate) type Streams = Vec<Box<dyn FnOnce() -> io::Result<Box<dyn Read + Send>> + Send>>;

/// Builds an image of streams.
pub(crate) fn build(streams: Streams, image: &Path, options: &Options) -> Result<()> {
    let file = File::options().read(true).write(true).create_new(true).open(image).unwrap();
    let file = Arc::new(file);
    let mut stage = Stage::new(Arc::clone(&file), options.size);
    let mut tree = apply_all(&mut stage, streams)?;
    let staged = stage.finish()?;
    let layout = Layout::plan(&mut tree, options, &staged)?;
    write(&tree, &layout, &file, &Unwatched)?;
    Ok(())
}

/// Applies one stream, or several as layers.
pub(crate) fn apply_all(stage: &mut Stage<'_>, streams: Streams) -> Result<Tree> {
    let whiteouts = if streams.len() > 1 { Whiteouts::Apply } else { Whiteouts::Plain };
    let mut tree = Tree::new();
    for (number, stream) in (0u16..).zip(streams) {
        let label = format!("stream {number}");
        let layer = Layer { label: &label, number, whiteouts };
        apply(&mut tree, stage, stream, layer, &Limits::STANDARD, &Unwatched)?;
    }
    Ok(tree)
}

pub(crate) fn from_file(path: &Path) -> Streams {
    let path = path.to_owned();
    vec![Box::new(move || Ok(Box::new(File::open(path)?)))]
}

pub(crate) fn from_bytes(layers: &[Vec<u8>]) -> Streams {
    let streams = layers.iter().cloned().map(|layer| {
        let open = move || Ok(Box::new(Cursor::new(layer)) as Box<dyn Read + Send>);
        Box::new(open) as Box<dyn FnOnce() -> io::Result<Box<dyn Read + Send>> + Send>
    });
    streams.collect()
}

pub(crate) fn tar(source: &Path, archive: &Path, options: &[&str]) {
    let mut command = Command::new("tar");
    command.arg("-C").arg(source).args(["--numeric-owner", "--xattrs", "--xattrs-include=*"]);
    command.args(options).arg("-cf").arg(archive).arg(".");
    // It warns that it leaves sockets out.
    said(&mut command);
}

#[test]
fn the_kernel_sees_what_was_in_the_tar() {
    let dir = tempfile::tempdir().unwrap();
    let source = dir.path().join("source");
    fs::create_dir(&source).unwrap();
    sample::fill(&source);
    let mut expected = walk(&source);
    expected.retain(|seen| !seen.is_socket());
    let (archive, image) = (dir.path().join("archive"), dir.path().join("image"));
    for options in [
        &["--format=posix", "--sparse"][..],
        &["--format=posix", "--sparse", "--sparse-version=0.0", "--gzip"],
        &["--format=posix", "--sparse", "--sparse-version=0.1", "--zstd"],
    ] {
        tar(&source, &archive, options);
        build(from_file(&archive), &image, &Options::new(Size::Slack(0))).unwrap();
        fsck(&image);
        let mount = Mount::new(&image, &dir.path().join("mount"), "ro");
        assert_same(&expected, &walk(&mount.0));
        drop(mount);
        fs::remove_file(&image).unwrap();
        fs::remove_file(&archive).unwrap();
    }

    // The older format has neither nanoseconds nor attributes.
    tar(&source, &archive, &["--format=gnu", "--sparse", "--no-xattrs"]);
    build(from_file(&archive), &image, &Options::new(Size::Exactly(1 << 30))).unwrap();
    fsck(&image);
    let mount = Mount::new(&image, &dir.path().join("mount"), "ro");
    let mut found = walk(&mount.0);
    for seen in expected.iter_mut().chain(&mut found) {
        seen.mtime.1 = 0;
        seen.xattrs.clear();
        // What the mask of an access control list makes of a group's permissions.
        seen.mode &= !0o070;
    }
    assert_same(&expected, &found);
}

#[test]
fn from_a_pipe_and_over_many_groups() {
    let dir = tempfile::tempdir().unwrap();
    let source = dir.path().join("source");
    fs::create_dir(&source).unwrap();
    // More than a group of 128 MiB, so that contents are cut by a copy of the superblock.
    for index in 0..5 {
        fs::write(source.join(format!("{index}")), sample::noise(37 << 20, index)).unwrap();
    }
    let expected = walk(&source);
    let mut command = Command::new("tar");
    command.arg("-C").arg(&source).args(["--format=posix", "-c", "."]).stdout(Stdio::piped());
    let mut child = command.spawn().unwrap();
    let pipe = child.stdout.take().unwrap();
    let image = dir.path().join("image");
    let streams: Streams = vec![Box::new(move || Ok(Box::new(pipe)))];
    build(streams, &image, &Options::new(Size::Slack(10 << 20))).unwrap();
    assert!(child.wait().unwrap().success());
    fsck(&image);
    let mount = Mount::new(&image, &dir.path().join("mount"), "ro");
    assert_same(&expected, &walk(&mount.0));
}

#[test]
fn the_same_tar_gives_the_same_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let source = dir.path().join("source");
    fs::create_dir(&source).unwrap();
    sample::fill(&source);
    let archive = dir.path().join("archive");
    tar(&source, &archive, &["--format=posix", "--sparse"]);
    let (first, second) = (dir.path().join("first"), dir.path().join("second"));
    for image in [&first, &second] {
        build(from_file(&archive), image, &Options::new(Size::Slack(0))).unwrap();
    }
    assert!(fs::read(&first).unwrap() == fs::read(&second).unwrap());
}
