//! libnbd's Python shell: sequences that no ordinary client sends.

use super::{DISK_BYTES, Trial};

/// What is done is in `sequences.py`. It leaves changes behind that the raw file gets here.
#[test]
fn nbdsh_asks_oddly() {
    let mut trial = Trial::over_an_image();
    trial.home.file("sequences.py", include_bytes!("sequences.py"));
    let socket = trial.home.path("s.nbd").display().to_string();
    let size = DISK_BYTES.to_string();
    // What nbdsh runs, with the interpreter that Debian's package is for, whatever PATH says.
    trial.run("/usr/bin/python3", &["sequences.py", &socket, &size]);
    trial.agree();
}
