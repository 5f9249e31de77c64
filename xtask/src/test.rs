//! `cargo xtask test`, `test-host` and `bench`: the test runners and what they need beforehand.

use std::fs::{self, File};
use std::process::Command;

use anyhow::Result;
use dormouse_testkit::guest::{Assets, cache_dir};

use crate::command::{cargo, find_program, run};
use crate::packages;

/// Runs every test of the workspace, with real guests.
pub(crate) fn all() -> Result<()> {
    packages::install()?;
    println!("test: guest assets");
    Assets::prepare(&cache_dir(), &mut |line| println!("{line}"))?;
    // Doc tests first: the runner's own summary is then the last thing to be seen.
    run(&mut cargo(&["test", "--quiet", "--doc", "--workspace"]))?;
    run(&mut runner(&["--workspace"]))
}

/// Runs the tests that need what only some hosts have; they are named `host_…`.
pub(crate) fn host() -> Result<()> {
    packages::install()?;
    println!("test-host: this machine has");
    for (what, answer) in host_report() {
        println!("    {what:<18} {answer}");
    }
    let mut command = runner(&["--workspace"]);
    if runs_nextest() {
        command.args(["--no-tests", "warn", "-E", "test(/(^|::)host_/)"]);
    } else {
        command.arg("host_");
    }
    run(command.env("DORMOUSE_TEST_HOST", "1"))
}

/// Runs the benchmarks that hold our numbers.
pub(crate) fn bench() -> Result<()> {
    packages::install()?;
    run(&mut cargo(&["bench", "-p", "dormouse", "--bench", "numbers"]))
}

fn runs_nextest() -> bool {
    find_program("cargo-nextest").is_some()
}

fn runner(arguments: &[&str]) -> Command {
    let mut command = if runs_nextest() {
        println!("test: cargo-nextest is there and runs the tests");
        cargo(&["nextest", "run"])
    } else {
        println!("test: no cargo-nextest, cargo test runs the tests");
        cargo(&["test", "--tests"])
    };
    command.args(arguments);
    command
}

fn host_report() -> Vec<(&'static str, String)> {
    let openable = |path: &str| match File::options().read(true).write(true).open(path) {
        Ok(_) => "usable".to_owned(),
        Err(error) => format!("NOT usable: {error}"),
    };
    let program = |name: &str| match find_program(name) {
        Some(path) => path.display().to_string(),
        None => "NOT in PATH".to_owned(),
    };
    let huge_pages = match fs::read_to_string("/proc/sys/vm/nr_hugepages") {
        Ok(text) if text.trim() != "0" => format!("{} reserved", text.trim()),
        Ok(_) => "NONE reserved (sysctl vm.nr_hugepages=64)".to_owned(),
        Err(error) => format!("NONE: {error}"),
    };
    let nbd = if fs::metadata("/sys/module/nbd").is_ok() {
        "loaded".to_owned()
    } else {
        "NOT loaded (modprobe nbd)".to_owned()
    };
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    vec![
        ("kernel", kernel.trim().to_owned()),
        ("/dev/kvm", openable("/dev/kvm")),
        ("/dev/fuse", openable("/dev/fuse")),
        ("/dev/userfaultfd", openable("/dev/userfaultfd")),
        ("huge pages", huge_pages),
        ("nbd driver", nbd),
        ("firecracker", program("firecracker")),
        ("cloud-hypervisor", program("cloud-hypervisor")),
        ("qemu", program("qemu-system-x86_64")),
    ]
}
