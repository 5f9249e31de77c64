//! How a VMM's process is started, for a guest that boots and for one that wakes.
//!
//! A [`Template`] says what a guest is, in words of its VMM, with names in braces for what differs
//! from one live VM to the next: `{api}`, `{name}`, `{folder}`, `{memory}`, `{disk:ID}`, and
//! `{vsock}`. [`Template::boot`] and [`Template::wake`] put [`Places`] into them and give a
//! [`Start`], from which a process is made. Nothing is started here.
//!
//! | | boot | wake |
//! |---|---|---|
//! | Firecracker | `--api-sock`, and the template's `config` as `--config-file` | `--api-sock`; then a load |
//! | Cloud Hypervisor | `--api-socket`, arguments | `--api-socket`; then a load |
//! | QEMU | arguments, `-qmp`, a memory backend | the same, `-S -incoming defer` |
//!
//! QEMU's arguments name the machine without its memory: `-m`, `-object memory-backend-file` and
//! `memory-backend=` are added, for they differ between a boot and a wake. `-machine` must be
//! among the arguments.

mod disks;
mod fill;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::capabilities::Capabilities;
use crate::error::{Error, ErrorKind, Result};
use crate::kind::{Kind, Version};
use crate::program;
use fill::{Filler, Syntax};

/// The id of the memory backend that QEMU gets.
pub const QEMU_MEMORY: &str = "dormouse-memory";

/// From this version on `rom=off` lets QEMU's memory file be read-only and the memory writable.
const QEMU_READ_ONLY_MEMORY: Version = Version::new(8, 2, 0);

/// Arguments of a template.
const ARGS_MAX: usize = 4096;

/// What a guest is.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Template {
    /// The VMM.
    pub vmm: Kind,

    /// Its program: a path, or a name along `PATH`. Without: see [`program::find`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub program: Option<PathBuf>,

    /// Its arguments, at a boot and, for QEMU, at a wake.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub args: Vec<String>,

    /// Arguments at a wake alone, for a VMM that otherwise takes none then.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub wake_args: Vec<String>,

    /// Firecracker's configuration, as for its `--config-file`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub config: Option<Value>,

    /// Environment variables beside ours.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub environment: BTreeMap<String, String>,

    /// The folder it runs in; without, the live VM's own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub work_folder: Option<PathBuf>,

    /// Bytes of memory. QEMU needs to be told by us.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_bytes: Option<u64>,

    /// How Cloud Hypervisor hands a snapshot over.
    #[serde(default, skip_serializing_if = "Transfer::is_files")]
    pub transfer: Transfer,
}

/// How a VMM hands a snapshot over.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Transfer {
    /// It writes files.
    #[default]
    Files,
    /// By descriptors of its memory ([`crate::cloud_hypervisor::offload`]): nothing lies in files.
    Descriptors,
}

impl Transfer {
    fn is_files(&self) -> bool {
        *self == Transfer::Files
    }
}

/// Where the things of one live VM are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Places {
    /// Its name.
    pub name: String,
    /// Its folder, for files that the VMM needs beside it.
    pub folder: PathBuf,
    /// The VMM's API socket.
    pub api: PathBuf,
    /// QEMU's memory.
    pub memory: Option<Memory>,
    /// Its disks, by id.
    pub disks: BTreeMap<String, DiskPlace>,
    /// The socket of its vsock device.
    pub vsock: Option<PathBuf>,
}

impl Places {
    /// Puts them into a text that is no option of the VMM's, such as a path.
    pub fn fill(&self, text: &str) -> Result<String> {
        Filler::new(self, Syntax::Plain).fill(text)
    }
}

/// A memory file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Memory {
    /// The file.
    pub path: PathBuf,
    /// How the guest has it.
    pub sharing: Sharing,
}

/// How a guest has its memory file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sharing {
    /// The file is the guest's memory.
    Shared,
    /// The guest reads it, and keeps its changes to itself. The file stays as it is: where the
    /// version has no way to open it read-only (before 8.2), it has to be one that refuses writes
    /// and punched holes, as those of `dormouse mount` do.
    Private,
}

/// Where a disk is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DiskPlace {
    /// A file or a block device.
    File(PathBuf),
    /// An export of an NBD server on a unix socket. QEMU alone.
    Nbd {
        /// The server's socket.
        socket: PathBuf,
        /// The export.
        export: String,
    },
}

/// A process to start.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Start {
    /// The program.
    pub program: PathBuf,
    /// Its arguments.
    pub args: Vec<String>,
    /// Environment variables beside ours.
    pub environment: BTreeMap<String, String>,
    /// The folder it runs in.
    pub work_folder: PathBuf,
    /// Files that must be there first, mode 0600.
    pub files: Vec<(PathBuf, Vec<u8>)>,
    /// The socket on which its API answers; nothing may be there before it starts.
    pub api: PathBuf,
}

impl Start {
    /// The command, its input and outputs as they are by default.
    pub fn command(&self) -> Command {
        let mut command = Command::new(&self.program);
        command.args(&self.args).envs(&self.environment).current_dir(&self.work_folder);
        command
    }
}

impl Template {
    /// Reads a template from JSON.
    pub fn parse(bytes: &[u8]) -> Result<Template> {
        let template: Template = serde_json::from_slice(bytes).map_err(|error| {
            Error::with_source(ErrorKind::InvalidInput, "not a template of a VMM", error)
        })?;
        template.check()?;
        Ok(template)
    }

    /// Refuses what cannot be started.
    pub fn check(&self) -> Result<()> {
        let bad = |why: String| Err(Error::new(ErrorKind::InvalidInput, why));
        if self.args.len().max(self.wake_args.len()) > ARGS_MAX {
            return bad(format!("a template of more than {ARGS_MAX} arguments"));
        }
        if self.transfer == Transfer::Descriptors {
            if self.vmm != Kind::CloudHypervisor {
                return bad(format!(
                    "{} hands no snapshot over by descriptors; leave `transfer` out",
                    self.vmm
                ));
            }
            if !shares_memory(&self.args) {
                return bad("a snapshot by descriptors needs --memory with shared=on".to_owned());
            }
        }
        match self.vmm {
            Kind::Firecracker if self.config.is_none() => {
                bad("a template for Firecracker needs a config, as for its --config-file"
                    .to_owned())
            }
            Kind::CloudHypervisor | Kind::Qemu if self.config.is_some() => {
                bad(format!("a template for {} has args, no config", self.vmm))
            }
            Kind::Qemu if self.memory_bytes.is_none_or(|bytes| bytes == 0 || bytes % 4096 != 0) => {
                bad("a template for QEMU needs memory_bytes, a multiple of 4096".to_owned())
            }
            Kind::Qemu if machine(&self.args).is_none() => {
                bad("a template for QEMU needs -machine among its args".to_owned())
            }
            Kind::Qemu => self.args.iter().chain(&self.wake_args).try_for_each(|arg| {
                let option = arg.strip_prefix('-').map(|rest| rest.trim_start_matches('-'));
                match option {
                    Some("m" | "qmp" | "S" | "incoming") => bad(format!(
                        "a template for QEMU has no {arg}; it is added where it is wanted"
                    )),
                    Some("daemonize") => bad(format!("a VMM that is left with {arg} is nobody's")),
                    _ => Ok(()),
                }
            }),
            _ => Ok(()),
        }
    }

    /// The process of a guest that boots. `version` is the program's; see [`program_version`].
    pub fn boot(&self, places: &Places, version: Version) -> Result<Start> {
        self.start(places, version, false)
    }

    /// The process of a guest that wakes: it waits for a [`load`](crate::vmm::Vmm::load).
    pub fn wake(&self, places: &Places, version: Version) -> Result<Start> {
        self.start(places, version, true)
    }

    fn start(&self, places: &Places, version: Version, is_wake: bool) -> Result<Start> {
        self.check()?;
        self.vmm.check_version(version)?;
        if self.transfer == Transfer::Descriptors && !Capabilities::of(self.vmm, version).offload {
            let context = format!(
                "{} {version} cannot hand snapshots over by descriptors; 53 and later can, \
                 and all can by files",
                self.vmm
            );
            return Err(Error::new(ErrorKind::Incompatible, context));
        }
        let syntax = match self.vmm {
            Kind::Firecracker => Syntax::Plain,
            Kind::CloudHypervisor => Syntax::CloudHypervisor,
            Kind::Qemu => Syntax::Qemu,
        };
        let filler = Filler::new(places, syntax);
        let fill_all = |args: &[String]| -> Result<Vec<String>> {
            args.iter().map(|arg| filler.fill(arg)).collect()
        };
        let api = text(&places.api)?;
        let mut files = Vec::new();
        let args = match self.vmm {
            Kind::Firecracker => {
                let mut args = vec!["--api-sock".to_owned(), api.to_owned()];
                if let (Some(config), false) = (&self.config, is_wake) {
                    let path = places.folder.join("firecracker.json");
                    args.extend(["--config-file".to_owned(), text(&path)?.to_owned()]);
                    files.push((
                        path,
                        serde_json::to_vec_pretty(&filler.fill_json(config)?).map_err(|error| {
                            Error::with_source(ErrorKind::InvalidInput, "the config", error)
                        })?,
                    ));
                }
                args.extend(fill_all(if is_wake { &self.wake_args } else { &self.args })?);
                args
            }
            Kind::CloudHypervisor => {
                let mut args =
                    vec!["--api-socket".to_owned(), format!("path={}", filler.quoted(api))];
                if is_wake {
                    args.extend(fill_all(&self.wake_args)?);
                } else {
                    args.extend(fill_all(&self.named_disks())?);
                }
                args
            }
            Kind::Qemu => self.qemu_args(places, version, is_wake, &filler)?,
        };
        Ok(Start {
            program: program::find(self.vmm, self.program.as_deref())?,
            args,
            environment: self.environment.clone(),
            work_folder: self.work_folder.clone().unwrap_or_else(|| places.folder.clone()),
            files,
            api: places.api.clone(),
        })
    }

    /// Cloud Hypervisor's arguments; disks that are given no id have ours, by which a wake finds them.
    fn named_disks(&self) -> Vec<String> {
        let name = |(option, arg)| match option {
            Some("--disk") => disks::named(arg),
            _ => arg.to_owned(),
        };
        disks::with_options(&self.args).map(name).collect()
    }

    fn qemu_args(
        &self,
        places: &Places,
        version: Version,
        is_wake: bool,
        filler: &Filler<'_>,
    ) -> Result<Vec<String>> {
        let Some(memory) = &places.memory else {
            return Err(Error::new(ErrorKind::InvalidInput, "QEMU needs a memory file"));
        };
        let bytes = self.memory_bytes.unwrap_or_default();
        let sharing = match memory.sharing {
            Sharing::Shared => "share=on",
            Sharing::Private if version >= QEMU_READ_ONLY_MEMORY => "share=off,readonly=on,rom=off",
            Sharing::Private => "share=off",
        };
        let path = filler.quoted(text(&memory.path)?);
        let mut args = Vec::new();
        let at = machine(&self.args);
        for (number, arg) in self.args.iter().enumerate() {
            let mut arg = filler.fill(arg)?;
            if Some(number) == at {
                arg += &format!(",memory-backend={QEMU_MEMORY}");
            }
            args.push(arg);
        }
        args.extend([
            "-object".to_owned(),
            format!("memory-backend-file,id={QEMU_MEMORY},size={bytes},mem-path={path},{sharing}"),
            "-m".to_owned(),
            format!("{}k", bytes / 1024),
            "-qmp".to_owned(),
            format!("unix:{},server=on,wait=off", filler.quoted(text(&places.api)?)),
        ]);
        if is_wake {
            args.extend(["-S", "-incoming", "defer"].map(str::to_owned));
            for arg in &self.wake_args {
                args.push(filler.fill(arg)?);
            }
        }
        Ok(args)
    }
}

/// Whether all of a Cloud Hypervisor's memory is shared: all values of its options say so.
fn shares_memory(args: &[String]) -> bool {
    let mut is_shared = false;
    for (option, value) in disks::with_options(args) {
        if !matches!(option, Some("--memory" | "--memory-zone")) {
            continue;
        }
        let is_on = value.split(',').any(|field| field == "shared=on");
        // Where zones have the memory, its own size is 0.
        let is_empty = value.split(',').any(|field| field == "size=0");
        if !is_on && !is_empty {
            return false;
        }
        is_shared |= is_on;
    }
    is_shared
}

/// Where the machine of QEMU's arguments is named.
fn machine(args: &[String]) -> Option<usize> {
    let option =
        args.iter().position(|arg| ["-machine", "-M", "--machine"].contains(&arg.as_str()))?;
    (option + 1 < args.len()).then_some(option + 1)
}

fn text(path: &Path) -> Result<&str> {
    path.to_str().ok_or_else(|| {
        Error::new(ErrorKind::InvalidInput, format!("{} is not UTF-8", path.display()))
    })
}

/// Asks a program for its version (`--version`), which takes some milliseconds.
pub fn program_version(kind: Kind, program: &Path) -> Result<Version> {
    let output = Command::new(program)
        .arg("--version")
        .output()
        .map_err(|error| Error::io(format!("cannot start {}", program.display()), error))?;
    let said = String::from_utf8_lossy(&output.stdout);
    version_in(kind, &said).ok_or_else(|| {
        let said: String = said.chars().take(200).collect();
        let context = format!("{} says {said:?}, no version of {kind}", program.display());
        Error::new(ErrorKind::Protocol, context)
    })
}

fn version_in(kind: Kind, said: &str) -> Option<Version> {
    let first = said.lines().next()?;
    let after = match kind {
        Kind::Firecracker => first.strip_prefix("Firecracker ")?,
        Kind::CloudHypervisor => first.strip_prefix("cloud-hypervisor ")?,
        Kind::Qemu => first.split_once("version ")?.1,
    };
    after.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn places() -> Places {
        Places {
            name: "box".to_owned(),
            folder: "/live/box".into(),
            api: "/live/box/a,pi".into(),
            memory: Some(Memory { path: "/m,em".into(), sharing: Sharing::Private }),
            disks: BTreeMap::from([("root".to_owned(), DiskPlace::File("/disk".into()))]),
            vsock: None,
        }
    }

    /// A program that is there.
    const PROGRAM: &str = "/bin/sh";

    fn qemu() -> Template {
        let text = format!(
            r#"{{"vmm":"qemu","program":"{PROGRAM}","memory_bytes":67108864,
                "args":["-machine","q35","-drive","file={{disk:root}}"]}}"#
        );
        Template::parse(text.as_bytes()).unwrap()
    }

    #[test]
    fn qemu_gets_its_memory_by_version_and_occasion() {
        let old = qemu().boot(&places(), Version::new(7, 2, 0)).unwrap();
        let id = QEMU_MEMORY;
        let object = |sharing: &str| {
            format!("memory-backend-file,id={id},size=67108864,mem-path=/m,,em,{sharing}")
        };
        let machine = format!("q35,memory-backend={id}");
        assert_eq!(old.args[..4], ["-machine", &machine, "-drive", "file=/disk"]);
        assert!(old.args.contains(&object("share=off")), "{:?}", old.args);
        assert!(old.args.contains(&"unix:/live/box/a,,pi,server=on,wait=off".to_owned()));
        let new = qemu().wake(&places(), Version::new(8, 2, 0)).unwrap();
        assert!(new.args.contains(&object("share=off,readonly=on,rom=off")), "{:?}", new.args);
        assert_eq!(new.args[new.args.len() - 3..], ["-S", "-incoming", "defer"]);
        assert!(!old.args.contains(&"-S".to_owned()));
        let shared = Memory { path: "/m".into(), sharing: Sharing::Shared };
        let places = Places { memory: Some(shared), ..places() };
        let shared = qemu().boot(&places, Version::new(10, 0, 0)).unwrap();
        assert!(shared.args.iter().any(|arg| arg.ends_with("mem-path=/m,share=on")));
    }

    #[test]
    fn a_firecracker_that_wakes_is_told_nothing() {
        let text = format!(
            r#"{{"vmm":"firecracker","program":"{PROGRAM}","args":["--boot-timer"],
                "config":{{"drives":[{{"drive_id":"root","path_on_host":"{{disk:root}}"}}]}}}}"#
        );
        let template = Template::parse(text.as_bytes()).unwrap();
        let version = Version::new(1, 12, 0);
        let boot = template.boot(&places(), version).unwrap();
        let config = "/live/box/firecracker.json";
        assert_eq!(
            boot.args,
            ["--api-sock", "/live/box/a,pi", "--config-file", config, "--boot-timer"]
        );
        let [(path, bytes)] = boot.files.as_slice() else { panic!("{:?}", boot.files) };
        assert_eq!(path, Path::new(config));
        assert!(String::from_utf8_lossy(bytes).contains("\"/disk\""));
        let wake = template.wake(&places(), version).unwrap();
        assert_eq!(wake.args, ["--api-sock", "/live/box/a,pi"]);
        assert!(wake.files.is_empty());
        let error = template.boot(&places(), Version::new(1, 6, 0)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Incompatible);
    }

    #[test]
    fn what_cannot_be_started_is_refused() {
        for text in [
            "{}",
            r#"{"vmm":"vmware"}"#,
            r#"{"vmm":"firecracker"}"#,
            r#"{"vmm":"firecracker","config":{},"unknown":1}"#,
            r#"{"vmm":"qemu","args":["-machine","q35"]}"#,
            r#"{"vmm":"qemu","args":["-machine"],"memory_bytes":4096}"#,
            r#"{"vmm":"qemu","args":["-machine","q35","-m","1G"],"memory_bytes":4096}"#,
            r#"{"vmm":"qemu","args":["-machine","q35"],"memory_bytes":100}"#,
            r#"{"vmm":"cloud-hypervisor","config":{}}"#,
            r#"{"vmm":"cloud-hypervisor","transfer":"descriptors"}"#,
            r#"{"vmm":"cloud-hypervisor","transfer":"pigeons"}"#,
            r#"{"vmm":"cloud-hypervisor","transfer":"descriptors","args":["--memory","size=1G"]}"#,
            r#"{"vmm":"cloud-hypervisor","transfer":"descriptors",
                "args":["--memory","size=0","--memory-zone","id=a,size=1G,shared=on","id=b,size=1G"]}"#,
            r#"{"vmm":"qemu","args":["-machine","q35"],"memory_bytes":4096,"transfer":"descriptors"}"#,
        ] {
            let error = Template::parse(text.as_bytes()).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::InvalidInput, "{text}");
        }
    }

    #[test]
    fn versions_are_found_in_what_programs_say() {
        for (kind, said, version) in [
            (Kind::Firecracker, "Firecracker v1.13.1\n\nSupported", Version::new(1, 13, 1)),
            (Kind::CloudHypervisor, "cloud-hypervisor v53.0\n", Version::new(53, 0, 0)),
            (
                Kind::Qemu,
                "QEMU emulator version 7.2.22 (Debian 1:7.2)\nCopyright",
                Version::new(7, 2, 22),
            ),
        ] {
            assert_eq!(version_in(kind, said), Some(version));
            assert_eq!(version_in(kind, "something else"), None);
        }
    }
}
