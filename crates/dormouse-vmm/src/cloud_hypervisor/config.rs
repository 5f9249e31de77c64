//! `config.json`: whether it is whole, and the same with other disks and devices.
//!
//! Fields that are not known here stay as they are.

use std::path::Path;

use serde_json::Value;

use super::CONFIG;
use crate::error::{Error, ErrorKind, Result};
use crate::vmm::{Drive, Network};

/// Refuses a configuration that is not whole.
pub fn check(bytes: &[u8]) -> Result<()> {
    parse(bytes).map(drop)
}

fn parse(bytes: &[u8]) -> Result<Value> {
    let config: Value = serde_json::from_slice(bytes).map_err(|error| {
        let context = format!("{CONFIG} of {} bytes is damaged or cut short", bytes.len());
        Error::with_source(ErrorKind::InvalidFile, context, error)
    })?;
    // The two that every guest has.
    if !config["cpus"].is_object() || !config["memory"].is_object() {
        let context = format!("{CONFIG} has no cpus and memory");
        return Err(Error::new(ErrorKind::InvalidFile, context));
    }
    Ok(config)
}

/// The paths of disks, by id.
pub fn disks(bytes: &[u8]) -> Result<Vec<(String, Option<String>)>> {
    let config = parse(bytes)?;
    let Some(disks) = config["disks"].as_array() else { return Ok(Vec::new()) };
    let text = |value: &Value| value.as_str().map(str::to_owned);
    Ok(disks.iter().filter_map(|disk| Some((text(&disk["id"])?, text(&disk["path"])))).collect())
}

/// The configuration with other files for disks, other tap devices, and another vsock socket. All
/// that are named have to be there.
pub fn rewrite(
    bytes: &[u8],
    drives: &[Drive],
    networks: &[Network],
    vsock: Option<&Path>,
) -> Result<Vec<u8>> {
    let mut config = parse(bytes)?;
    for drive in drives {
        set(&mut config, "disks", &drive.id, "path", text(&drive.path)?)?;
    }
    for network in networks {
        set(&mut config, "net", &network.id, "tap", &network.host_device)?;
    }
    if let Some(path) = vsock {
        let path = text(path)?;
        let device = config.get_mut("vsock").and_then(Value::as_object_mut);
        let device = device.ok_or_else(|| missing("vsock device", ""))?;
        device.insert("socket".to_owned(), Value::String(path.to_owned()));
    }
    Ok(config.to_string().into_bytes())
}

fn set(config: &mut Value, list: &str, id: &str, field: &str, value: &str) -> Result<()> {
    let devices = config.get_mut(list).and_then(Value::as_array_mut);
    let device = devices
        .into_iter()
        .flatten()
        .filter_map(Value::as_object_mut)
        .find(|device| device.get("id").and_then(Value::as_str) == Some(id))
        .ok_or_else(|| missing(list, id))?;
    device.insert(field.to_owned(), Value::String(value.to_owned()));
    Ok(())
}

fn missing(what: &str, id: &str) -> Error {
    Error::new(ErrorKind::InvalidInput, format!("{CONFIG} has no {what} {id:?}"))
}

fn text(path: &Path) -> Result<&str> {
    path.to_str().ok_or_else(|| {
        Error::new(ErrorKind::InvalidInput, format!("{} is not UTF-8", path.display()))
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn config() -> Value {
        json!({
            "cpus": {"boot_vcpus": 1, "later": [1, 2]},
            "memory": {"size": 1 << 30, "shared": true},
            "disks": [
                {"path": "/old/a", "id": "_disk0", "readonly": false, "later": {"x": null}},
                {"path": "/old/b", "id": "data"},
            ],
            "net": [{"id": "net0", "tap": "tap0", "mac": "x"}],
            "vsock": {"cid": 3, "socket": "/old/v"},
            "unknown": 18_446_744_073_709_551_615_u64,
        })
    }

    #[test]
    fn only_what_is_named_changes() {
        let drives = [Drive { id: "_disk0".to_owned(), path: "/new/a".into() }];
        let networks = [Network { id: "net0".to_owned(), host_device: "tap9".to_owned() }];
        let bytes = config().to_string();
        let rewritten =
            rewrite(bytes.as_bytes(), &drives, &networks, Some(Path::new("/new/v"))).unwrap();
        let mut expected = config();
        expected["disks"][0]["path"] = json!("/new/a");
        expected["net"][0]["tap"] = json!("tap9");
        expected["vsock"]["socket"] = json!("/new/v");
        assert_eq!(serde_json::from_slice::<Value>(&rewritten).unwrap(), expected);
        assert_eq!(
            disks(&rewritten).unwrap(),
            [
                ("_disk0".to_owned(), Some("/new/a".to_owned())),
                ("data".to_owned(), Some("/old/b".to_owned()))
            ]
        );
        let nothing = rewrite(bytes.as_bytes(), &[], &[], None).unwrap();
        assert_eq!(serde_json::from_slice::<Value>(&nothing).unwrap(), config());
    }

    #[test]
    fn what_is_missing_or_cut_short_is_an_error() {
        let bytes = config().to_string();
        for end in [0, 1, bytes.len() / 2, bytes.len() - 1] {
            let error = check(&bytes.as_bytes()[..end]).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::InvalidFile);
        }
        assert!(check(b"{}").is_err() && check(b"[]").is_err() && check(b"1").is_err());
        let drives = [Drive { id: "none".to_owned(), path: "/new/a".into() }];
        let error = rewrite(bytes.as_bytes(), &drives, &[], None).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidInput);
        let networks = [Network { id: "none".to_owned(), host_device: String::new() }];
        assert!(rewrite(bytes.as_bytes(), &[], &networks, None).is_err());
        let plain = json!({"cpus": {}, "memory": {}}).to_string();
        assert!(rewrite(plain.as_bytes(), &[], &[], Some(Path::new("/v"))).is_err());
    }
}
