//! Real guests: boot, pause, restore.
#![expect(clippy::unwrap_used, reason = "a test's helpers fail like the test itself")]

mod guest;
