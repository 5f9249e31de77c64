//! `dormouse cat`: an image to standard output.

use std::io::Write;

use anyhow::Result;

use crate::app::App;
use crate::cli::CatArgs;
use crate::exit::Fault;

pub(super) fn run(app: &mut App, args: &CatArgs) -> Result<()> {
    if app.json {
        return Err(Fault::usage("cat prints the image itself, so --json has no place").into());
    }
    let image = app.open()?.snapshot(&args.image.snap)?.image(&args.image.image)?;
    let work = app.work()?;
    image.write_to(&mut app.out, work.job())?;
    app.out.flush()?;
    Ok(())
}
