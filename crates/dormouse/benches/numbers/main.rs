//! The numbers that we promise, measured beside what others do, in one run on this machine.
//!
//! `cargo bench -p dormouse --bench numbers -- [GROUP…]` runs all groups or those named: `scan`,
//! `commit`, `pauses`, `change`, `lookup`, `export`, `index`, `many`, of live disks `nbd`, `base`,
//! `chain`, `freeze`, `overlay`, `fuse`, of memory `faults`, `ext4`, of VMs `vm`,
//! and of other people's snapshots `import`. Prints one table and writes
//! `target/bench/numbers.json`. Contenders take turns, and medians of several rounds are compared:
//! ratios hold on a shared machine, times alone do not. Everything is made in `target/bench`, which
//! wants 5 GiB, and partly in `/dev/shm`; inputs are the five pauses of the testkit's guest.
#![expect(clippy::print_stdout, reason = "printing numbers is what it is for")]

mod report;
mod rounds;
mod scratch;
mod scan;
mod commit;
mod pauses;
mod change;
mod lookup;
mod export;
mod index;
mod many;
mod peers;
mod load;
mod client;
mod nbd;
mod base;
mod chain;
mod freeze;
mod overlay;
mod ext4;
mod fuse;
mod faults;
mod import;
mod vm;

use std::process::ExitCode;

use anyhow::{Context, Result, ensure};

use report::Report;
use rounds::Shares;
use scratch::Scratch;

type Group = fn(&Scratch, &mut Report) -> Result<()>;

const GROUPS: [(&str, Group); 18] = [
    ("scan", scan::measure),
    ("commit", commit::measure),
    ("pauses", pauses::measure),
    ("change", change::measure),
    ("lookup", lookup::measure),
    ("export", export::measure),
    ("index", index::measure),
    ("many", many::measure),
    ("nbd", nbd::measure),
    ("base", base::measure),
    ("chain", chain::measure),
    ("freeze", freeze::measure),
    ("overlay", overlay::measure),
    ("ext4", ext4::measure),
    ("fuse", fuse::measure),
    ("faults", faults::measure),
    ("vm", vm::measure),
    ("import", import::measure),
];

fn main() -> ExitCode {
    // A VMM's double is this program once more.
    dormouse_testkit::double::run_if_asked();
    // `cargo bench` passes --bench to every bench.
    let wanted: Vec<String> =
        std::env::args().skip(1).filter(|argument| argument != "--bench").collect();
    match run(&wanted) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            println!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(wanted: &[String]) -> Result<()> {
    for name in wanted {
        let known = GROUPS.map(|(group, _)| group);
        ensure!(known.contains(&name.as_str()), "no group {name}; there are {}", known.join(", "));
    }
    let scratch = Scratch::make()?;
    let mut report = Report::default();
    for (name, measure) in GROUPS {
        if wanted.is_empty() || wanted.iter().any(|group| group == name) {
            println!("measuring {name}");
            report.begin(name);
            let before = Shares::now()?;
            measure(&scratch, &mut report).with_context(|| format!("group {name}"))?;
            let others = 100.0 * Shares::now()?.of_others_since(&before);
            report.note(format_args!("others had {others:.0} % of the machine meanwhile"));
        }
    }
    println!("{report}");
    report.save(&scratch::bench_dir().join("numbers.json"))
}
