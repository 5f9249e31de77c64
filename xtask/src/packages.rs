//! `cargo xtask packages`: the Debian packages that guests and tests need.

use std::process::Command;

use anyhow::{Context, Result};

use crate::command::{output_of, privileged, run};

/// QEMU and the parts of it that come from one source package and so must have one version.
///
/// A machine may carry newer `qemu-utils` (from backports) than its suites offer; installing
/// `qemu-system-x86` alone would then remove them.
const QEMU: &[&str] = &["qemu-system-x86", "qemu-utils", "qemu-block-extra"];

const PACKAGES: &[&str] = &[
    "btrfs-progs",
    "build-essential",
    "busybox-static",
    "cpio",
    "debootstrap",
    "docker-registry",
    "e2fsprogs",
    "fio",
    "fuse3",
    "gnutls-bin",
    "libnbd-bin",
    "lz4",
    "nbdkit",
    "openssl",
    "python3-libnbd",
    "python3-venv",
    "skopeo",
    "strace",
    "umoci",
    "xfsprogs",
    "xz-utils",
    "zstd",
];

/// Installs what is missing; as root directly, else through `sudo`.
pub(crate) fn install() -> Result<()> {
    let missing = missing(PACKAGES)?;
    let missing_qemu = missing_of_qemu()?;
    if missing.is_empty() && missing_qemu.is_empty() {
        println!("packages: all there");
        return Ok(());
    }
    let list = [missing.as_slice(), missing_qemu.as_slice()].concat().join(" ");
    println!("packages: {list} missing, asking apt for them");
    run(apt().args(["-qq", "update"]))?;
    let mut wanted: Vec<String> = missing.iter().map(|&name| name.to_owned()).collect();
    if !missing_qemu.is_empty() {
        let version = candidate(QEMU[0])?;
        wanted.extend(QEMU.iter().map(|name| format!("{name}={version}")));
    }
    run(apt()
        .args(["-qq", "install", "-y", "--no-install-recommends", "--allow-downgrades"])
        .args(wanted))
    .context("apt could not install what the guests need")
}

fn apt() -> Command {
    // Through `env`, for sudo passes no environment on.
    let mut command = privileged("env");
    // A run level of 1 keeps the servers among the packages from being started.
    command.args([
        "DEBIAN_FRONTEND=noninteractive",
        "RUNLEVEL=1",
        "apt-get",
        "-o",
        "DPkg::Lock::Timeout=300",
    ]);
    command
}

fn missing(packages: &[&'static str]) -> Result<Vec<&'static str>> {
    let format = "--showformat=${Package} ${db:Status-Status}\n";
    // It fails when it does not know one of the names, and still lists the others.
    let output = Command::new("dpkg-query")
        .args(["--show", format])
        .args(packages)
        .output()
        .context("cannot start dpkg-query; the guests and their packages need a Debian")?;
    let known = String::from_utf8_lossy(&output.stdout).into_owned();
    let there = |name: &str| known.lines().any(|line| line == format!("{name} installed"));
    Ok(packages.iter().copied().filter(|name| !there(name)).collect())
}

/// QEMU counts as there when its programs are, wherever they came from.
fn missing_of_qemu() -> Result<Vec<&'static str>> {
    let programs = ["qemu-system-x86_64", "qemu-img", "qemu-nbd"];
    if programs.iter().all(|name| crate::command::find_program(name).is_some()) {
        return Ok(Vec::new());
    }
    missing(QEMU)
}

/// The version of `package` that apt would install.
fn candidate(package: &str) -> Result<String> {
    let policy = output_of(Command::new("apt-cache").args(["policy", package]))?;
    policy
        .lines()
        .find_map(|line| line.trim().strip_prefix("Candidate: "))
        .filter(|version| *version != "(none)")
        .map(str::to_owned)
        .with_context(|| format!("apt offers no {package}"))
}
