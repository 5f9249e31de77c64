//! The small VMM by hand: a configuration and commands as lines of JSON in, answers out.
//!
//! ```text
//! {"seed":1,"regions":[{"pages":65536,"kind":"Small"}],"threads":3,"hang_ms":30000,
//!  "mix":{"read":55,"kernel_read":5,"write":25,"fill":8,"fill_zero":5,"give_back":2},
//!  "backing":{"Uffd":{"socket":"/tmp/s","version":"V1_12","manner":"AtOnce"}}}
//! {"Start":{"Milliseconds":3600000}}
//! "Idle"
//! "Quit"
//! ```
//!
//! (The configuration is one line.)

fn main() -> anyhow::Result<()> {
    dormouse_testkit::vmm::run_by_hand(std::io::stdin(), std::io::stdout())
}
