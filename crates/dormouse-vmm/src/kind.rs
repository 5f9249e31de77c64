//! Which VMM, and which version of it.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::error::{Error, ErrorKind, Result};

/// A VMM that there is a driver for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// Firecracker, 1.7 and later.
    Firecracker,
    /// Cloud Hypervisor, 48 and later.
    CloudHypervisor,
    /// QEMU, 7.2 and later.
    Qemu,
}

impl Kind {
    /// All of them.
    pub const ALL: [Kind; 3] = [Kind::Firecracker, Kind::CloudHypervisor, Kind::Qemu];

    /// Its name in manifests, commands and documents.
    pub fn name(self) -> &'static str {
        match self {
            Kind::Firecracker => "firecracker",
            Kind::CloudHypervisor => "cloud-hypervisor",
            Kind::Qemu => "qemu",
        }
    }

    /// The oldest version that its driver knows.
    pub fn oldest(self) -> Version {
        match self {
            Kind::Firecracker => Version::new(1, 7, 0),
            Kind::CloudHypervisor => Version::new(48, 0, 0),
            Kind::Qemu => Version::new(7, 2, 0),
        }
    }

    /// Refuses a version that the driver does not know.
    pub(crate) fn check_version(self, version: Version) -> Result<()> {
        if version < self.oldest() {
            let context = format!(
                "this is {self} {version}, and {} is the oldest that is supported; install a later one",
                self.oldest()
            );
            return Err(Error::new(ErrorKind::Incompatible, context));
        }
        Ok(())
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Kind {
    type Err = Error;

    fn from_str(text: &str) -> Result<Kind> {
        match text {
            "firecracker" | "fc" => Ok(Kind::Firecracker),
            "cloud-hypervisor" | "ch" => Ok(Kind::CloudHypervisor),
            "qemu" => Ok(Kind::Qemu),
            _ => Err(Error::new(
                ErrorKind::InvalidInput,
                format!("{text:?} is no VMM; expected firecracker, cloud-hypervisor or qemu"),
            )),
        }
    }
}

/// A version; what stands behind the third number is left out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Version {
    /// The first number.
    pub major: u32,
    /// The second.
    pub minor: u32,
    /// The third, 0 where there is none.
    pub patch: u32,
}

impl Version {
    /// A version.
    pub const fn new(major: u32, minor: u32, patch: u32) -> Version {
        Version { major, minor, patch }
    }

    /// Whether it is this release or a patch of it.
    pub(crate) fn is_release(self, major: u32, minor: u32) -> bool {
        (self.major, self.minor) == (major, minor)
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.major, self.minor, self.patch)
    }
}

impl FromStr for Version {
    type Err = Error;

    /// Reads `1.12.0`, `v53.0`, `v53.0-12-g1234567`, `1.17.0-dev`, `7.2.22 (Debian …)`.
    fn from_str(text: &str) -> Result<Version> {
        let bad = || Error::new(ErrorKind::Protocol, format!("{text:?} is no version"));
        let trimmed = text.trim();
        let numbers = trimmed.strip_prefix('v').unwrap_or(trimmed);
        let end = numbers.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(numbers.len());
        let mut parts = numbers[..end].trim_end_matches('.').split('.');
        let mut next = || parts.next().map(str::parse::<u32>).transpose().map_err(|_| bad());
        let major = next()?.ok_or_else(bad)?;
        let minor = next()?.ok_or_else(bad)?;
        let patch = next()?.unwrap_or(0);
        Ok(Version { major, minor, patch })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read_and_ordered() {
        for (text, expected) in [
            ("1.12.0", (1, 12, 0)),
            ("v53.0", (53, 0, 0)),
            ("v53.0-12-g1234567", (53, 0, 0)),
            ("v51.1.0", (51, 1, 0)),
            ("1.17.0-dev", (1, 17, 0)),
            ("7.2.22 (Debian 1:7.2+dfsg-7+deb12u18)", (7, 2, 22)),
            (" 10.0.2\n", (10, 0, 2)),
        ] {
            let (major, minor, patch) = expected;
            assert_eq!(text.parse::<Version>().unwrap(), Version::new(major, minor, patch));
        }
        for text in ["", "v", "x.1", "1", "1.x", "99999999999.0", ".1.2"] {
            assert!(text.parse::<Version>().is_err(), "{text:?}");
        }
        assert!(Version::new(1, 9, 0) < Version::new(1, 12, 0));
        assert!(Version::new(8, 2, 0) > Version::new(8, 1, 99));
    }

    #[test]
    fn names_go_there_and_back() {
        for kind in Kind::ALL {
            assert_eq!(kind.name().parse::<Kind>().unwrap(), kind);
            assert_eq!(serde_json::to_string(&kind).unwrap(), format!("\"{kind}\""));
            kind.check_version(kind.oldest()).unwrap();
            let error = kind.check_version(Version::new(1, 6, 9)).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Incompatible);
        }
        assert!("vmware".parse::<Kind>().is_err());
    }
}
