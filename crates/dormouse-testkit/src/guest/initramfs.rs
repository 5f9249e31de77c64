//! The small initramfs that brings a guest from the kernel to its root disk.
//!
//! Debian's cloud kernel has ext4 and the serial line built in, the virtio drivers as modules.
//! The archive holds a static busybox, those modules and what they depend on, and an `/init`
//! that loads them in order, mounts the root and hands over to it.
//! Format: cpio "newc", uncompressed (`Documentation/driver-api/early-userspace/buffer-format.rst`).

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

/// The drivers that guests need for their disk and balloon on PCI (q35) and MMIO (microvm).
const MODULES: &[&str] = &["virtio_pci", "virtio_mmio", "virtio_blk", "virtio_balloon"];

const INIT: &str = include_str!("init-initramfs.sh");

/// How guests mount their root unless they are told otherwise.
///
/// `noinit_itable`: no thread that goes on writing to the disk by itself.
pub(super) const ROOT_OPTIONS: &str = "discard,noinit_itable";

/// Builds the archive from a static busybox and an unpacked kernel package's `lib/modules/VERSION`.
pub(super) fn build(busybox: &Path, modules: &Path) -> Result<Vec<u8>> {
    let ordered = load_order(modules)?;
    let list: String = ordered.iter().map(|(name, _)| format!("{name}\n")).collect();

    let mut archive = Archive::default();
    for folder in ["bin", "dev", "lib", "proc", "root", "sys"] {
        archive.add(folder, 0o040_755, &[]);
    }
    let busybox = fs::read(busybox)
        .with_context(|| format!("cannot read {} of busybox-static", busybox.display()))?;
    archive.add("bin/busybox", 0o100_755, &busybox);
    archive.add("init", 0o100_755, init(ROOT_OPTIONS)?.as_bytes());
    archive.add("lib/order", 0o100_644, list.as_bytes());
    for (name, bytes) in &ordered {
        archive.add(&format!("lib/{name}.ko"), 0o100_644, bytes);
    }
    Ok(archive.finish())
}

/// An initramfs that [`build`] made, with other mount options for the root.
///
/// The kernel unpacks archives that follow each other one after the other, so a second one replaces
/// the init of the first.
pub(super) fn with_root_options(initramfs: &Path, options: &str) -> Result<Vec<u8>> {
    let mut bytes = fs::read(initramfs)
        .with_context(|| format!("cannot read the initramfs {}", initramfs.display()))?;
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    let mut archive = Archive::default();
    archive.add("init", 0o100_755, init(options)?.as_bytes());
    bytes.extend(archive.finish());
    Ok(bytes)
}

/// The init script, which is no place for more than a list of options.
fn init(root_options: &str) -> Result<String> {
    let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || b",=_-".contains(&byte);
    if root_options.is_empty() || !root_options.bytes().all(is_plain) {
        bail!("{root_options:?} are no mount options");
    }
    Ok(INIT.replace("@ROOT_OPTIONS@", root_options))
}

/// The wanted modules and all they depend on, each after its dependencies.
fn load_order(modules: &Path) -> Result<Vec<(String, Vec<u8>)>> {
    let mut files = BTreeMap::new();
    find_modules(&modules.join("kernel"), &mut files)?;
    let mut ordered = Vec::new();
    for name in MODULES {
        add_module(name, &files, &mut ordered)?;
    }
    if ordered.is_empty() {
        bail!("no virtio modules under {}", modules.display());
    }
    Ok(ordered)
}

fn add_module(
    name: &str,
    files: &BTreeMap<String, PathBuf>,
    ordered: &mut Vec<(String, Vec<u8>)>,
) -> Result<()> {
    let name = name.replace('-', "_");
    if ordered.iter().any(|(earlier, _)| *earlier == name) {
        return Ok(());
    }
    // A driver without a file is built into the kernel.
    let Some(path) = files.get(&name) else {
        return Ok(());
    };
    let bytes = read_module(path)?;
    for dependency in dependencies(&bytes) {
        add_module(&dependency, files, ordered)?;
    }
    ordered.push((name, bytes));
    Ok(())
}

fn find_modules(folder: &Path, files: &mut BTreeMap<String, PathBuf>) -> Result<()> {
    let entries =
        fs::read_dir(folder).with_context(|| format!("cannot read {}", folder.display()))?;
    for entry in entries {
        let path = entry?.path();
        if path.is_dir() {
            find_modules(&path, files)?;
        } else if let Some((name, _)) =
            path.file_name().and_then(|name| name.to_str()).and_then(|name| name.split_once(".ko"))
        {
            files.insert(name.replace('-', "_"), path.clone());
        }
    }
    Ok(())
}

fn read_module(path: &Path) -> Result<Vec<u8>> {
    if path.extension().is_some_and(|extension| extension == "xz") {
        let output = Command::new("xz")
            .arg("-dc")
            .arg(path)
            .stderr(Stdio::inherit())
            .output()
            .context("cannot start xz; `apt-get install xz-utils` has it")?;
        if !output.status.success() {
            bail!("xz -dc {}: {}", path.display(), output.status);
        }
        return Ok(output.stdout);
    }
    fs::read(path).with_context(|| format!("cannot read {}", path.display()))
}

/// The names in a module's `depends=` string, which is plain text in its `.modinfo` section.
fn dependencies(module: &[u8]) -> Vec<String> {
    const KEY: &[u8] = b"\0depends=";
    let Some(at) = module.windows(KEY.len()).position(|window| window == KEY) else {
        return Vec::new();
    };
    let value = module[at + KEY.len()..].split(|&byte| byte == 0).next();
    String::from_utf8_lossy(value.unwrap_or_default())
        .split(',')
        .filter(|name| !name.is_empty())
        .map(str::to_owned)
        .collect()
}

/// A cpio archive in the making.
#[derive(Debug, Default)]
struct Archive {
    bytes: Vec<u8>,
    entries: usize,
}

impl Archive {
    fn add(&mut self, name: &str, mode: u32, content: &[u8]) {
        self.entries += 1;
        let (inode, size, name_size) = (self.entries, content.len(), name.len() + 1);
        // Magic, inode, mode, uid, gid, links, mtime, size, four device numbers, name size, check.
        let header = format!(
            "070701{inode:08x}{mode:08x}{0:08x}{0:08x}{1:08x}{0:08x}{size:08x}\
             {0:08x}{0:08x}{0:08x}{0:08x}{name_size:08x}{0:08x}",
            0, 1
        );
        self.bytes.extend_from_slice(header.as_bytes());
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(content);
        self.pad();
    }

    fn finish(mut self) -> Vec<u8> {
        self.add("TRAILER!!!", 0, &[]);
        self.bytes
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dependencies_are_read_from_modinfo() {
        let cases: [(&[u8], &[&str]); 4] = [
            (b"x\0license=GPL\0depends=virtio,virtio_ring\0name=a\0", &["virtio", "virtio_ring"]),
            (b"x\0depends=\0name=a\0", &[]),
            (b"x\0depends=crc32c-generic", &["crc32c-generic"]),
            (b"nothing here", &[]),
        ];
        for (module, expected) in cases {
            assert_eq!(dependencies(module), expected);
        }
    }

    #[test]
    fn the_init_takes_mount_options_and_nothing_else() {
        assert!(init("noatime,commit=30").unwrap().contains(" -o noatime,commit=30 /dev/vda"));
        for wrong in ["", "a b", "a;b", "$a"] {
            assert!(init(wrong).is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn entries_are_aligned_and_sized() {
        let mut archive = Archive::default();
        archive.add("a", 0o100_644, b"hello");
        let bytes = archive.finish();
        assert_eq!(&bytes[..6], b"070701");
        assert_eq!(&bytes[54..62], b"00000005");
        assert_eq!(&bytes[94..102], b"00000002");
        assert_eq!(&bytes[112..117], b"hello");
        assert_eq!(&bytes[120..126], b"070701");
    }
}
