//! Block devices by number: sysfs, as `stat` tells the device of a file.

use std::ffi::OsString;
use std::fs;

use rustix::fs::{major, minor};

/// What the kernel calls the block device of a file system, as its folders in `/sys/fs` are called; none
/// where it is on no block device, or there is no sysfs.
pub fn kernel_name(device: u64) -> Option<OsString> {
    let link = fs::read_link(format!("/sys/dev/block/{}:{}", major(device), minor(device))).ok()?;
    Some(link.file_name()?.to_owned())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    #[test]
    fn a_file_system_on_no_block_device_has_none() {
        assert_eq!(kernel_name(fs::metadata("/proc").unwrap().dev()), None);
    }

    #[test]
    fn each_block_device_has_its_name() {
        for entry in fs::read_dir("/sys/class/block").unwrap() {
            let entry = entry.unwrap();
            let text = fs::read_to_string(entry.path().join("dev")).unwrap();
            let (one, two) = text.trim().split_once(':').unwrap();
            let device = rustix::fs::makedev(one.parse().unwrap(), two.parse().unwrap());
            assert_eq!(kernel_name(device), Some(entry.file_name()));
        }
    }
}
