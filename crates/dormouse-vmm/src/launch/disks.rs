//! Which disks a template gives its VMM: all that a guest writes to have to be those that are stored with
//! it, under names by which a wake can give them again.

use serde_json::Value;

use super::Template;
use crate::error::{Error, ErrorKind, Result};
use crate::kind::Kind;

/// QEMU's options that take the file of a disk and nothing else.
const QEMU_FILE_OPTIONS: [&str; 10] =
    ["hda", "hdb", "hdc", "hdd", "fda", "fdb", "sd", "pflash", "mtdblock", "virtioblk"];

impl Template {
    /// Refuses a template that does not give its VMM each of the disks with these ids, that calls one of
    /// them otherwise where a wake names it, or that has a disk beside them which the guest may write to.
    pub fn check_disks(&self, ids: &[&str]) -> Result<()> {
        match self.vmm {
            Kind::Firecracker => self.check_drives()?,
            Kind::CloudHypervisor => {
                for (option, value) in with_options(&self.args) {
                    if option == Some("--disk") {
                        check_cloud_hypervisor_disk(value)?;
                    }
                }
            }
            Kind::Qemu => self.check_qemu_disks()?,
        }
        for id in ids {
            if !self.mentions(&format!("{{disk:{id}}}")) {
                return bad(format!(
                    "disk {id} is stored with the guest, and its VMM is not given it: \
                     {{disk:{id}}} stands nowhere"
                ));
            }
        }
        Ok(())
    }

    /// Whether the VMM is told of something.
    pub fn mentions(&self, what: &str) -> bool {
        let in_args = self.args.iter().chain(&self.wake_args).any(|arg| arg.contains(what));
        in_args || self.config.as_ref().is_some_and(|config| has_text(config, what))
    }

    fn check_drives(&self) -> Result<()> {
        let drives = self.config.as_ref().and_then(|config| config["drives"].as_array());
        for drive in drives.into_iter().flatten() {
            let name = drive["drive_id"].as_str().unwrap_or_default();
            match drive["path_on_host"].as_str().map(|path| (path, ours(path))) {
                Some((_, Some(id))) if id != name => {
                    return bad(format!(
                        "drive {name:?} has disk {id:?}: a wake knows it by one name, so they are to \
                         have the same"
                    ));
                }
                Some((path, None)) if drive["is_read_only"] != true => return Err(foreign(path)),
                _ => {}
            }
        }
        Ok(())
    }

    fn check_qemu_disks(&self) -> Result<()> {
        let mut args = self.args.iter().map(String::as_str);
        while let Some(arg) = args.next() {
            let Some(option) = arg.strip_prefix('-').map(|rest| rest.trim_start_matches('-'))
            else {
                continue;
            };
            if option == "snapshot" {
                return bad("-snapshot keeps what the guest writes from its disks".to_owned());
            }
            let takes_file = QEMU_FILE_OPTIONS.contains(&option);
            if !takes_file && option != "drive" && option != "blockdev" {
                continue;
            }
            let Some(value) = args.next() else { break };
            let has = |field: &str| value.split(',').any(|given| given == field);
            if has("snapshot=on") {
                return bad(format!("{value}: its disk does not get what the guest writes"));
            }
            let path = match option {
                "drive" => field(value, "file"),
                "blockdev" if has("driver=file") => field(value, "filename"),
                "blockdev" => None,
                _ => Some(value),
            };
            let reads_only =
                ["readonly=on", "readonly", "read-only=on", "media=cdrom"].into_iter().any(has);
            match path {
                Some(path) if ours(path).is_none() && !reads_only => return Err(foreign(path)),
                _ => {}
            }
        }
        Ok(())
    }
}

/// A value of Cloud Hypervisor's `--disk`, its disk named as a wake names it.
pub(super) fn named(value: &str) -> String {
    match field(value, "path").and_then(ours) {
        Some(id) if field(value, "id").is_none() => format!("{value},id={id}"),
        _ => value.to_owned(),
    }
}

fn check_cloud_hypervisor_disk(value: &str) -> Result<()> {
    let Some(path) = field(value, "path") else { return Ok(()) };
    match (ours(path), field(value, "id")) {
        (Some(id), Some(name)) if id != name => bad(format!(
            "{value}: a wake knows the disk by one name, so its id is to be {id}, or left out"
        )),
        (None, _) if field(value, "readonly") != Some("on") => Err(foreign(path)),
        _ => Ok(()),
    }
}

/// Arguments, each that is a value with the option that it is one of; an option may have several.
pub(super) fn with_options(args: &[String]) -> impl Iterator<Item = (Option<&str>, &str)> {
    let mut option = None;
    args.iter().map(move |arg| {
        if arg.starts_with("--") {
            option = Some(arg.as_str());
            return (None, arg.as_str());
        }
        (option, arg.as_str())
    })
}

/// The disk whose place stands there.
fn ours(path: &str) -> Option<&str> {
    path.trim_matches('"').strip_prefix("{disk:")?.strip_suffix('}')
}

/// A field of an option's value. A comma in quotes parts none, nor do two that QEMU takes for one.
fn field<'a>(value: &'a str, name: &str) -> Option<&'a str> {
    let mut from = 0;
    let mut is_quoted = false;
    let bytes = value.as_bytes();
    let mut at = 0;
    while at <= bytes.len() {
        match bytes.get(at) {
            Some(b'"') => is_quoted = !is_quoted,
            Some(b',') if is_quoted => {}
            Some(b',') if bytes.get(at + 1) == Some(&b',') => at += 1,
            Some(b',') | None => {
                let found = value[from..at].split_once('=').filter(|(given, _)| *given == name);
                if let Some((_, found)) = found {
                    return Some(found);
                }
                from = at + 1;
            }
            Some(_) => {}
        }
        at += 1;
    }
    None
}

fn has_text(value: &Value, what: &str) -> bool {
    match value {
        Value::String(text) => text.contains(what),
        Value::Array(items) => items.iter().any(|item| has_text(item, what)),
        Value::Object(fields) => fields.values().any(|field| has_text(field, what)),
        _ => false,
    }
}

fn foreign(path: &str) -> Error {
    let context = format!(
        "{path} is written to by the guest and would be in no snapshot of it, and the same for all \
         forks: make it one of the guest's disks, {{disk:ID}}, or read-only"
    );
    Error::new(ErrorKind::InvalidInput, context)
}

fn bad(why: String) -> Result<()> {
    Err(Error::new(ErrorKind::InvalidInput, why))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn check(template: &Value, ids: &[&str]) -> Option<String> {
        let template = Template::parse(template.to_string().as_bytes()).unwrap();
        template.check_disks(ids).err().map(|error| error.to_string())
    }

    #[test]
    fn firecrackers_drives_are_named_as_the_disks() {
        let of = |drives: Value| json!({ "vmm": "firecracker", "config": { "drives": drives } });
        let drive = |id: &str, path: &str, is_read_only: bool| json!({ "drive_id": id, "path_on_host": path, "is_read_only": is_read_only });
        let right = of(json!([drive("root", "{disk:root}", false), drive("tools", "/t", true)]));
        assert_eq!(check(&right, &["root"]), None);
        assert!(check(&right, &["root", "data"]).unwrap().contains("{disk:data} stands nowhere"));
        let named = of(json!([drive("rootfs", "{disk:root}", false)]));
        assert!(check(&named, &["root"]).unwrap().contains("\"rootfs\" has disk \"root\""));
        let foreign = of(json!([drive("root", "{disk:root}", false), drive("b", "/b", false)]));
        assert!(check(&foreign, &["root"]).unwrap().starts_with("/b is written to"));
    }

    #[test]
    fn cloud_hypervisors_disks_are_named_as_the_disks() {
        let of = |disks: &[&str]| {
            let args: Vec<&str> =
                ["--disk"].iter().chain(disks).chain(&["--cpus"]).copied().collect();
            json!({ "vmm": "cloud-hypervisor", "args": args })
        };
        for right in
            ["path={disk:root}", "id=root,path={disk:root}", "path=\"{disk:root}\",id=root"]
        {
            assert_eq!(check(&of(&[right, "path=/t,readonly=on"]), &["root"]), None, "{right}");
        }
        assert!(
            check(&of(&["path={disk:root},id=os"]), &["root"])
                .unwrap()
                .contains("id is to be root")
        );
        assert!(
            check(&of(&["path={disk:root}", "path=\"/a,b\""]), &["root"]).unwrap().contains("/a,b")
        );
        assert_eq!(check(&of(&["vhost_user=on,socket=/s"]), &[]), None);
        assert_eq!(named("path={disk:root},direct=on"), "path={disk:root},direct=on,id=root");
        assert_eq!(named("path={disk:root},id=x"), "path={disk:root},id=x");
        assert_eq!(named("path=/else"), "path=/else");
    }

    #[test]
    fn what_qemu_writes_to_is_a_disk() {
        let of = |args: &[&str]| {
            let args: Vec<&str> = ["-machine", "q35"].iter().chain(args).copied().collect();
            json!({ "vmm": "qemu", "memory_bytes": 4096, "args": args })
        };
        for right in [
            &["-drive", "file={disk:root},format=raw,if=none,id=d0"][..],
            &["-drive", "if=none,id=cd", "-hda", "{disk:root}"],
            &["-drive", "file=/code.fd,if=pflash,readonly=on", "-hda", "{disk:root}"],
            &["-cdrom", "/iso", "-hda", "{disk:root}", "-kernel", "/k"],
            &["-blockdev", "driver=file,filename={disk:root},node-name=n"],
            &["-blockdev", "driver=raw,file=n,node-name=f", "-hda", "{disk:root}"],
        ] {
            assert_eq!(check(&of(right), &["root"]), None, "{right:?}");
        }
        for (wrong, why) in [
            (&["-hda", "{disk:root}", "-snapshot"][..], "-snapshot"),
            (&["--snapshot", "-hda", "{disk:root}"], "-snapshot"),
            (&["-drive", "file={disk:root},snapshot=on"], "does not get what"),
            (&["-drive", "file=/vars.fd,if=pflash", "-hda", "{disk:root}"], "/vars.fd is written"),
            (&["-drive", "if=none,file=/a,,b", "-hda", "{disk:root}"], "/a,,b is written"),
            (&["-hda", "/h", "-hdb", "{disk:root}"], "/h is written"),
            (&["-blockdev", "filename=/h,driver=file", "-hda", "{disk:root}"], "/h is written"),
            (&["-nographic"], "stands nowhere"),
        ] {
            let said = check(&of(wrong), &["root"]).unwrap_or_default();
            assert!(said.contains(why), "{wrong:?}: {said}");
        }
    }
}
