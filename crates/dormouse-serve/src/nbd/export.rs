//! An export: a device under a name.

use std::fmt;
use std::sync::Arc;

use super::handshake::ReplyForm;
use super::limits::STRING_BYTES_MAX;
use super::protocol::transmission_flag as flag;
use super::stats::{Counters, ExportStats};
use crate::device::BlockDevice;
use crate::error::{Error, ErrorKind, Result};

/// A device under a name. A server's only export is also what a client gets that asks for the empty
/// name; of several, the one that [is made the default](super::ServerBuilder::default_export), if any.
pub struct Export {
    name: String,
    description: String,
    device: Arc<dyn BlockDevice>,
    counters: Counters,
}

impl Export {
    /// `device` under `name`, which clients put into their URIs.
    pub fn new(name: impl Into<String>, device: Arc<dyn BlockDevice>) -> Export {
        Export {
            name: name.into(),
            description: String::new(),
            device,
            counters: Counters::default(),
        }
    }

    /// Adds a line for people, which `nbdinfo --list` shows.
    #[must_use]
    pub fn description(mut self, description: impl Into<String>) -> Export {
        self.description = description.into();
        self
    }

    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    pub(crate) fn describe(&self) -> &str {
        &self.description
    }

    pub(crate) fn device(&self) -> &dyn BlockDevice {
        &*self.device
    }

    pub(crate) fn counters(&self) -> &Counters {
        &self.counters
    }

    pub(crate) fn stats(&self) -> ExportStats {
        self.counters.snapshot(&self.name)
    }

    /// What the export can do, told to the client when it enters transmission.
    pub(crate) fn transmission_flags(&self, form: ReplyForm) -> u16 {
        let always = flag::HAS_FLAGS
            | flag::SEND_FLUSH
            | flag::SEND_FUA
            | flag::SEND_CACHE
            | flag::CAN_MULTI_CONN;
        let access = if self.device.is_read_only() {
            flag::READ_ONLY
        } else {
            flag::SEND_TRIM | flag::SEND_WRITE_ZEROES | flag::SEND_FAST_ZERO
        };
        let replies = match form {
            ReplyForm::Simple => 0,
            ReplyForm::Structured => flag::SEND_DF,
            ReplyForm::Extended => flag::SEND_DF | flag::BLOCK_STAT_PAYLOAD,
        };
        always | access | replies
    }
}

impl fmt::Debug for Export {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Export")
            .field("name", &self.name)
            .field("description", &self.description)
            .field("size_bytes", &self.device.size_bytes())
            .finish_non_exhaustive()
    }
}

/// The exports of a server.
#[derive(Debug)]
pub(crate) struct Exports {
    list: Vec<Arc<Export>>,
    default: Option<usize>,
}

impl Exports {
    /// Checks names: distinct, not empty, short enough for the protocol.
    pub(crate) fn new(list: Vec<Export>, default: Option<&str>) -> Result<Exports> {
        let refuse = |message: String| Err(Error::new(ErrorKind::InvalidInput, message));
        if list.is_empty() {
            return refuse("a server needs at least one export".to_owned());
        }
        for (number, export) in list.iter().enumerate() {
            let name = &export.name;
            if name.is_empty() || name.len() > STRING_BYTES_MAX || name.contains('\0') {
                return refuse(format!("export {name:?}: a name has 1 to 4096 bytes and no NUL"));
            }
            if export.description.len() > STRING_BYTES_MAX {
                return refuse(format!("export {name:?}: its description exceeds 4096 bytes"));
            }
            if list[..number].iter().any(|other| other.name == *name) {
                return refuse(format!("two exports are named {name:?}"));
            }
        }
        let default = match default {
            None => (list.len() == 1).then_some(0),
            Some(name) => match list.iter().position(|export| export.name == name) {
                Some(index) => Some(index),
                None => return refuse(format!("no export {name:?} to be the default")),
            },
        };
        Ok(Exports { list: list.into_iter().map(Arc::new).collect(), default })
    }

    /// The export of that name; the empty name is the default's, if there is one.
    pub(crate) fn find(&self, name: &str) -> Option<&Arc<Export>> {
        if name.is_empty() {
            return self.list.get(self.default?);
        }
        self.list.iter().find(|export| export.name == name)
    }

    pub(crate) fn list(&self) -> &[Arc<Export>] {
        &self.list
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Nothing;

    impl BlockDevice for Nothing {
        fn size_bytes(&self) -> u64 {
            0
        }
        fn is_read_only(&self) -> bool {
            true
        }
        fn read_at(&self, _buffer: &mut [u8], _offset: u64) -> super::super::DeviceResult<()> {
            Ok(())
        }
    }

    fn exports(names: &[&str], default: Option<&str>) -> Result<Exports> {
        let list = names.iter().map(|&name| Export::new(name, Arc::new(Nothing))).collect();
        Exports::new(list, default)
    }

    #[test]
    fn names_are_distinct_and_fit_the_protocol() {
        for (names, default) in [
            (&[][..], None),
            (&[""], None),
            (&["a\0"], None),
            (&["a", "b", "a"], None),
            (&["a"], Some("b")),
            (&["x".repeat(4097).as_str()], None),
        ] {
            assert!(exports(names, default).is_err(), "{names:?} {default:?}");
        }
    }

    #[test]
    fn the_empty_name_is_the_default() {
        let only = exports(&["a"], None).unwrap();
        assert_eq!(only.find("").unwrap().name(), "a");
        let several = exports(&["a", "b"], None).unwrap();
        assert!(several.find("").is_none(), "nobody said which");
        let second = exports(&["a", "b"], Some("b")).unwrap();
        assert_eq!(second.find("").unwrap().name(), "b");
        assert_eq!(second.find("a").unwrap().name(), "a");
        assert!(second.find("c").is_none());
    }
}
