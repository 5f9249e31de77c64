//! Contents that go past the page cache: many, and with zeros, short runs and odd lengths among them.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::process::Command;

use dormouse_ext4::layout::{Options, Size};

use crate::archive;
use crate::build::build;
use crate::judge::{Mount, assert_same, fsck, said, walk};
use crate::sample::noise;

#[test]
fn many_contents_arrive_from_folders_and_streams() {
    // On a file system with direct I/O as well as on one that may have none.
    for place in [std::env::temp_dir(), "/dev/shm".into()] {
        let dir = tempfile::tempdir_in(place).unwrap();
        let source = dir.path().join("source");
        fs::create_dir(&source).unwrap();
        for index in 0..60u64 {
            let len = 1_500_000 + usize::try_from(index).unwrap() * 4097;
            let mut bytes = noise(len, index);
            // Runs of zeros of a block and more, in every phase to what is gathered.
            for at in (0..bytes.len() - 70_000).step_by(300_000 + len / 50) {
                bytes[at..at + 20_000].fill(0);
            }
            fs::write(source.join(format!("{index:03}")), bytes).unwrap();
        }
        let file = File::create(source.join("pieces")).unwrap();
        for index in 0..300 {
            file.write_all_at(b"piece", index * 50_000).unwrap();
        }
        drop(file);
        rustix::fs::sync();
        let expected = walk(&source);
        let image = dir.path().join("image");
        build(&source, &image, &Options::new(Size::Slack(0)));
        fsck(&image);
        let mount = Mount::new(&image, &dir.path().join("mount"), "ro");
        assert_same(&expected, &walk(&mount.0));
        drop(mount);

        let (archive, stream) = (dir.path().join("tar"), dir.path().join("stream"));
        let mut pack = Command::new("tar");
        pack.arg("-C").arg(&source).args(["--format=posix", "--sparse", "-cf"]);
        said(pack.arg(&archive).arg("."));
        let options = Options::new(Size::Slack(0));
        archive::build(archive::from_file(&archive), &stream, &options).unwrap();
        fsck(&stream);
        let mount = Mount::new(&stream, &dir.path().join("mount"), "ro");
        assert_same(&expected, &walk(&mount.0));
    }
}
