//! How a server of disks ends: with a disk that is damaged, told twice, with a client that does not
//! read.

use std::fs::OpenOptions;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::process::{Command, Stdio};

use crate::fixture::{Home, noise};
use crate::nbd_fixture::{Served, messages_of, nbdsh, tool, uri, wait_until};

/// The flush at the end stopped at the first disk that failed, and what was written to those after
/// it since their last flush was lost.
#[test]
fn a_disk_that_cannot_be_flushed_costs_no_other_one_its_writes() {
    let home = Home::with_store();
    for live in ["a", "b", "c"] {
        home.ok(&["disk", "create", live, "--size", "1MiB"]);
    }
    let mut served = Served::start(&home, &["a", "b", "c"]);
    for live in ["a", "b", "c"] {
        nbdsh(&home, live, "", "h.pwrite(b'x' * 4096, 8192)");
    }
    for live in ["a", "b"] {
        let data = home.store().join(format!("live/{live}/disk/root/1.data"));
        OpenOptions::new().write(true).open(data).unwrap().set_len(4096).unwrap();
    }
    served.signal("TERM");
    assert_eq!(served.child.wait().unwrap().code(), Some(7), "{}", messages_of(&home));
    let messages = messages_of(&home);
    for live in ["a", "b"] {
        assert!(messages.contains(&format!("cannot flush disk {live}/root")), "{messages}");
    }
    let _served = Served::start(&home, &["c"]);
    let read = nbdsh(&home, "c", "", "print(h.pread(4096, 8192) == b'x' * 4096)");
    assert_eq!(read, "True\n");
}

/// A client with more replies on their way than it reads, so that a server that ends waits for it.
/// A single reply is more than any buffer of a socket takes. `export` has 32 MiB.
fn deaf_client(home: &Home, export: &str) -> UnixStream {
    let mut client = UnixStream::connect(home.path("s.nbd")).unwrap();
    client.read_exact(&mut [0; 18]).unwrap();
    // Fixed newstyle, no zeroes; EXPORT_NAME.
    client.write_all(&[0, 0, 0, 3]).unwrap();
    client.write_all(b"IHAVEOPT\0\0\0\x01").unwrap();
    client.write_all(&u32::try_from(export.len()).unwrap().to_be_bytes()).unwrap();
    client.write_all(export.as_bytes()).unwrap();
    client.read_exact(&mut [0; 10]).unwrap();
    for cookie in 0..4_u64 {
        let mut request = vec![0x25, 0x60, 0x95, 0x13, 0, 0, 0, 0];
        request.extend(cookie.to_be_bytes());
        request.extend(0_u64.to_be_bytes());
        request.extend((32_u32 << 20).to_be_bytes());
        client.write_all(&request).unwrap();
    }
    client.read_exact(&mut [0; 16]).unwrap();
    client
}

fn served_to_a_deaf_client() -> (Home, Served, UnixStream) {
    let home = Home::with_store();
    home.file("d", &noise(1, 256));
    home.ok(&["commit", "vm", "--disk", "d"]);
    home.ok(&["disk", "create", "box", "--from", "vm:root", "--size", "32MiB"]);
    let served = Served::start(&home, &["box"]);
    let client = deaf_client(&home, "box");
    served.signal("TERM");
    wait_until("the end's beginning", || !home.path("s.nbd").exists());
    (home, served, client)
}

/// Later signals were taken and dropped while the server waited for its clients.
#[test]
fn a_second_signal_ends_a_server_at_once() {
    for second in ["TERM", "INT"] {
        let (home, mut served, _client) = served_to_a_deaf_client();
        served.signal(second);
        assert_eq!(served.child.wait().unwrap().code(), Some(130), "{}", messages_of(&home));
    }
}

/// `serve stop` is no second signal: it waits for what the first one began.
#[test]
fn a_stop_after_a_signal_cuts_nothing_short() {
    let (home, mut served, client) = served_to_a_deaf_client();
    let stop = || {
        Command::new(env!("CARGO_BIN_EXE_dormouse"))
            .current_dir(home.path("."))
            .env_remove("DORMOUSE_STORE")
            .args(["serve", "stop", "box"])
            .stderr(Stdio::null())
            .spawn()
            .unwrap()
    };
    let stops = [stop(), stop()];
    drop(client);
    for mut stop in stops {
        assert!(stop.wait().unwrap().success());
    }
    assert!(served.child.wait().unwrap().success(), "{}", messages_of(&home));
}

/// The first of several exports was also the nameless one, to be written by whoever forgot a name.
#[test]
fn several_exports_have_no_default() {
    let home = Home::with_store();
    home.ok(&["disk", "create", "a", "--size", "1MiB"]);
    home.ok(&["disk", "create", "b", "--size", "2MiB"]);
    let served = Served::start(&home, &["b"]);
    assert_eq!(tool(&home, "nbdinfo", &["--size", &uri("")]), "2097152\n");
    drop(served);
    let _served = Served::start(&home, &["a", "b"]);
    assert_eq!(tool(&home, "nbdinfo", &["--size", &uri("b")]), "2097152\n");
    let nameless = Command::new("nbdinfo")
        .current_dir(home.path("."))
        .args(["--size", &uri("")])
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&nameless.stderr);
    assert!(!nameless.status.success() && said.contains("no export named ''"), "{said}");
}

/// URIs were printed with sockets' paths as they are, and clients went elsewhere.
#[test]
fn printed_uris_lead_to_sockets_with_odd_names() {
    let home = Home::with_store();
    home.ok(&["disk", "create", "box", "--size", "1MiB"]);
    let socket = "it's a #1, 100%&+?.nbd";
    let serve = ["serve", "nbd", "box", "--socket", socket, "--background"];
    let started = home.json(&serve);
    let uri = started["uris"][0].as_str().unwrap();
    assert_eq!(tool(&home, "nbdinfo", &["--size", uri]), "1048576\n");
    let qemu = tool(&home, "qemu-img", &["info", "-f", "raw", "--output=json", uri]);
    assert!(qemu.contains("\"virtual-size\": 1048576"), "{qemu}");
    assert_eq!(home.json(&["serve", "stop", "box"])["stopped"], true);
}

#[test]
fn what_is_missing_in_a_command_line_is_said() {
    let home = Home::with_store();
    home.file("d", &noise(1, 4));
    home.ok(&["commit", "vm", "--disk", "d"]);
    let told = home.fails(2, &["serve", "nbd", "vm@1", "--socket", "s.nbd"]);
    assert!(told.contains("vm@1:IMAGE"), "{told}");
    let told = home.fails(2, &["serve", "nbd", "vm:a/b", "--socket", "s.nbd"]);
    assert!(told.contains("\"a/b\" is not an image"), "{told}");
    // All arguments were in the group of which one is needed, so that none was.
    home.ok(&["disk", "create", "box", "--size", "1MiB"]);
    let told = home.fails(2, &["serve", "nbd", "box"]);
    assert!(told.contains("--socket <PATH>|--tcp <ADDRESS:PORT>|--attach"), "{told}");
    let told = home.fails(2, &["serve", "nbd", "box", "--tcp", "127.0.0.1:0"]);
    assert!(told.contains("--tls <DIR>") && !told.contains("--detached"), "{told}");
}
