//! The daemon with VMs that doubles play: what it answers, counts and logs of them.

use serde_json::json;

use crate::daemon_fixture::Running;
use crate::fixture::code;
use crate::vm_fixture::Vms;

/// A VM that is asleep as `vm@1`.
fn asleep() -> Vms {
    let vms = Vms::of_asking_doubles("1.13.1");
    vms.home.ok(&["run", "guest.json", "box"]);
    vms.work("box");
    vms.home.ok(&["sleep", "box", "--as", "vm"]);
    vms
}

/// It was prepared, and then told that its own first VM was in its way.
#[test]
fn a_fork_of_a_name_twice_is_refused_before_anything_is_done() {
    let vms = asleep();
    let home = &vms.home;
    let said = home.fails(code::USAGE, &["fork", "vm", "one", "k", "k"]);
    assert_eq!(said, "error: the name k is given twice\n");
    let daemon = Running::start(home, &[]);
    let (status, error) =
        daemon.ask("POST", "/v1/snapshots/vm/fork", Some(&json!({ "names": ["k", "one", "k"] })));
    assert_eq!((status, &error["error"]["kind"]), (400, &json!("usage")), "{error}");
    assert_eq!(said, home.fails(code::USAGE, &["fork", "vm", "one", "k", "k"]));
    assert_eq!(daemon.get("/v1/jobs")["jobs"], json!([]));
    assert_eq!(daemon.get("/v1/vms")["vms"], json!([]));
}
