//! The folder of a store: what lies where, and the parameters that make it one. All of it is its owner's
//! alone.
//!
//! ```text
//! dormouse.json              format version, id, key id
//! keys/KEYID                 32 random bytes for the domain's digests
//! packs/3f/3fa9….pack        a pack by its id
//! packs/bundle/ID.bundle     several packs in one file
//! snapshots/NAME/N.json      manifests; publishing one is the commit point
//! snapshots/NAME/next        the lowest number that was never given out, once one was removed
//! snapshots/NAME/next.lock   held while a number is taken and while a snapshot is removed
//! traces/UUID                in which order a snapshot's memory is touched; advice, may be deleted
//! index/merge.lock           one merge at a time
//! index/ID.run               digest → pack and slot; derived, may be deleted
//! pins/UUID                  what a running process holds; locked as long as it lives
//! live/NAME/pin              what a live VM holds, as long as its folder is there
//! tmp/UUID.KIND              in flight, named after the pin of its owner
//! compact.lock               one compaction at a time
//! gc.lock                    shared while pinning, exclusive while deleting
//! ```

use dormouse_image::digest::DomainKey;
use dormouse_image::pack::PackId;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::disk::{Disk, read_file};
use crate::envelope::Envelope;
use crate::error::{Context, Error, ErrorKind, Result};
use crate::name::Name;

pub(crate) const PARAMETERS: &str = "dormouse.json";
pub(crate) const KEYS: &str = "keys";
pub(crate) const PACKS: &str = "packs";
pub(crate) const BUNDLES: &str = "packs/bundle";
pub(crate) const SNAPSHOTS: &str = "snapshots";
pub(crate) const TRACES: &str = "traces";
pub(crate) const INDEX: &str = "index";
pub(crate) const PINS: &str = "pins";
pub(crate) const TMP: &str = "tmp";
pub(crate) const LIVE: &str = "live";
pub(crate) const GC_LOCK: &str = "gc.lock";
pub(crate) const COMPACT_LOCK: &str = "compact.lock";
pub(crate) const MERGE_LOCK: &str = "index/merge.lock";

const ENVELOPE: Envelope = Envelope { format: "dormouse-store", version: 1, body: "store" };
const PARAMETERS_BYTES_MAX: u64 = 64 << 10;

/// What `dormouse.json` says.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Parameters {
    pub(crate) id: Uuid,
    pub(crate) created: Timestamp,
    pub(crate) key_id: String,
}

pub(crate) fn pack_folder(pack: PackId) -> String {
    format!("{PACKS}/{:02x}", pack.0[0])
}

pub(crate) fn pack_path(pack: PackId) -> String {
    format!("{PACKS}/{:02x}/{pack}.pack", pack.0[0])
}

pub(crate) fn snapshot_folder(name: &Name) -> String {
    format!("{SNAPSHOTS}/{name}")
}

pub(crate) fn manifest_path(name: &Name, number: u64) -> String {
    format!("{SNAPSHOTS}/{name}/{number}.json")
}

/// Makes the folders, the key and last the parameters, whose name makes it a store.
pub(crate) fn init(disk: &dyn Disk) -> Result<()> {
    match disk.list("") {
        Ok(entries) if entries.iter().any(|entry| entry.name == PARAMETERS) => {
            return Err(Error::new(ErrorKind::AlreadyExists, "there is a store already"));
        }
        Ok(entries) => {
            // What an init that was cut short left is taken over; anything else is not ours.
            let ours = [KEYS, PACKS, SNAPSHOTS, INDEX, PINS, TMP, GC_LOCK];
            if let Some(entry) = entries.iter().find(|entry| !ours.contains(&entry.name.as_str())) {
                return Err(Error::new(
                    ErrorKind::Refused,
                    format!("the folder is not empty (it holds {:?}); choose another", entry.name),
                ));
            }
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
        Err(error) => return Err(Error::io("cannot read the folder", error)),
    }
    for folder in [KEYS, PACKS, BUNDLES, SNAPSHOTS, INDEX, PINS, TMP] {
        disk.create_dir_all(folder).context(|| format!("cannot make {folder}"))?;
    }
    let mut secret = [0; 32];
    let got = rustix::rand::getrandom(&mut secret, rustix::rand::GetRandomFlags::empty())
        .map_err(|error| Error::io("cannot get random bytes for a key", error.into()))?;
    if got != secret.len() {
        return Err(Error::new(ErrorKind::Io, "the kernel gave too few random bytes for a key"));
    }
    let key = DomainKey::new(secret);
    let id = Uuid::now_v7();
    write_new(disk, &format!("{KEYS}/{}", key.id()), KEYS, &secret)?;
    let parameters = Parameters { id, created: Timestamp::now(), key_id: key.id().to_string() };
    let json = ENVELOPE.seal(&parameters)?;
    let tmp = format!("{TMP}/{}.init", Uuid::new_v4());
    write_new(disk, &tmp, TMP, &json)?;
    let published = disk.link(&tmp, PARAMETERS);
    disk.remove(&tmp).context(|| format!("cannot remove {tmp}"))?;
    published.map_err(|error| match error.kind() {
        std::io::ErrorKind::AlreadyExists => {
            Error::new(ErrorKind::AlreadyExists, "there is a store already")
        }
        _ => Error::io(format!("cannot publish {PARAMETERS}"), error),
    })?;
    disk.sync_dir("").context(|| "cannot sync the folder".to_owned())
}

/// Reads the parameters and the key. A lost key is no error yet: listing works without.
pub(crate) fn open(disk: &dyn Disk) -> Result<(Parameters, Option<DomainKey>)> {
    let bytes =
        read_file(disk, PARAMETERS, PARAMETERS_BYTES_MAX).map_err(|error| match error.kind() {
            std::io::ErrorKind::NotFound => Error::new(
                ErrorKind::NotFound,
                "there is no store here; make one with `dormouse init`",
            ),
            _ => Error::io(format!("cannot read {PARAMETERS}"), error),
        })?;
    let parameters: Parameters = ENVELOPE.parse(&bytes).map_err(|error| {
        Error::with_source(error.kind(), format!("cannot use {PARAMETERS}"), error)
    })?;
    if parameters.key_id.len() != 32 || !parameters.key_id.bytes().all(|b| b.is_ascii_hexdigit()) {
        return Err(Error::new(ErrorKind::Corrupt, format!("{PARAMETERS} has no valid key id")));
    }
    let path = format!("{KEYS}/{}", parameters.key_id);
    let key = match read_file(disk, &path, 32) {
        Ok(bytes) => {
            let secret: [u8; 32] = bytes.try_into().map_err(|_| {
                Error::new(ErrorKind::Key, format!("{path} is damaged: a key has 32 bytes"))
            })?;
            let key = DomainKey::new(secret);
            if key.id().to_string() != parameters.key_id {
                return Err(Error::new(
                    ErrorKind::Key,
                    format!("{path} holds another key, {}; put the right one back", key.id()),
                ));
            }
            Some(key)
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => None,
        Err(error) if error.kind() == std::io::ErrorKind::PermissionDenied => None,
        Err(error) => return Err(Error::io(format!("cannot read {path}"), error)),
    };
    Ok((parameters, key))
}

/// Writes a small file and makes it and its name durable.
fn write_new(disk: &dyn Disk, path: &str, folder: &str, bytes: &[u8]) -> Result<()> {
    let mut file = disk.create(path).context(|| format!("cannot make {path}"))?;
    file.write_all(bytes)
        .and_then(|()| file.sync())
        .and_then(|()| disk.sync_dir(folder))
        .context(|| format!("cannot write {path}"))
}
