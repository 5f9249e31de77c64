//! A double of Firecracker by hand; see `dormouse_testkit::double`.

fn main() -> anyhow::Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    dormouse_testkit::double::run_firecracker(&args, None)
}
