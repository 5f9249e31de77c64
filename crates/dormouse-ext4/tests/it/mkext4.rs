//! The same folder through `mkext4`, another writer: the kernel sees the same of both images.

use std::collections::HashMap;
use std::fs::{self, File};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use dormouse_ext4::layout::{Options, Size};
use mkext4::{FsBuilder, InodeCount, InodeHandle, Meta, Options as Theirs, SparseSeg, SpecialKind};

use crate::build::build;
use crate::judge::{Mount, assert_same, fsck, walk};
use crate::sample;

const IMAGE_BYTES: u64 = 1 << 30;

/// What is declared of a folder, and the files that are to be filled.
struct Declared {
    builder: FsBuilder,
    links: HashMap<(u64, u64), InodeHandle>,
    files: Vec<(InodeHandle, PathBuf)>,
}

impl Declared {
    fn folder(&mut self, at: InodeHandle, path: &Path) {
        let mut entries: Vec<_> = fs::read_dir(path).unwrap().map(Result::unwrap).collect();
        entries.sort_by_key(fs::DirEntry::file_name);
        for entry in entries {
            let name = entry.file_name().into_string().unwrap();
            let metadata = entry.path().symlink_metadata().unwrap();
            let id = (metadata.dev(), metadata.ino());
            if let Some(&known) = self.links.get(&id) {
                self.builder.hardlink(at, &name, known).unwrap();
                continue;
            }
            let meta = meta(&metadata);
            let kind = metadata.file_type();
            let handle = if kind.is_dir() {
                let below = self.builder.mkdir(at, &name, meta).unwrap();
                self.folder(below, &entry.path());
                below
            } else if kind.is_symlink() {
                let target = fs::read_link(entry.path()).unwrap();
                self.builder.symlink(at, &name, target.to_str().unwrap(), meta).unwrap()
            } else if kind.is_file() {
                self.file(at, &name, &entry.path(), meta)
            } else {
                let device = metadata.rdev();
                let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
                let special = if kind.is_char_device() {
                    SpecialKind::Char { major, minor }
                } else if kind.is_block_device() {
                    SpecialKind::Block { major, minor }
                } else if kind.is_fifo() {
                    SpecialKind::Fifo
                } else {
                    SpecialKind::Socket
                };
                self.builder.mknod(at, &name, meta, special).unwrap()
            };
            self.links.insert(id, handle);
            for (key, value) in crate::judge::xattrs(&entry.path()) {
                self.builder.set_xattr(handle, str::from_utf8(&key).unwrap(), &value).unwrap();
            }
        }
    }

    fn file(&mut self, at: InodeHandle, name: &str, path: &Path, meta: Meta) -> InodeHandle {
        let file = File::open(path).unwrap();
        let bytes = file.metadata().unwrap().len();
        let mut segments = Vec::new();
        let mut end = 0;
        for extent in dormouse_sys::sparse::data_extents(&file, 0..bytes) {
            let extent = extent.unwrap();
            if extent.start > end {
                segments.push(SparseSeg::Hole(extent.start - end));
            }
            segments.push(SparseSeg::Data(extent.end - extent.start));
            end = extent.end;
        }
        let has_data = !segments.is_empty();
        if end < bytes {
            segments.push(SparseSeg::Hole(bytes - end));
        }
        let handle = if bytes == 0 {
            self.builder.file(at, name, meta, 0).unwrap()
        } else {
            self.builder.file_sparse(at, name, meta, &segments).unwrap()
        };
        if has_data {
            self.files.push((handle, path.to_owned()));
        }
        handle
    }
}

fn meta(metadata: &fs::Metadata) -> Meta {
    let mode = u16::try_from(metadata.mode() & 0o7777).unwrap();
    let nanoseconds = u32::try_from(metadata.mtime_nsec()).unwrap();
    Meta::new(mode, metadata.uid(), metadata.gid(), (metadata.mtime(), nanoseconds))
}

/// A file's data without its holes, one piece after the other.
fn data_of(path: &Path) -> Vec<u8> {
    use std::os::unix::fs::FileExt;
    let file = File::open(path).unwrap();
    let bytes = file.metadata().unwrap().len();
    let mut data = Vec::new();
    for extent in dormouse_sys::sparse::data_extents(&file, 0..bytes) {
        let extent = extent.unwrap();
        let begin = data.len();
        data.resize(begin + usize::try_from(extent.end - extent.start).unwrap(), 0);
        file.read_exact_at(&mut data[begin..], extent.start).unwrap();
    }
    data
}

#[test]
fn another_writer_makes_the_same_of_it() {
    let dir = tempfile::tempdir().unwrap();
    let source = dir.path().join("source");
    fs::create_dir(&source).unwrap();
    sample::fill(&source);
    // It takes names that are text, and access control lists in the form on disk, only.
    for entry in fs::read_dir(&source).unwrap() {
        let path = entry.unwrap().path();
        if path.to_str().is_none() {
            fs::remove_file(path).unwrap();
        }
    }
    for name in ["system.posix_acl_access", "system.posix_acl_default"] {
        rustix::fs::lremovexattr(source.join("folder"), name).unwrap();
    }
    let (ours, theirs) = (dir.path().join("ours"), dir.path().join("theirs"));
    build(&source, &ours, &Options::new(Size::Exactly(IMAGE_BYTES)));

    let mut options = Theirs::new(IMAGE_BYTES, [7; 16], 1);
    options.inodes = InodeCount::Auto;
    let builder = FsBuilder::new(options).unwrap();
    let mut declared = Declared { builder, links: HashMap::new(), files: Vec::new() };
    declared.folder(mkext4::ROOT, &source);
    let root = meta(&source.metadata().unwrap());
    declared.builder.set_meta(mkext4::ROOT, root).unwrap();
    let layout = declared.builder.seal().unwrap();
    let mut sink = mkext4::sink::FileSink::create(&theirs, IMAGE_BYTES).unwrap();
    let mut writer = layout.writer(&mut sink).unwrap();
    for (handle, path) in declared.files {
        writer.fill(handle, &mut &data_of(&path)[..]).unwrap();
    }
    writer.finish().unwrap();
    fsck(&ours);
    fsck(&theirs);
    let first = Mount::new(&ours, &dir.path().join("first"), "ro");
    let second = Mount::new(&theirs, &dir.path().join("second"), "ro");
    assert_same(&walk(&second.0), &walk(&first.0));
}
