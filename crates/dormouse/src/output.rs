//! How results are shown: tables and pictures for people, objects for scripts.

pub(crate) mod colour;
pub(crate) mod json;
pub(crate) mod map;
pub(crate) mod size;
pub(crate) mod stream;
pub(crate) mod table;
pub(crate) mod time;
pub(crate) mod trace;
