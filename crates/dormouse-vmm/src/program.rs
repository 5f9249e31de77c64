//! Which file a VMM's program is: what a template says, a variable, or the search path.

use std::env;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use crate::error::{Error, ErrorKind, Result};
use crate::kind::Kind;

impl Kind {
    /// The variable that names its program.
    pub fn variable(self) -> &'static str {
        match self {
            Kind::Firecracker => "DORMOUSE_FIRECRACKER",
            Kind::CloudHypervisor => "DORMOUSE_CLOUD_HYPERVISOR",
            Kind::Qemu => "DORMOUSE_QEMU",
        }
    }

    /// The name of its program.
    pub fn program(self) -> &'static str {
        match self {
            Kind::Firecracker => "firecracker",
            Kind::CloudHypervisor => "cloud-hypervisor",
            Kind::Qemu if cfg!(target_arch = "aarch64") => "qemu-system-aarch64",
            Kind::Qemu => "qemu-system-x86_64",
        }
    }
}

/// Finds a VMM's program: `given`, else what its variable says, else along `PATH`.
///
/// A name without a slash is looked for along `PATH`.
pub fn find(kind: Kind, given: Option<&Path>) -> Result<PathBuf> {
    let named = env::var_os(kind.variable()).filter(|value| !value.is_empty()).map(PathBuf::from);
    let standard = PathBuf::from(kind.program());
    let wanted = given.or(named.as_deref()).unwrap_or(&standard);
    let path = env::var_os("PATH").unwrap_or_default();
    find_along(wanted, &path).ok_or_else(|| {
        let (name, variable) = (wanted.display(), kind.variable());
        let context = match (given, &named) {
            (Some(_), _) => format!("no program {name} that may be run"),
            (None, Some(_)) => {
                format!("{variable} names {name}, which is no program that may be run")
            }
            (None, None) => {
                format!("no program {name}; install {kind} or set {variable} to its program")
            }
        };
        Error::new(ErrorKind::NotFound, context)
    })
}

fn find_along(wanted: &Path, path: &std::ffi::OsStr) -> Option<PathBuf> {
    if wanted.components().count() > 1 {
        return is_program(wanted).then(|| wanted.to_owned());
    }
    env::split_paths(path).map(|folder| folder.join(wanted)).find(|file| is_program(file))
}

fn is_program(path: &Path) -> bool {
    path.metadata().is_ok_and(|file| file.is_file() && file.permissions().mode() & 0o111 != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn programs_are_found_along_the_path_or_where_they_are() {
        let folder = tempfile::tempdir().unwrap();
        let (one, two) = (folder.path().join("one"), folder.path().join("two"));
        for dir in [&one, &two] {
            std::fs::create_dir(dir).unwrap();
        }
        std::fs::write(one.join("vmm"), "not to be run").unwrap();
        std::fs::write(two.join("vmm"), "").unwrap();
        let runnable = std::fs::Permissions::from_mode(0o755);
        std::fs::set_permissions(two.join("vmm"), runnable).unwrap();
        let path = env::join_paths([&one, &two]).unwrap();
        assert_eq!(find_along(Path::new("vmm"), &path), Some(two.join("vmm")));
        assert_eq!(find_along(&two.join("vmm"), &path), Some(two.join("vmm")));
        assert_eq!(find_along(&one.join("vmm"), &path), None);
        assert_eq!(find_along(Path::new("other"), &path), None);
        let missing = find(Kind::Firecracker, Some(Path::new("/none/vmm"))).unwrap_err();
        assert_eq!(missing.kind(), ErrorKind::NotFound);
        assert_eq!(missing.to_string(), "no program /none/vmm that may be run");
    }
}
