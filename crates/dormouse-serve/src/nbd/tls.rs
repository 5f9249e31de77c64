//! TLS for TCP: STARTTLS with certificates in the files that QEMU, libnbd and nbdkit look for.
//!
//! ```text
//! FOLDER/ca-cert.pem       who signs the certificates of clients
//! FOLDER/ca-crl.pem        which of them are revoked; may be missing
//! FOLDER/server-cert.pem   ours, with what lies between it and the root
//! FOLDER/server-key.pem    its key
//! ```
//!
//! A session is one state for both directions. It is locked to encrypt or decrypt, never while the
//! socket is waited for, so reading and writing do not wait for each other.

use std::fmt;
use std::io::{self, Read, Write};
use std::path::Path;
use std::sync::{Arc, Mutex};

use rustls::crypto::ring;
use rustls::pki_types::pem::{self, PemObject};
use rustls::pki_types::{CertificateDer, CertificateRevocationListDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::{RootCertStore, ServerConfig, ServerConnection};

use super::pulse::lock;
use crate::error::{Error, ErrorKind, Result};

/// The cipher text that is read at once: four records.
const CIPHER_BYTES: usize = 64 << 10;

/// The plain text that is encrypted at once; bounds what a session buffers.
const PLAIN_BYTES_MAX: usize = 64 << 10;

/// Whether a client may go on without TLS.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TlsMode {
    /// It may.
    Optional,

    /// Before STARTTLS it may only give up.
    Required,
}

/// Certificates, keys and rules of a listener.
#[derive(Clone)]
pub struct TlsConfig {
    mode: TlsMode,
    config: Arc<ServerConfig>,
}

impl TlsConfig {
    /// Reads the files of `folder`. Clients must show a certificate that its CA signed.
    ///
    /// # Errors
    ///
    /// Where a file is missing, is no PEM, or does not fit the others.
    pub fn from_folder(folder: &Path, mode: TlsMode) -> Result<TlsConfig> {
        let unusable = |what: &str, error: rustls::Error| {
            let context = format!("the {what} in {} cannot be used", folder.display());
            Error::with_source(ErrorKind::Tls, context, error)
        };
        let provider = Arc::new(ring::default_provider());
        let mut roots = RootCertStore::empty();
        for certificate in certificates(&folder.join("ca-cert.pem"))? {
            roots.add(certificate).map_err(|error| unusable("ca-cert.pem", error))?;
        }
        let mut verifier =
            WebPkiClientVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&provider));
        let revoked = folder.join("ca-crl.pem");
        if revoked.exists() {
            let lists: Vec<_> = read_all::<CertificateRevocationListDer<'static>>(&revoked)?;
            verifier = verifier.with_crls(lists);
        }
        let verifier = verifier.build().map_err(|error| {
            let context = format!("ca-cert.pem in {} verifies nobody", folder.display());
            Error::with_source(ErrorKind::Tls, context, error)
        })?;
        let chain = certificates(&folder.join("server-cert.pem"))?;
        let key_path = folder.join("server-key.pem");
        let key =
            PrivateKeyDer::from_pem_file(&key_path).map_err(|error| pem_error(&key_path, error))?;
        let config = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(|error| unusable("protocol versions", error))?
            .with_client_cert_verifier(verifier)
            .with_single_cert(chain, key)
            .map_err(|error| unusable("server-cert.pem and server-key.pem", error))?;
        Ok(TlsConfig { mode, config: Arc::new(config) })
    }

    /// The same rules for a server of another protocol.
    pub fn server_config(&self) -> Arc<ServerConfig> {
        Arc::clone(&self.config)
    }

    pub(crate) fn mode(&self) -> TlsMode {
        self.mode
    }

    /// The server's part of the TLS handshake; the halves that come out are encrypted.
    pub(crate) fn accept(
        &self,
        mut reader: Box<dyn Read + Send>,
        mut writer: Box<dyn Write + Send>,
    ) -> Result<(Box<dyn Read + Send>, Box<dyn Write + Send>)> {
        let failed = |error| Error::io("the TLS handshake failed", error);
        let mut session = ServerConnection::new(Arc::clone(&self.config))
            .map_err(|error| Error::with_source(ErrorKind::Tls, "cannot begin TLS", error))?;
        session.set_buffer_limit(None);
        let mut both = Both { reader: &mut *reader, writer: &mut *writer };
        while session.is_handshaking() {
            session.complete_io(&mut both).map_err(failed)?;
        }
        // Tickets of TLS 1.3 go out now, where nobody else writes.
        while session.wants_write() {
            session.write_tls(&mut both).map_err(failed)?;
        }
        let session = Arc::new(Mutex::new(session));
        let reader = TlsReader {
            reader,
            session: Arc::clone(&session),
            cipher: vec![0; CIPHER_BYTES].into_boxed_slice(),
            start: 0,
            end: 0,
            ended: false,
        };
        let writer = TlsWriter { writer, session, cipher: Vec::with_capacity(2 * PLAIN_BYTES_MAX) };
        Ok((Box::new(reader), Box::new(writer)))
    }
}

impl fmt::Debug for TlsConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TlsConfig").field("mode", &self.mode).finish_non_exhaustive()
    }
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>> {
    read_all(path)
}

fn read_all<T: PemObject>(path: &Path) -> Result<Vec<T>> {
    let read = T::pem_file_iter(path).and_then(Iterator::collect::<std::result::Result<Vec<T>, _>>);
    let found = read.map_err(|error| pem_error(path, error))?;
    if found.is_empty() {
        return Err(pem_error(path, pem::Error::NoItemsFound));
    }
    Ok(found)
}

fn pem_error(path: &Path, error: pem::Error) -> Error {
    let context = format!("cannot read {}", path.display());
    match error {
        pem::Error::Io(error) => Error::io(context, error),
        error => Error::with_source(ErrorKind::Tls, context, error),
    }
}

struct Both<'a> {
    reader: &'a mut (dyn Read + Send),
    writer: &'a mut (dyn Write + Send),
}

impl Read for Both<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.reader.read(buffer)
    }
}

impl Write for Both<'_> {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        self.writer.write(data)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.writer.flush()
    }
}

struct TlsReader {
    reader: Box<dyn Read + Send>,
    session: Arc<Mutex<ServerConnection>>,
    cipher: Box<[u8]>,
    start: usize,
    end: usize,
    ended: bool,
}

impl Read for TlsReader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            {
                let mut session = lock(&self.session);
                match session.reader().read(buffer) {
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                    // An end without farewell: it is the requests that tell whether it was in order.
                    Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(0),
                    other => return other,
                }
                if self.start < self.end || self.ended {
                    let mut rest = &self.cipher[self.start..self.end];
                    self.start += session.read_tls(&mut rest)?;
                    session.process_new_packets().map_err(io::Error::other)?;
                    continue;
                }
            }
            self.start = 0;
            self.end = self.reader.read(&mut self.cipher)?;
            self.ended = self.end == 0;
        }
    }
}

struct TlsWriter {
    writer: Box<dyn Write + Send>,
    session: Arc<Mutex<ServerConnection>>,
    cipher: Vec<u8>,
}

impl TlsWriter {
    /// Takes from the session all that is to be sent and sends it.
    fn send(&mut self, plain: &[u8]) -> io::Result<usize> {
        self.cipher.clear();
        let mut session = lock(&self.session);
        let taken = session.writer().write(plain)?;
        while session.wants_write() {
            session.write_tls(&mut self.cipher)?;
        }
        drop(session);
        self.writer.write_all(&self.cipher)?;
        Ok(taken)
    }
}

impl Write for TlsWriter {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        self.send(&data[..data.len().min(PLAIN_BYTES_MAX)])
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Drop for TlsWriter {
    fn drop(&mut self) {
        lock(&self.session).send_close_notify();
        // The peer may be gone; then nobody misses the farewell.
        let _ = self.send(&[]);
    }
}
