//! Real guests: boot, pause, restore. And the small VMM, with handlers that are right or wrong.
#![expect(clippy::unwrap_used, reason = "a test's helpers fail like the test itself")]

mod guest;
mod vmm;

dormouse_testkit::small_vmm!();
