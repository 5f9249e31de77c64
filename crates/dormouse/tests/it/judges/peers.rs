//! nbdkit in front of our server: another client, whose own clients see our disk through it.

use std::fs;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use super::{MIB, Trial, same};

/// nbdkit with its nbd plugin, which ends with the test.
struct Peer(Child);

impl Peer {
    fn start(trial: &Trial, options: &[&str]) -> Peer {
        let home = trial.home.path(".");
        let child = Command::new("nbdkit")
            .current_dir(&home)
            .args(["--foreground", "--unix", "peer.nbd"])
            .args(options)
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        let peer = Peer(child);
        let until = Instant::now() + Duration::from_secs(30);
        while !Path::exists(&home.join("peer.nbd")) {
            assert!(Instant::now() < until, "nbdkit does not listen");
            std::thread::sleep(Duration::from_millis(10));
        }
        peer
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn nbdkit_passes_everything_through() {
    let mut trial = Trial::over_an_image();
    let ours = trial.uri();
    let peer = Peer::start(&trial, &["nbd", &format!("uri={ours}")]);
    let theirs = format!("nbd+unix:///?socket={}", trial.home.path("peer.nbd").display());
    let about = trial.run("nbdinfo", &["--json", &theirs]);
    let about: serde_json::Value = serde_json::from_str(&about).unwrap();
    for can in ["cache", "fast_zero", "flush", "fua", "multi_conn", "trim", "zero"] {
        assert_eq!(about["exports"][0][format!("can_{can}")], true, "{can}");
    }
    let map = |uri: &str| trial.run("nbdinfo", &["--map", uri]);
    assert_eq!(map(&theirs), map(&ours), "extents through nbdkit are not ours");

    trial.run("nbdcopy", &["--connections=4", &theirs, "out"]);
    same(&fs::read(trial.home.path("out")).unwrap(), &trial.model(), "a copy through nbdkit");

    let script = [
        "write -P 3 777 100000",
        "write -f -P 4 5M 12345",
        "write -z -u 17M 1M",
        "write -z 18M 64k",
        "discard 2M 128k",
        "aio_write -P 9 9M 2M",
        "aio_flush",
        "flush",
    ];
    for target in [theirs.as_str(), "model"] {
        let mut arguments = vec!["-f", "raw", "-t", "writeback", "-d", "unmap"];
        script.iter().for_each(|command| arguments.extend(["-c", command]));
        let said = trial.run("qemu-io", &[&arguments[..], &[target]].concat());
        assert!(!said.contains("failed"), "{said}");
    }
    assert_eq!(map(&theirs), map(&ours));
    trial.agree();
    // It goes on over the disk that was committed under it.
    trial.run("nbdcopy", &["--flush", "model", &theirs]);
    trial.agree();
    drop(peer);
}

/// Filters that cut, delay and cache requests in other ways than clients do.
#[test]
fn nbdkit_with_filters_reads_and_writes_the_same() {
    let mut trial = Trial::over_an_image();
    let uri = format!("uri={}", trial.uri());
    let cut = ["--filter=blocksize", "nbd", &uri, "minblock=512", "maxdata=17408", "maxlen=128k"];
    let peer = Peer::start(&trial, &cut);
    let theirs = format!("nbd+unix:///?socket={}", trial.home.path("peer.nbd").display());
    let content = crate::fixture::noise(9, 2 * MIB / 4096);
    let mut model = trial.model();
    model[3 * MIB..5 * MIB].copy_from_slice(&content);
    model[12 * MIB + 512..13 * MIB].fill(0x77);
    trial.home.file("model", &model);
    trial.commit_during(|trial| {
        trial.run("nbdcopy", &["--connections=2", "--flush", "model", &theirs]);
    });
    trial.run("nbdcopy", &[&theirs, "out"]);
    same(&fs::read(trial.home.path("out")).unwrap(), &model, "a copy through nbdkit");
    trial.agree();
    drop(peer);
}
