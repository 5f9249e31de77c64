//! Whether an image is behind a loop device, so that a mounted file system may be in it.

use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use anyhow::{Context, Result};

/// Where the kernel lists its block devices.
const DEVICES: &str = "/sys/block";

/// The loop device that a file is behind, if the kernel tells of one.
pub(super) fn loop_device(image: &Path) -> Result<Option<String>> {
    let metadata = fs::metadata(image).with_context(|| format!("open {}", image.display()))?;
    Ok(find(Path::new(DEVICES), (metadata.dev(), metadata.ino())))
}

/// The loop device of a file, by its device and inode. Paths are those of whoever set it up, so one
/// that cannot be found says nothing: another mount namespace may have it.
fn find(devices: &Path, image: (u64, u64)) -> Option<String> {
    let entries = fs::read_dir(devices).ok()?;
    entries.filter_map(io::Result::ok).find_map(|entry| {
        let name = entry.file_name().into_string().ok().filter(|name| name.starts_with("loop"))?;
        let backing = fs::read(entry.path().join("loop/backing_file")).ok()?;
        let backing = backing.strip_suffix(b"\n").unwrap_or(&backing);
        let metadata = fs::metadata(std::ffi::OsStr::from_bytes(backing)).ok()?;
        ((metadata.dev(), metadata.ino()) == image).then(|| format!("/dev/{name}"))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `put` and `rm` changed images that were mounted, and the kernel wrote its own over it.
    #[test]
    fn a_file_behind_a_loop_device_is_found_by_any_of_its_names() {
        let dir = tempfile::tempdir().unwrap();
        let (image, other) = (dir.path().join("image"), dir.path().join("other name"));
        fs::write(&image, b"1").unwrap();
        fs::hard_link(&image, &other).unwrap();
        let metadata = fs::metadata(&image).unwrap();
        let id = (metadata.dev(), metadata.ino());
        let devices = dir.path().join("block");
        for (name, backing) in [("sda", ""), ("loop0", ""), ("loop1", "/gone (deleted)")] {
            fs::create_dir_all(devices.join(name).join("loop")).unwrap();
            if !backing.is_empty() {
                fs::write(devices.join(name).join("loop/backing_file"), backing).unwrap();
            }
        }
        assert_eq!(find(&devices, id), None);
        fs::create_dir_all(devices.join("loop7/loop")).unwrap();
        let text = [other.as_os_str().as_bytes(), b"\n"].concat();
        fs::write(devices.join("loop7/loop/backing_file"), text).unwrap();
        assert_eq!(find(&devices, id).as_deref(), Some("/dev/loop7"));
        assert_eq!(find(&devices, (id.0, id.1 + 1)), None);
        assert_eq!(find(&dir.path().join("none"), id), None);
    }
}
