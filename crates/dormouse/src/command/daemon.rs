//! `dormouse daemon`: answers on the API until it is told to end.

use std::io::Write;

use anyhow::Result;

use crate::app::App;
use crate::cli::daemon::DaemonArgs;
use crate::daemon;

pub(super) fn run(app: &mut App, args: &DaemonArgs) -> Result<()> {
    if args.print_openapi {
        let document = daemon::api::document()?;
        app.out.write_all(document.as_bytes())?;
        return Ok(());
    }
    daemon::run::run(app, args)
}
