//! Certificates for tests of TLS: an authority, a server, a client, and a stranger that nobody
//! vouches for. Made by `certtool`, in the layout that QEMU and libnbd expect of a folder.

use std::fs;
use std::io;
use std::path::Path;
use std::process::{Command, Stdio};

/// Fills `folder` with `ca-`, `server-` and `client-cert.pem` and their keys, and `stranger/` with
/// a client's that another authority of the same kind made. The server is `localhost`.
///
/// # Panics
///
/// If `certtool` fails or is not there; `cargo xtask packages` installs it.
pub fn make(folder: &Path) -> io::Result<()> {
    fs::create_dir(folder.join("stranger"))?;
    make_one(folder, "", "ca", "cn = \"ours\"\nca\ncert_signing_key\n")?;
    make_one(
        folder,
        "",
        "server",
        "cn = \"localhost\"\ndns_name = \"localhost\"\nip_address = \"127.0.0.1\"\ntls_www_server\nsigning_key\n",
    )?;
    make_one(folder, "", "client", "cn = \"guest\"\ntls_www_client\nsigning_key\n")?;
    make_one(folder, "stranger/", "ca", "cn = \"theirs\"\nca\ncert_signing_key\n")?;
    make_one(folder, "stranger/", "client", "cn = \"guest\"\ntls_www_client\nsigning_key\n")?;
    // The stranger knows our server, but nobody vouches for the stranger.
    fs::copy(folder.join("ca-cert.pem"), folder.join("stranger/ca-cert.pem")).map(drop)
}

fn make_one(folder: &Path, of: &str, name: &str, template: &str) -> io::Result<()> {
    let path = |name: &str| folder.join(format!("{of}{name}.pem")).display().to_string();
    let [key, cert, text] = ["key", "cert", "template"].map(|end| path(&format!("{name}-{end}")));
    fs::write(&text, template)?;
    // RSA: now and then certtool writes an elliptic key without its leading zeros, which ring
    // does not take.
    certtool(&["--generate-privkey", "--key-type=rsa", "--bits=2048", "--outfile", &key])?;
    let [ca_key, ca_cert] = ["ca-key", "ca-cert"].map(path);
    let mut arguments = vec!["--template", &text, "--load-privkey", &key, "--outfile", &cert];
    if name == "ca" {
        arguments.push("--generate-self-signed");
    } else {
        arguments.extend(["--generate-certificate", "--load-ca-certificate", &ca_cert]);
        arguments.extend(["--load-ca-privkey", &ca_key]);
    }
    certtool(&arguments)
}

fn certtool(arguments: &[&str]) -> io::Result<()> {
    let output = Command::new("certtool").args(arguments).stdin(Stdio::null()).output()?;
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "certtool {arguments:?}: {said}");
    Ok(())
}
