//! Random trees: e2fsck finds nothing, our reader and the kernel see what went in.

use std::fs;
use std::path::Path;

use dormouse_ext4::layout::{Journal, Options, Size};
use proptest::prelude::*;

use crate::build::build;
use crate::judge::{Mount, assert_same, fsck, walk};
use crate::sample::noise;

#[derive(Clone, Debug)]
enum Thing {
    Folder(u8, String),
    File(u8, String, u32, u64),
    Sparse(u8, String, Vec<u16>),
    Symlink(u8, String, usize),
    Link(u8, String, u8),
}

fn name() -> impl Strategy<Value = String> {
    prop_oneof!["[a-z]{1,3}", "[a-z\u{e4}\u{20ac}]{60,80}"]
}

fn thing() -> impl Strategy<Value = Thing> {
    let at = any::<u8>();
    prop_oneof![
        (at, name()).prop_map(|(at, name)| Thing::Folder(at, name)),
        (at, name(), 0u32..200_000, any::<u64>())
            .prop_map(|(at, name, len, seed)| Thing::File(at, name, len, seed)),
        (at, name(), prop::collection::vec(any::<u16>(), 0..30))
            .prop_map(|(at, name, blocks)| Thing::Sparse(at, name, blocks)),
        (at, name(), 1usize..300).prop_map(|(at, name, len)| Thing::Symlink(at, name, len)),
        (at, name(), any::<u8>()).prop_map(|(at, name, to)| Thing::Link(at, name, to)),
    ]
}

/// Makes what can be made; what is in the way of itself is left out.
fn make(root: &Path, things: &[Thing]) {
    use std::os::unix::fs::FileExt;
    let mut folders = vec![root.to_owned()];
    let mut files = Vec::new();
    for thing in things {
        let (at, name) = match thing {
            Thing::Folder(at, name)
            | Thing::File(at, name, ..)
            | Thing::Sparse(at, name, _)
            | Thing::Symlink(at, name, _)
            | Thing::Link(at, name, _) => (at, name),
        };
        let path = folders[usize::from(*at) % folders.len()].join(name);
        if path.symlink_metadata().is_ok() {
            continue;
        }
        match thing {
            Thing::Folder(..) => {
                fs::create_dir(&path).unwrap();
                folders.push(path);
            }
            Thing::File(_, _, len, seed) => {
                fs::write(&path, noise(usize::try_from(*len).unwrap(), *seed)).unwrap();
                files.push(path);
            }
            Thing::Sparse(_, _, blocks) => {
                let file = fs::File::create(&path).unwrap();
                file.set_len(300 << 20).unwrap();
                for block in blocks {
                    file.write_all_at(&[7; 4096], u64::from(*block) * 4096).unwrap();
                }
                files.push(path);
            }
            Thing::Symlink(_, _, len) => {
                std::os::unix::fs::symlink("t".repeat(*len), &path).unwrap();
            }
            Thing::Link(_, _, to) if !files.is_empty() => {
                fs::hard_link(&files[usize::from(*to) % files.len()], &path).unwrap();
            }
            Thing::Link(..) => {}
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 12, ..ProptestConfig::default() })]

    #[test]
    fn what_goes_in_is_seen(
        things in prop::collection::vec(thing(), 0..120),
        slack in 0u64..200,
        journal in prop_oneof![Just(Journal::None), Just(Journal::Standard)],
        inodes in prop_oneof![Just(None), Just(Some(50_000u32))],
    ) {
        let dir = tempfile::tempdir().unwrap();
        let source = dir.path().join("source");
        fs::create_dir(&source).unwrap();
        make(&source, &things);
        let expected = walk(&source);
        let image = dir.path().join("image");
        let options = Options { journal, inodes, ..Options::new(Size::Slack(slack << 20)) };
        build(&source, &image, &options);
        fsck(&image);
        let mount = Mount::new(&image, &dir.path().join("mount"), "ro");
        assert_same(&expected, &walk(&mount.0));
    }
}
