//! What holds of whatever a parser of foreign files accepts: as the tests check it.

#[path = "../../crates/dormouse-formats/tests/it/accepted.rs"]
mod accepted;

pub use accepted::{Server, check_disk_runs, check_map};
