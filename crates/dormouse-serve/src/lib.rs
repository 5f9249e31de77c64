//! Serve images and overlays to virtual machines and to every tool that speaks their protocols.
//!
//! One folder per protocol. Today [`nbd`]: a server of the Network Block Device protocol over unix
//! sockets and TCP with TLS. This crate knows neither store nor overlay: what it serves stands
//! behind a small trait of its own, [`BlockDevice`](device::BlockDevice).
//!
//! ```
//! use std::sync::Arc;
//!
//! use dormouse_serve::nbd::{BlockDevice, DeviceResult, Durability, Export, Limits, Server};
//! use dormouse_serve::nbd::ZeroMode;
//!
//! /// One mebibyte of sevens.
//! struct Sevens;
//!
//! impl BlockDevice for Sevens {
//!     fn size_bytes(&self) -> u64 {
//!         1 << 20
//!     }
//!     fn is_read_only(&self) -> bool {
//!         true
//!     }
//!     fn read_at(&self, buffer: &mut [u8], _offset: u64) -> DeviceResult<()> {
//!         buffer.fill(7);
//!         Ok(())
//!     }
//! }
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let folder = tempfile::tempdir()?;
//! # let socket = folder.path().join("socket");
//! let server = Server::builder(Limits::STANDARD)
//!     .export(Export::new("sevens", Arc::new(Sevens)).description("one mebibyte of sevens"))
//!     .listen_unix(&socket)
//!     .start()?;
//! // … until somebody asks to stop: requests under way are answered first.
//! server.stop()?;
//! assert!(!socket.exists());
//! # Ok(())
//! # }
//! ```
#![forbid(unsafe_code)]

pub mod device;
pub mod nbd;
pub mod uffd;
pub mod mapped;
pub mod holder;
pub mod unix_socket;
pub mod fuse;
pub mod error;
