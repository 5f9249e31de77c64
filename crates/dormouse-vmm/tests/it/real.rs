//! The real programs, where this machine has them: what needs no virtual machine.

use std::collections::BTreeMap;
use std::fs::File;
use std::process::Stdio;

use dormouse_vmm::deadline::Timeouts;
use dormouse_vmm::kind::Kind;
use dormouse_vmm::launch::{Places, Template, program_version};
use dormouse_vmm::program;
use dormouse_vmm::vmm::{Status, connect_at_start};

#[test]
fn programs_of_this_machine_are_understood() {
    for kind in [Kind::Firecracker, Kind::CloudHypervisor] {
        let Ok(found) = program::find(kind, None) else {
            eprintln!(
                "NOT TESTED: there is no {kind} on this machine (PATH, {}); its double is tested",
                kind.variable()
            );
            continue;
        };
        let version = program_version(kind, &found).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let template = Template {
            vmm: kind,
            program: Some(found),
            args: Vec::new(),
            wake_args: Vec::new(),
            config: (kind == Kind::Firecracker).then(|| serde_json::json!({})),
            environment: BTreeMap::new(),
            work_folder: None,
            memory_bytes: None,
            transfer: dormouse_vmm::launch::Transfer::Files,
        };
        let places = Places {
            name: "real".to_owned(),
            folder: folder.path().to_owned(),
            api: folder.path().join("api"),
            memory: None,
            disks: BTreeMap::new(),
            vsock: None,
        };
        let start = template.wake(&places, version).unwrap();
        let log = File::create(folder.path().join("log")).unwrap();
        let mut child = start
            .command()
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap();
        let mut ended = || child.try_wait().unwrap().map(|status| status.to_string());
        let connected = connect_at_start(kind, &start.api, Timeouts::STANDARD, &mut ended);
        let status = connected.and_then(|mut vmm| {
            assert_eq!(vmm.version(), version);
            vmm.status()
        });
        drop(child.kill());
        child.wait().unwrap();
        assert_eq!(status.unwrap(), Status::NotStarted);
    }
}
