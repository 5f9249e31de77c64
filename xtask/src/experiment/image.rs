//! The images that guests start from: mke2fs, filled under a mount of the host, as template builders do.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use dormouse_testkit::guest::Assets;

use super::layout::Layout;
use super::plan::{Mkfs, Recipe};
use crate::command::{output_of, privileged};

/// Large enough for inode tables (1/64 of it) that would be noticed.
const DISK_SIZE: &str = "8G";
const DISK_UUID: &str = "6d6f7573-6500-4000-8000-000065787434";
/// Pure Python, so the same on every machine of a suite: 5,018 files.
const PACKAGES: [&str; 2] = ["python3-django", "python3-sympy"];
pub(super) const FILES: usize = 5000;

/// The root's files, then a build step: an archive is written, all is read, the archive is removed.
const FILL: &str = "\
tar -C \"$1\" -cf - . | tar -C \"$2\" -xpf -
cp \"$3\" \"$2/srv/packages.tar.gz\"
seq 1000 | head -c 4096 > \"$2/srv/heartbeat\"
cd \"$2\"
tar --sort=name -cf - usr | gzip -1n > var/cache/build.tar.gz
sync -f .
find . -xdev -type f -print0 | xargs -0 cat > /dev/null
rm var/cache/build.tar.gz
sync -f .";

const PACKAGES_FOLDER: &str = "packages";
/// Where the root is mounted that images are filled from, and the image that is filled.
const ROOT_POINT: &str = "root";
const TARGET_POINT: &str = "target";

/// A filled image.
#[derive(Debug)]
pub(super) struct Image {
    pub(super) path: PathBuf,
    pub(super) layout: Layout,
}

/// Where images are made, and what they are made of.
#[derive(Debug)]
pub(super) struct Builder {
    dir: PathBuf,
    packages: PathBuf,
    root: Mounted,
}

impl Builder {
    pub(super) fn new(dir: &Path, assets: &Assets) -> Result<Builder> {
        let packages = pack_files(&dir.join(PACKAGES_FOLDER))?;
        let root = Mounted::new(&assets.disk(), &dir.join(ROOT_POINT), "ro,noload")?;
        Ok(Builder { dir: dir.to_owned(), packages, root })
    }

    pub(super) fn build(&self, recipe: Recipe) -> Result<Image> {
        let path = self.dir.join(format!("{}.img", recipe.name()));
        make_filesystem(&path, recipe.mkfs)?;
        let target = Mounted::new(&path, &self.dir.join(TARGET_POINT), recipe.build.options())?;
        output_of(
            privileged("sh")
                .args(["-ec", FILL, "sh"])
                .arg(&self.root.point)
                .arg(&target.point)
                .arg(&self.packages),
        )
        .context("cannot fill an image")?;
        target.unmount()?;
        output_of(Command::new(sbin("e2fsck")).arg("-fn").arg(&path))?;
        Ok(Image { layout: Layout::read(&path)?, path })
    }

    /// Block groups that a lazy mke2fs leaves to ext4lazyinit: in a file that it makes itself, and in
    /// one that was there, all holes.
    pub(super) fn lazy_groups(&self) -> Result<(u64, u64)> {
        let path = self.dir.join("empty.img");
        make_filesystem(&path, Mkfs::Lazy)?;
        let own = Layout::read(&path)?.lazy_groups;
        let size = fs::metadata(&path)?.len();
        fs::remove_file(&path)?;
        fs::File::create(&path)?.set_len(size)?;
        make_filesystem(&path, Mkfs::Lazy)?;
        let given = Layout::read(&path)?.lazy_groups;
        fs::remove_file(&path)?;
        Ok((own, given))
    }
}

fn make_filesystem(path: &Path, mkfs: Mkfs) -> Result<()> {
    let extended = format!("hash_seed={DISK_UUID},{}", mkfs.options());
    output_of(
        Command::new(sbin("mke2fs"))
            .args(["-q", "-F", "-t", "ext4", "-b", "4096", "-m", "0", "-U", DISK_UUID])
            .args(["-E", &extended])
            .arg(path)
            .arg(DISK_SIZE),
    )?;
    Ok(())
}

/// Unmounts what an experiment that was killed left mounted below `dir`.
pub(super) fn unmount_leftovers(dir: &Path) -> Result<()> {
    let mounts = fs::read_to_string("/proc/self/mounts")?;
    for point in [ROOT_POINT, TARGET_POINT].map(|point| dir.join(point)) {
        // Spaces and the like are escaped there; whoever has them in the path unmounts by hand.
        if mounts.lines().any(|line| line.split(' ').nth(1) == point.to_str()) {
            output_of(privileged("umount").arg(&point))?;
        }
    }
    Ok(())
}

/// Programs of e2fsprogs are in no ordinary user's PATH.
pub(super) fn sbin(name: &str) -> PathBuf {
    Path::new("/usr/sbin").join(name)
}

/// The first files of some packages, as the compressed archive that the guest unpacks.
fn pack_files(dir: &Path) -> Result<PathBuf> {
    fs::create_dir_all(dir)?;
    output_of(Command::new("apt-get").arg("download").args(PACKAGES).current_dir(dir))
        .context("cannot download the packages that the guest is to unpack")?;
    let script = format!(
        "for deb in *.deb; do dpkg-deb -x \"$deb\" tree; done
         (cd tree && find . -type f) | LC_ALL=C sort | head -n {FILES} > list
         tar -C tree --owner=0 --group=0 --mtime=@1700000000 -cf - -T list | gzip -9n > packages.tar.gz
         wc -l < list"
    );
    let files = output_of(Command::new("sh").args(["-ec", &script]).current_dir(dir))?;
    ensure!(files.trim() == FILES.to_string(), "the packages have {} files", files.trim());
    Ok(dir.join("packages.tar.gz"))
}

/// A mounted image; unmounted at the latest when it is dropped.
#[derive(Debug)]
struct Mounted {
    point: PathBuf,
    is_mounted: bool,
}

impl Mounted {
    fn new(image: &Path, point: &Path, options: &str) -> Result<Mounted> {
        fs::create_dir_all(point)?;
        let options = format!("loop,{options}");
        output_of(privileged("mount").args(["-t", "ext4", "-o", &options]).arg(image).arg(point))
            .context("cannot mount an image; the experiment needs loop devices")?;
        Ok(Mounted { point: point.to_owned(), is_mounted: true })
    }

    fn unmount(mut self) -> Result<()> {
        self.is_mounted = false;
        output_of(privileged("umount").arg(&self.point)).map(drop)
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        if self.is_mounted {
            // An error on the way out would hide the one that led here.
            let _ = output_of(privileged("umount").arg(&self.point));
        }
    }
}
