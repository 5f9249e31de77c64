//! QEMU's memory, in two shapes.
//!
//! - A *memory-backend file* with a migration stream beside it that left it out
//!   (`x-ignore-shared`): two files, of which the first is the RAM block as it is.
//! - A *mapped-ram* file (QEMU 9.0 and later): one stream in which each RAM block has a header, a
//!   bitmap, and its pages at fixed places.

pub mod stream;
mod backend;
mod mapped_ram;

pub use backend::{export as export_backend, look as look_backend};
pub use mapped_ram::{
    export as export_mapped_ram, look as look_mapped_ram, maps as mapped_ram_maps,
};
