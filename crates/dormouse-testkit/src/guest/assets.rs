//! What every guest starts from: a kernel, an initramfs and a root disk, made once from Debian packages.

use std::fs::{self, File};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use super::command::{output_of, privileged, run};
use super::initramfs;

/// Names the recipe below; whoever changes what it makes counts this up.
const VERSION: &str = "assets-1";

/// A guest's root disk: room for the workload beside 200 MB of Debian.
const DISK_SIZE: &str = "2G";
/// The same in every build, so that two machines' guests differ less.
const DISK_UUID: &str = "6d6f7573-6500-4000-8000-646f726d6f75";
const PACKAGES: &str = "--include=python3";
const GUEST_INIT: &str = include_str!("init-guest.sh");
const BUSYBOX: &str = "/bin/busybox";
const PRIVILEGED_PATH: &str = "/usr/sbin:/usr/bin:/sbin:/bin";

/// The files that guests boot from; shared, read-only.
#[derive(Debug, Clone)]
pub struct Assets {
    dir: PathBuf,
}

impl Assets {
    /// Returns the assets under `cache_dir`, made now if they are not there.
    ///
    /// Making them takes about a minute and a half, a network and root (directly or through
    /// `sudo`); `progress` gets a line for every step. Other processes wait meanwhile.
    ///
    /// # Errors
    /// When a needed program is missing (`cargo xtask packages` installs them all) or fails.
    pub fn prepare(cache_dir: &Path, progress: &mut dyn FnMut(&str)) -> Result<Assets> {
        let dir = cache_dir.join(VERSION);
        make_once(cache_dir, &dir, &|| dir.exists(), |partial| make(partial, progress))
            .context("cannot prepare the guest's kernel and disk")?;
        Ok(Assets { dir })
    }

    /// The kernel, a bzImage.
    #[must_use]
    pub fn kernel(&self) -> PathBuf {
        self.dir.join("kernel")
    }

    /// The initramfs, a cpio archive.
    #[must_use]
    pub fn initramfs(&self) -> PathBuf {
        self.dir.join("initramfs")
    }

    /// The root disk, a sparse ext4 of 2 GiB; guests write to copies of it.
    #[must_use]
    pub fn disk(&self) -> PathBuf {
        self.dir.join("disk")
    }

    /// Names the recipe that made these assets.
    #[must_use]
    pub fn version(&self) -> &'static str {
        VERSION
    }
}

/// Where this workspace keeps its guests: `target/guest`.
#[must_use]
pub fn cache_dir() -> PathBuf {
    let target = match std::env::var_os("CARGO_TARGET_DIR") {
        Some(dir) => PathBuf::from(dir),
        None => Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target"),
    };
    target.join("guest")
}

/// Makes `dir` with `make` unless it is `current`: in a folder beside it, renamed when complete.
///
/// An older `dir` is replaced. Other processes wait meanwhile.
pub(super) fn make_once(
    cache_dir: &Path,
    dir: &Path,
    current: &dyn Fn() -> bool,
    make: impl FnOnce(&Path) -> Result<()>,
) -> Result<()> {
    if current() {
        return Ok(());
    }
    fs::create_dir_all(cache_dir)
        .with_context(|| format!("cannot create {}", cache_dir.display()))?;
    let lock = File::create(cache_dir.join("lock"))?;
    lock.lock().context("cannot lock the guest cache")?;
    if current() {
        return Ok(());
    }
    let partial = dir.with_added_extension("partial");
    remove_tree(&partial)?;
    fs::create_dir(&partial)?;
    make(&partial)?;
    remove_tree(dir)?;
    fs::rename(&partial, dir)?;
    Ok(())
}

fn make(dir: &Path, progress: &mut dyn FnMut(&str)) -> Result<()> {
    make_kernel(dir, progress)?;
    make_disk(dir, progress)
}

fn make_kernel(dir: &Path, progress: &mut dyn FnMut(&str)) -> Result<()> {
    let package = kernel_package(progress)?;
    progress(&format!("guest: downloading {package}"));
    let scratch = dir.join("scratch");
    fs::create_dir(&scratch)?;
    output_of(Command::new("apt-get").arg("download").arg(&package).current_dir(&scratch))?;
    let archive = only_entry(&scratch)?;
    let tree = scratch.join("tree");
    output_of(Command::new("dpkg-deb").arg("-x").arg(&archive).arg(&tree))?;
    let version = package.trim_start_matches("linux-image-");
    fs::copy(tree.join("boot").join(format!("vmlinuz-{version}")), dir.join("kernel"))
        .context("the kernel package holds no kernel where it used to")?;

    progress("guest: building the initramfs");
    let modules = ["lib/modules", "usr/lib/modules"]
        .map(|folder| tree.join(folder).join(version))
        .into_iter()
        .find(|folder| folder.exists())
        .context("the kernel package holds no modules where it used to")?;
    fs::write(dir.join("initramfs"), initramfs::build(Path::new(BUSYBOX), &modules)?)?;
    fs::remove_dir_all(&scratch)?;
    Ok(())
}

/// The package that Debian's cloud kernel metapackage stands for today.
fn kernel_package(progress: &mut dyn FnMut(&str)) -> Result<String> {
    let depends = || {
        let answer =
            output_of(Command::new("apt-cache").args(["depends", "linux-image-cloud-amd64"]));
        let answer = answer.unwrap_or_default();
        answer.lines().find_map(|line| line.trim().strip_prefix("Depends: ").map(str::to_owned))
    };
    if let Some(package) = depends() {
        return Ok(package);
    }
    progress("guest: apt knows no kernel, updating its lists");
    run(privileged("apt-get").arg("update"), &mut |_| ())?;
    depends().context("apt knows no linux-image-cloud-amd64; the guests need a Debian on amd64")
}

fn make_disk(dir: &Path, progress: &mut dyn FnMut(&str)) -> Result<()> {
    let (mirror, suite) = (mirror()?, suite()?);
    let root = dir.join("root");
    progress(&format!("guest: debootstrap of {suite}, about a minute"));
    run(
        privileged("debootstrap")
            .args(["--variant=minbase", PACKAGES, &suite])
            .arg(&root)
            .arg(&mirror)
            .env("PATH", PRIVILEGED_PATH),
        &mut |line| progress(&format!("guest: {}", line.trim_start_matches("I: "))),
    )?;

    progress("guest: making the root disk");
    let init = dir.join("init");
    fs::write(&init, GUEST_INIT)?;
    fs::set_permissions(&init, fs::Permissions::from_mode(0o755))?;
    run(privileged("install").arg("-D").arg(&init).arg(root.join("guest/init")), &mut |_| ())?;
    // Package lists and archives are of no use in a guest without a network.
    for folder in ["var/cache/apt", "var/lib/apt/lists"] {
        remove_tree(&root.join(folder))?;
    }
    let disk = dir.join("disk");
    run(
        privileged("mke2fs")
            .args(["-q", "-t", "ext4", "-b", "4096", "-m", "0", "-U", DISK_UUID])
            .args(["-E", &format!("hash_seed={DISK_UUID}"), "-L", "root", "-d"])
            .arg(&root)
            .arg(&disk)
            .arg(DISK_SIZE)
            .env("PATH", PRIVILEGED_PATH),
        &mut |_| (),
    )?;
    run(privileged("chmod").arg("a+r").arg(&disk), &mut |_| ())?;
    fs::remove_file(&init)?;
    remove_tree(&root)
}

/// Removes a folder that may hold files of root's.
fn remove_tree(dir: &Path) -> Result<()> {
    if !dir.exists() {
        return Ok(());
    }
    run(privileged("rm").arg("-rf").arg(dir), &mut |_| ())
}

/// The first mirror of this machine's apt sources, in either of apt's two formats.
fn mirror() -> Result<String> {
    let mut files = vec![PathBuf::from("/etc/apt/sources.list")];
    if let Ok(entries) = fs::read_dir("/etc/apt/sources.list.d") {
        let mut more: Vec<_> = entries.filter_map(|entry| Some(entry.ok()?.path())).collect();
        more.sort();
        files.extend(more);
    }
    files
        .iter()
        .filter(|path| {
            path.extension().is_some_and(|extension| extension == "list" || extension == "sources")
        })
        .filter_map(|path| fs::read_to_string(path).ok())
        .find_map(|text| first_mirror(&text))
        .context("no mirror in /etc/apt/sources.list or /etc/apt/sources.list.d")
}

fn first_mirror(sources: &str) -> Option<String> {
    sources.lines().find_map(|line| {
        let mut words = line.split_whitespace();
        match words.next()? {
            "URIs:" => words.next(),
            // An option block may stand between the type and the mirror.
            "deb" => words.find(|word| word.contains("://")),
            _ => None,
        }
        .map(str::to_owned)
    })
}

/// The code name of the Debian that runs here.
fn suite() -> Result<String> {
    let text = fs::read_to_string("/etc/os-release").context("cannot read /etc/os-release")?;
    let name = text.lines().find_map(|line| line.strip_prefix("VERSION_CODENAME="));
    Ok(name.context("/etc/os-release names no Debian release")?.trim_matches('"').to_owned())
}

fn only_entry(dir: &Path) -> Result<PathBuf> {
    let mut entries = fs::read_dir(dir)?;
    match (entries.next(), entries.next()) {
        (Some(entry), None) => Ok(entry?.path()),
        _ => bail!("expected one file in {}", dir.display()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mirrors_are_found_in_both_formats() {
        let cases = [
            (
                "Types: deb\nURIs: http://one/debian http://two\nSuites: x\n",
                Some("http://one/debian"),
            ),
            ("# deb http://no\ndeb http://one/debian bookworm main\n", Some("http://one/debian")),
            ("deb [arch=amd64 signed-by=/k] https://one x main\n", Some("https://one")),
            ("deb-src http://one x main\n", None),
            ("", None),
        ];
        for (text, expected) in cases {
            assert_eq!(first_mirror(text).as_deref(), expected, "{text:?}");
        }
    }
}
