//! Scripts that are a VMM's program and start a test's own binary as its double.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use super::behaviour::Rule;

/// Set for a process that is to be a double: which one.
const ASKED: &str = "DORMOUSE_DOUBLE";
/// Its arguments, a JSON list.
const ARGS: &str = "DORMOUSE_DOUBLE_ARGS";
/// Where its standard output goes: that of the process has what a test runner says.
const OUT: &str = "/proc/self/fd/3";

/// A double's program.
#[derive(Clone, Debug)]
pub struct Program {
    name: &'static str,
    version: String,
    rules: Vec<Rule>,
    regions_mib: Option<String>,
    prefault_rest_us: u64,
}

impl Program {
    /// A Firecracker of a version such as `1.13.1`.
    pub fn firecracker(version: &str) -> Program {
        let (version, rules) = (version.to_owned(), Vec::new());
        Program { name: "firecracker", version, rules, regions_mib: None, prefault_rest_us: 0 }
    }

    /// A Cloud Hypervisor of a version such as `53.0`.
    pub fn cloud_hypervisor(version: &str) -> Program {
        Program { name: "cloud-hypervisor", ..Program::firecracker(version) }
    }

    /// One more rule that it follows.
    #[must_use]
    pub fn rule(mut self, rule: Rule) -> Program {
        self.rules.push(rule);
        self
    }

    /// Its memory in regions of so many MiB.
    #[must_use]
    pub fn regions_mib(mut self, regions: &str) -> Program {
        self.regions_mib = Some(regions.to_owned());
        self
    }

    /// How long it rests after each page that it asks for behind its guest's back.
    #[must_use]
    pub fn prefault_rest_us(mut self, rest: u64) -> Program {
        self.prefault_rest_us = rest;
        self
    }

    /// Writes the program into a folder, and returns its path.
    pub fn install(&self, folder: &Path) -> Result<PathBuf> {
        let binary = std::env::current_exe().context("a program without a file")?;
        let binary = quoted(binary.to_str().context("a test binary that is not UTF-8")?);
        let rules = quoted(&serde_json::to_string(&self.rules)?);
        let regions = match &self.regions_mib {
            Some(regions) => format!("export DORMOUSE_DOUBLE_REGIONS_MIB={regions}\n"),
            None => String::new(),
        };
        // Arguments become a JSON list, for the test runner would take them for its own.
        let script = format!(
            "#!/bin/sh\n\
             args=\n\
             for arg in \"$@\"; do\n\
             \x20 escaped=$(printf '%s' \"$arg\" | sed 's/[\\\\\"]/\\\\&/g')\n\
             \x20 args=\"$args${{args:+,}}\\\"$escaped\\\"\"\n\
             done\n\
             export {ARGS}=\"[$args]\" {ASKED}={name}\n\
             export DORMOUSE_DOUBLE_VERSION={version} DORMOUSE_DOUBLE_BEHAVIOUR={rules}\n\
             export DORMOUSE_DOUBLE_PREFAULT_REST_US={rest}\n\
             {regions}\
             exec 3>&1 1>/dev/null\n\
             exec {binary} vmm_double_process --nocapture --test-threads=1\n",
            name = self.name,
            rest = self.prefault_rest_us,
            version = self.version,
        );
        let path = folder.join(self.name);
        fs::write(&path, script).with_context(|| format!("cannot write {}", path.display()))?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
        Ok(path)
    }
}

fn quoted(text: &str) -> String {
    format!("'{}'", text.replace('\'', r"'\''"))
}

/// Becomes a double and never returns, if this process was started as one.
pub fn run_if_asked() {
    let Some(name) = std::env::var_os(ASKED) else { return };
    let run = || {
        let args: Vec<String> = serde_json::from_str(&std::env::var(ARGS)?)?;
        match name.to_str() {
            Some("firecracker") => super::run_firecracker(&args, Some(PathBuf::from(OUT))),
            Some("cloud-hypervisor") => {
                super::run_cloud_hypervisor(&args, Some(PathBuf::from(OUT)))
            }
            other => bail!("no double of {other:?}"),
        }
    };
    match run() {
        Ok(()) => std::process::exit(0),
        Err(error) => crate::vmm::fail(1, &format!("{error:#}")),
    }
}
