//! Times as people read them.

use jiff::Timestamp;

/// `2025-11-20 06:11:49`, in UTC: hosts of one store need not share a time zone.
pub(crate) fn utc(time: Timestamp) -> String {
    time.strftime("%Y-%m-%d %H:%M:%S").to_string()
}
