//! A folder with a store in it, and the command run there.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Output;

use assert_cmd::Command;
use serde_json::Value;
use tempfile::TempDir;

/// The exit codes of `docs/cli.md`.
pub(crate) mod code {
    pub(crate) const OK: i32 = 0;
    pub(crate) const USAGE: i32 = 2;
    pub(crate) const NOT_FOUND: i32 = 3;
    pub(crate) const ALREADY_EXISTS: i32 = 4;
    pub(crate) const CONFLICT: i32 = 5;
    pub(crate) const REFUSED: i32 = 6;
    pub(crate) const CORRUPT: i32 = 7;
    pub(crate) const UNSUPPORTED: i32 = 8;
    pub(crate) const KEY: i32 = 9;
    pub(crate) const BUSY: i32 = 10;
    pub(crate) const IO: i32 = 11;
    pub(crate) const CANCELLED: i32 = 130;
}

/// What `--json` prints: fields that are derived must not come twice.
#[derive(serde::Deserialize)]
struct Object {
    version: u32,
    #[serde(flatten)]
    _rest: std::collections::BTreeMap<String, serde::de::IgnoredAny>,
}

/// A folder that is removed at the end.
#[derive(Debug)]
pub(crate) struct Home {
    dir: TempDir,
}

impl Home {
    /// An empty folder.
    pub(crate) fn new() -> Home {
        Home { dir: TempDir::new().unwrap() }
    }

    /// A folder with an empty store.
    pub(crate) fn with_store() -> Home {
        let home = Home::new();
        home.ok(&["init"]);
        home
    }

    /// A path in the folder.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// The store's folder.
    pub(crate) fn store(&self) -> PathBuf {
        self.path("dormouse-store")
    }

    /// Writes a file.
    pub(crate) fn file(&self, name: &str, bytes: &[u8]) -> PathBuf {
        let path = self.path(name);
        fs::write(&path, bytes).unwrap();
        path
    }

    /// The command, to be run in the folder.
    pub(crate) fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_dormouse"));
        command.current_dir(self.dir.path()).env_remove("DORMOUSE_STORE").args(arguments);
        command
    }

    /// Runs it.
    pub(crate) fn run(&self, arguments: &[&str]) -> Output {
        self.command(arguments).output().unwrap()
    }

    /// Runs it, which must succeed, and gives what it printed.
    pub(crate) fn ok(&self, arguments: &[&str]) -> String {
        let output = self.run(arguments);
        assert_eq!(output.status.code(), Some(code::OK), "{arguments:?}: {}", errors(&output));
        String::from_utf8(output.stdout).unwrap()
    }

    /// Runs it, which must fail with a code, and gives what it complained about.
    pub(crate) fn fails(&self, expected: i32, arguments: &[&str]) -> String {
        let output = self.run(arguments);
        let errors = errors(&output);
        assert_eq!(output.status.code(), Some(expected), "{arguments:?}: {errors}");
        assert!(!errors.contains("panicked"), "{errors}");
        errors
    }

    /// Runs it with `--json`, which must succeed, print one object and say nothing else.
    pub(crate) fn json(&self, arguments: &[&str]) -> Value {
        let output = self.command(arguments).arg("--json").output().unwrap();
        assert_eq!(output.status.code(), Some(code::OK), "{arguments:?}: {}", errors(&output));
        assert_eq!(errors(&output), "", "{arguments:?}");
        let object: Object = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!(object.version, 1, "{arguments:?}");
        serde_json::from_slice(&output.stdout).unwrap()
    }

    /// The names of all snapshots.
    pub(crate) fn snapshots(&self) -> Vec<String> {
        let object = self.json(&["ls"]);
        let rows = object["snapshots"].as_array().unwrap();
        rows.iter().map(|row| row["snapshot"].as_str().unwrap().to_owned()).collect()
    }

    /// Files of the store's folders of packs and snapshots, with their lengths.
    pub(crate) fn published(&self) -> Vec<(PathBuf, u64)> {
        let mut files = Vec::new();
        for folder in ["packs", "snapshots", "tmp", "index"] {
            walk(&self.store().join(folder), &mut files);
        }
        files.sort();
        files
    }
}

/// All regular files below a folder, which need not exist.
pub(crate) fn walk(folder: &Path, files: &mut Vec<(PathBuf, u64)>) {
    let Ok(entries) = fs::read_dir(folder) else { return };
    for entry in entries {
        let entry = entry.unwrap();
        let metadata = entry.metadata().unwrap();
        if metadata.is_dir() {
            walk(&entry.path(), files);
        } else {
            files.push((entry.path(), metadata.len()));
        }
    }
}

/// Standard error as text.
pub(crate) fn errors(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// `blocks` blocks of 4 KiB that differ from each other and from those of other seeds.
pub(crate) fn noise(seed: u64, blocks: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut bytes = Vec::with_capacity(blocks * 4096);
    while bytes.len() < blocks * 4096 {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes
}

/// Overwrites a block.
pub(crate) fn set_block(image: &mut [u8], block: usize, with: &[u8]) {
    image[block * 4096..][..4096].copy_from_slice(with);
}
