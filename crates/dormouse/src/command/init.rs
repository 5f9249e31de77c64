//! `dormouse init`: makes an empty store.

use anyhow::Result;
use dormouse_store::store::{Config, Store};
use serde::Serialize;

use crate::app::App;

#[derive(Serialize)]
struct InitObject<'a> {
    store: &'a str,
}

pub(super) fn run(app: &mut App) -> Result<()> {
    Store::init(&app.store_dir, Config::STANDARD)?;
    if app.json {
        let store = app.store_dir.to_string_lossy().into_owned();
        app.out.json(&InitObject { store: &store })?;
    }
    app.say(&format!("made a store in {}", app.store_dir.display()));
    Ok(())
}
