//! Where a server's exports are, and how QEMU, nbdcopy and the kernel get at them.

use std::io::Write;
use std::net::{IpAddr, SocketAddr};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use anyhow::Result;
use dormouse_serve::nbd::Server;
use serde_json::json;

use super::{Exported, Exports};
use crate::app::App;
use crate::cli::live::ServeNbdArgs;

/// Where exports are to be found.
#[derive(Debug)]
pub(super) struct Places {
    pub(super) uris: Vec<String>,
    device: Option<PathBuf>,
    advice: Vec<String>,
}

/// A place that a server listens at.
#[derive(Debug)]
pub(super) enum Place {
    Unix(PathBuf),
    Tcp { address: SocketAddr, tls: bool },
}

impl Place {
    pub(super) fn uri(&self, name: &str) -> String {
        let name = encoded(name.as_bytes());
        match self {
            Place::Unix(socket) => {
                format!("nbd+unix:///{name}?socket={}", encoded(socket.as_os_str().as_bytes()))
            }
            Place::Tcp { address, tls } => {
                let scheme = if *tls { "nbds" } else { "nbd" };
                match host(address.ip()) {
                    host if host.contains(':') => {
                        format!("{scheme}://[{host}]:{}/{name}", address.port())
                    }
                    host => format!("{scheme}://{host}:{}/{name}", address.port()),
                }
            }
        }
    }

    /// Commands to be typed, for one export.
    fn advice(&self, exported: &Exported) -> Vec<String> {
        let name = &exported.name;
        let uri = self.uri(name);
        let read_only = exported.is_read_only();
        let access = if read_only { ",readonly=on" } else { ",discard=unmap" };
        let kernel_access = if read_only { " -readonly" } else { "" };
        match self {
            Place::Tcp { address, tls: true } => {
                let (host, port) = (host(address.ip()), address.port());
                vec![
                    format!(
                        "QEMU:    -object tls-creds-x509,id=tls,endpoint=client,dir=CERTS -drive \
                         driver=nbd,server.type=inet,server.host={host},server.port={port},\
                         export={name},tls-creds=tls,if=virtio{access}"
                    ),
                    format!("copy:    nbdcopy '{uri}?tls-certificates=CERTS' FILE"),
                    format!(
                        "kernel:  nbd-client {host} {port} /dev/nbd0 -N {name} -b 4096\
                         {kernel_access} -enable-tls -cacertfile CERTS/ca-cert.pem \
                         -certfile CERTS/client-cert.pem -keyfile CERTS/client-key.pem"
                    ),
                ]
            }
            Place::Unix(_) | Place::Tcp { tls: false, .. } => {
                let client = match self {
                    Place::Unix(socket) => format!("-unix {}", quoted(socket)),
                    Place::Tcp { address, .. } => {
                        format!("{} {}", host(address.ip()), address.port())
                    }
                };
                vec![
                    // No comma, which would begin the next option, is left bare in a URI.
                    format!("QEMU:    -drive 'file={uri},format=raw,if=virtio{access}'"),
                    format!("copy:    nbdcopy '{uri}' FILE"),
                    format!(
                        "kernel:  nbd-client {client} /dev/nbd0 -N {name} -b 4096{kernel_access}; \
                         or serve with --attach /dev/nbd0"
                    ),
                ]
            }
        }
    }
}

/// A part of a path or query of a URI: all but RFC 3986's unreserved bytes, `/`, `:` and `@` as
/// `%XX`. Some clients take a bare `+` for a space.
fn encoded(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(bytes.len());
    for &byte in bytes {
        if byte.is_ascii_alphanumeric() || b"-._~/:@".contains(&byte) {
            text.push(char::from(byte));
        } else {
            text.push_str(&format!("%{byte:02X}"));
        }
    }
    text
}

/// A path as one word of a shell's command line.
fn quoted(path: &Path) -> String {
    format!("'{}'", path.display().to_string().replace('\'', r"'\''"))
}

/// What clients call an address. Where it stands for all of this machine's, no client can connect
/// to it, nor can a certificate be for it: then this machine's name.
fn host(address: IpAddr) -> String {
    let name = || std::fs::read_to_string("/proc/sys/kernel/hostname").ok();
    let name = if address.is_unspecified() { name() } else { None };
    match name.as_deref().map(str::trim) {
        Some(name) if !name.is_empty() => name.to_owned(),
        _ => address.to_string(),
    }
}

/// Where the exports of a server that listens are.
pub(super) fn places(
    args: &ServeNbdArgs,
    server: &Server,
    exports: &Exports,
    device: Option<&Path>,
) -> Places {
    let unix = args
        .socket
        .iter()
        .map(|socket| Place::Unix(std::path::absolute(socket).unwrap_or_else(|_| socket.clone())));
    let tls = args.tls.is_some() && !args.tls_optional;
    let tcp = server.tcp_addresses().iter().map(|&address| Place::Tcp { address, tls });
    let places: Vec<Place> = unix.chain(tcp).collect();
    let names = || exports.list.iter().map(|exported| exported.name.as_str());
    let uris = names().flat_map(|name| places.iter().map(|place| place.uri(name))).collect();
    let first = places.first().zip(exports.list.first());
    let device = device.map(Path::to_owned);
    Places {
        uris,
        device,
        advice: first.map_or_else(Vec::new, |(place, first)| place.advice(first)),
    }
}

/// Prints where the exports are and how to use them; of a background process, which one it is.
pub(super) fn tell(app: &mut App, args: &ServeNbdArgs, places: &Places) -> Result<()> {
    let pid = std::process::id();
    if app.json {
        app.out.json(&json!({ "uris": places.uris, "device": places.device, "pid": pid }))?;
    } else {
        places.uris.iter().try_for_each(|uri| writeln!(app.out, "{uri}"))?;
        if let Some(device) = &places.device {
            writeln!(app.out, "{}", device.display())?;
        }
        if args.process.detached {
            writeln!(app.out, "pid {pid}")?;
        }
    }
    app.out.flush()?;
    places.advice.iter().for_each(|line| app.say(line));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tcp(address: &str, tls: bool) -> Place {
        Place::Tcp { address: address.parse().unwrap(), tls }
    }

    #[test]
    fn uris_are_encoded() {
        let unix = |socket: &str| Place::Unix(PathBuf::from(socket));
        assert_eq!(
            unix("/run/box.nbd").uri("vm@1:root"),
            "nbd+unix:///vm@1:root?socket=/run/box.nbd"
        );
        assert_eq!(
            unix("/r u#n/%a&b+c,d'e?").uri("a/b"),
            "nbd+unix:///a/b?socket=/r%20u%23n/%25a%26b%2Bc%2Cd%27e%3F"
        );
        assert_eq!(unix("/ö").uri("a"), "nbd+unix:///a?socket=/%C3%B6");
        assert_eq!(tcp("127.0.0.1:10809", false).uri("a"), "nbd://127.0.0.1:10809/a");
        assert_eq!(tcp("[::1]:10809", true).uri("a"), "nbds://[::1]:10809/a");
        assert_eq!(quoted(Path::new("/it's")), r"'/it'\''s'");
    }

    /// A certificate is for a name, and nobody's is 0.0.0.0.
    #[test]
    fn an_address_of_all_interfaces_is_the_hosts_name() {
        let name = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap();
        let name = name.trim();
        for all in ["0.0.0.0:7", "[::]:7"] {
            assert_eq!(tcp(all, true).uri("a"), format!("nbds://{name}:7/a"));
        }
    }
}
