//! A folder with everything that an image has to keep.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, PermissionsExt, symlink};
use std::path::Path;

use rustix::fs::{AtFlags, CWD, FileType, Mode, Timespec, Timestamps, XattrFlags};

/// Fills an empty folder. Needs root.
pub(crate) fn fill(root: &Path) {
    let at = |name: &str| root.join(name);
    fs::write(at("empty"), b"").unwrap();
    fs::write(at("one"), b"1").unwrap();
    fs::write(at("block"), vec![7; 4096]).unwrap();
    fs::write(at("zeros"), vec![0; 100_000]).unwrap();
    fs::write(at("large"), noise(5 << 20, 1)).unwrap();
    sparse(&at("sparse"), 9 << 30, &[0, 1 << 20, (1 << 32) + 4096, (9 << 30) - 5]);
    let many: Vec<u64> = (0..1500).map(|index| index * 16384).collect();
    sparse(&at("in-pieces"), 32 << 20, &many);
    sparse(&at("hole"), 1 << 20, &[]);

    fs::create_dir(at("folder")).unwrap();
    for index in 0..700 {
        fs::write(at("folder").join(format!("a-file-with-a-name-{index:05}")), [b'x'; 5]).unwrap();
    }
    fs::hard_link(at("one"), at("folder/one-more")).unwrap();
    fs::hard_link(at("one"), at("another")).unwrap();
    symlink("short", at("symlink-fast")).unwrap();
    symlink("x".repeat(59), at("symlink-59")).unwrap();
    symlink("x".repeat(60), at("symlink-60")).unwrap();
    symlink("y/".repeat(2000), at("symlink-slow")).unwrap();
    fs::write(root.join("n".repeat(255)), b"long").unwrap();
    fs::write(root.join(OsStr::from_bytes(b"not\xff\xfeutf-8 \x01\n")), b"bytes").unwrap();
    deep(root, 60);

    let node = |name: &str, kind, major, minor| {
        let device = rustix::fs::makedev(major, minor);
        rustix::fs::mknodat(CWD, at(name), kind, Mode::from_raw_mode(0o600), device).unwrap();
    };
    node("char-small", FileType::CharacterDevice, 1, 3);
    node("char-large", FileType::CharacterDevice, 1000, 0xf_fff0);
    node("disk", FileType::BlockDevice, 8, 300);
    node("pipe", FileType::Fifo, 0, 0);
    node("socket", FileType::Socket, 0, 0);

    for (name, mode) in [("one", 0o4755), ("block", 0o2710), ("folder", 0o1777), ("empty", 0)] {
        fs::set_permissions(at(name), fs::Permissions::from_mode(mode)).unwrap();
    }
    let xattr = |name: &str, key: &str, value: &[u8]| {
        rustix::fs::lsetxattr(at(name), key, value, XattrFlags::empty()).unwrap();
    };
    xattr("block", "user.small", b"1");
    xattr("block", "user.empty", b"");
    xattr("large", "user.large", &noise(3000, 2));
    xattr("large", "user.small", b"beside a large one");
    xattr("large", "trusted.overlay.opaque", b"y");
    let capability = [0, 0, 0, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    xattr("in-pieces", "security.capability", &capability.map(|byte: u8| byte));
    let entry = |tag: u16, perm: u16, id: u32| {
        [&tag.to_le_bytes()[..], &perm.to_le_bytes(), &id.to_le_bytes()].concat()
    };
    let acl = [
        2u32.to_le_bytes().to_vec(),
        entry(1, 7, u32::MAX),
        entry(2, 6, 1000),
        entry(4, 5, u32::MAX),
        entry(16, 7, u32::MAX),
        entry(32, 0, u32::MAX),
    ]
    .concat();
    xattr("folder", "system.posix_acl_access", &acl);
    xattr("folder", "system.posix_acl_default", &acl);
    xattr("symlink-fast", "trusted.on-a-symlink", b"yes");

    let own = |name: &str, uid: u32, gid: u32| {
        std::os::unix::fs::lchown(at(name), Some(uid), Some(gid)).unwrap();
    };
    own("empty", 1000, 1001);
    own("folder", 70_000, 4_000_000_000);
    own("symlink-slow", 5, 6);
    for (name, seconds, nanoseconds) in [
        ("one", 1_600_000_000, 123_456_789),
        ("block", -5, 1),
        ("pipe", 1 << 31, 999_999_999),
        ("symlink-fast", 1 << 33, 0),
        ("folder", 1, 0),
        ("", 1_700_000_000, 5),
    ] {
        let time = Timespec { tv_sec: seconds, tv_nsec: nanoseconds };
        let times = Timestamps { last_access: time, last_modification: time };
        rustix::fs::utimensat(CWD, at(name), &times, AtFlags::SYMLINK_NOFOLLOW).unwrap();
    }
}

fn sparse(path: &Path, bytes: u64, data: &[u64]) {
    let file = File::create(path).unwrap();
    file.set_len(bytes).unwrap();
    for &offset in data {
        file.write_all_at(b"data", offset).unwrap();
    }
}

/// Folders in folders.
pub(crate) fn deep(root: &Path, levels: u32) {
    use rustix::fs::OFlags;
    let flags = OFlags::RDONLY | OFlags::DIRECTORY;
    let mut at = rustix::fs::open(root, flags, Mode::empty()).unwrap();
    for _ in 0..levels {
        match rustix::fs::mkdirat(&at, "deep", Mode::from_raw_mode(0o755)) {
            Ok(()) => {}
            Err(error) => panic!("{}", io::Error::from(error)),
        }
        at = rustix::fs::openat(&at, "deep", flags, Mode::empty()).unwrap();
    }
}

/// Bytes without a pattern, the same for each seed.
pub(crate) fn noise(len: usize, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut bytes = Vec::with_capacity(len + 8);
    while bytes.len() < len {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(len);
    bytes
}
