//! Where a server's exports are, and how QEMU, nbdcopy and the kernel get at them.

use std::io::Write;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use anyhow::Result;
use dormouse_serve::nbd::Server;
use serde_json::json;

use super::{Exported, Exports};
use crate::app::App;
use crate::cli::ServeNbdArgs;

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
        match self {
            Place::Unix(socket) => format!("nbd+unix:///{name}?socket={}", socket.display()),
            Place::Tcp { address, tls: false } => format!("nbd://{address}/{name}"),
            Place::Tcp { address, tls: true } => format!("nbds://{address}/{name}"),
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
                let (host, port) = (address.ip(), address.port());
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
                    Place::Unix(socket) => format!("-unix '{}'", socket.display()),
                    Place::Tcp { address, .. } => format!("{} {}", address.ip(), address.port()),
                };
                vec![
                    // A comma would begin the next option.
                    format!(
                        "QEMU:    -drive 'file={},format=raw,if=virtio{access}'",
                        uri.replace(',', ",,")
                    ),
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
        if args.detached {
            writeln!(app.out, "pid {pid}")?;
        }
    }
    app.out.flush()?;
    places.advice.iter().for_each(|line| app.say(line));
    Ok(())
}
