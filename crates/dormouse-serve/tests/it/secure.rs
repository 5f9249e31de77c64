//! TLS over TCP with client certificates, as libnbd and qemu-img speak it.

use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::sync::Arc;

use dormouse_serve::nbd::{Export, Limits, Server, TlsConfig, TlsMode};
use dormouse_testkit::certificates;

use crate::memory::Memory;
use crate::wire::{run, try_run};

fn serve(folder: &Path, mode: TlsMode, memory: &Arc<Memory>) -> (Server, u16) {
    let tls = TlsConfig::from_folder(folder, mode).unwrap();
    let server = Server::builder(Limits::STANDARD)
        .export(Export::new("disk", memory.clone()))
        .listen_tcp("127.0.0.1:0".parse().unwrap(), Some(tls))
        .start()
        .unwrap();
    let port = server.tcp_addresses()[0].port();
    (server, port)
}

#[test]
fn clients_with_a_certificate_come_in_and_others_do_not() {
    let folder = tempfile::tempdir().unwrap();
    certificates::make(folder.path()).unwrap();
    let bytes = Memory::pattern((8 << 20) + 512);
    let memory = Arc::new(Memory::new(bytes.clone()));
    let (server, port) = serve(folder.path(), TlsMode::Required, &memory);
    let here = folder.path().display();
    let uri = format!("nbds://localhost:{port}/disk?tls-certificates={here}");
    assert!(run("nbdinfo", &[&uri]).contains("with TLS"));
    let copy = folder.path().join("copy").display().to_string();
    run("nbdcopy", &[&uri, &copy]);
    assert!(fs::read(&copy).unwrap() == bytes);
    fs::write(&copy, vec![0x77; bytes.len()]).unwrap();
    run("nbdcopy", &["--flush", &copy, &uri]);
    assert!(memory.contents() == vec![0x77; bytes.len()]);

    let credentials = format!("tls-creds-x509,id=t,endpoint=client,dir={here}");
    let place = format!(
        "driver=nbd,server.type=inet,server.host=localhost,server.port={port},export=disk,tls-creds=t"
    );
    assert!(
        run("qemu-img", &["info", "--object", &credentials, "--image-opts", &place])
            .contains("8 MiB")
    );

    let stranger = format!("nbds://localhost:{port}/disk?tls-certificates={here}/stranger");
    assert!(!try_run("nbdinfo", &[&stranger]).status.success());
    assert!(!try_run("nbdinfo", &[&format!("nbd://localhost:{port}/disk")]).status.success());
    assert!(run("nbdinfo", &["--size", &uri]).starts_with("8389120"));
    server.stop().unwrap();
}

#[test]
fn optional_tls_serves_both() {
    let folder = tempfile::tempdir().unwrap();
    certificates::make(folder.path()).unwrap();
    let memory = Arc::new(Memory::new(vec![1; 1 << 20]));
    let (_server, port) = serve(folder.path(), TlsMode::Optional, &memory);
    let here = folder.path().display();
    for uri in [
        format!("nbd://localhost:{port}/disk"),
        format!("nbds://localhost:{port}/disk?tls-certificates={here}"),
    ] {
        assert_eq!(run("nbdinfo", &["--size", &uri]).trim(), "1048576");
    }
}

#[test]
fn what_is_said_before_tls_does_not_count_after_it() {
    let folder = tempfile::tempdir().unwrap();
    certificates::make(folder.path()).unwrap();
    let memory = Arc::new(Memory::new(vec![1; 1 << 20]));
    let (_server, port) = serve(folder.path(), TlsMode::Required, &memory);
    let mut stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
    stream.read_exact(&mut [0; 18]).unwrap();
    let option = |number: u8| [&b"IHAVEOPT\0\0\0"[..], &[number], &[0; 4]].concat();
    stream.write_all(&[&[0, 0, 0, 3][..], &option(3)].concat()).unwrap();
    let mut reply = [0; 20];
    stream.read_exact(&mut reply).unwrap();
    assert_eq!(reply[12..16], [0x80, 0, 0, 5], "TLS first");
    let mut text = vec![0; usize::from(reply[19])];
    stream.read_exact(&mut text).unwrap();
    // An option smuggled in behind STARTTLS ends the connection.
    stream.write_all(&[option(5), option(8)].concat()).unwrap();
    let mut rest = Vec::new();
    let _ = stream.read_to_end(&mut rest);
    assert!(rest.len() <= 20, "{rest:?}");
}

#[test]
fn unusable_certificates_are_told_when_they_are_read() {
    let folder = tempfile::tempdir().unwrap();
    let error = TlsConfig::from_folder(folder.path(), TlsMode::Required).unwrap_err();
    assert!(error.to_string().contains("ca-cert.pem"), "{error}");
    certificates::make(folder.path()).unwrap();
    fs::copy(folder.path().join("client-key.pem"), folder.path().join("server-key.pem")).unwrap();
    assert!(TlsConfig::from_folder(folder.path(), TlsMode::Required).is_err());
}
