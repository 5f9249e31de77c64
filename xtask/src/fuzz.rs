//! `cargo xtask fuzz`: every fuzz target for a while, on the stable compiler.

use std::fs;

use anyhow::{Context, Result, bail};

use crate::command::{cargo, cargo_tool, target_dir, workspace};

/// What to fuzz and for how long.
#[derive(Debug)]
pub(crate) struct Options {
    seconds: u32,
    target: Option<String>,
}

impl Options {
    /// Reads `--seconds N` and `--target NAME`.
    pub(crate) fn parse(arguments: &[&str]) -> Result<Options> {
        let mut options = Options { seconds: 60, target: None };
        for pair in arguments.chunks(2) {
            match *pair {
                ["--seconds", seconds] => {
                    options.seconds =
                        seconds.parse().with_context(|| format!("--seconds {seconds}"))?;
                }
                ["--target", name] => options.target = Some(name.to_owned()),
                _ => bail!("fuzz takes --seconds N and --target NAME, not {}", pair.join(" ")),
            }
        }
        Ok(options)
    }
}

/// Runs the targets one after the other and stops at the first crash.
pub(crate) fn run(options: &Options) -> Result<()> {
    let all = targets()?;
    let chosen: Vec<&String> = match &options.target {
        None => all.iter().collect(),
        Some(name) => {
            let found = all.iter().find(|target| *target == name);
            vec![found.with_context(|| format!("no target {name}; there are {}", all.join(", ")))?]
        }
    };
    cargo_tool("cargo-fuzz")?;
    // cargo looks for its subcommands in PATH.
    let mut path = std::env::var_os("PATH").unwrap_or_default();
    path.push(":");
    path.push(target_dir().join("tools/bin"));
    for (number, target) in chosen.iter().enumerate() {
        println!("fuzz: {target} ({} of {})", number + 1, chosen.len());
        let limit = format!("-max_total_time={}", options.seconds);
        // What is found goes to the first folder; the seeds in the second are under version control.
        let [corpus, seeds] = ["corpus", "seeds"].map(|kind| format!("fuzz/{kind}/{target}"));
        fs::create_dir_all(workspace().join(&corpus)).with_context(|| format!("no {corpus}"))?;
        if !workspace().join(&seeds).is_dir() {
            bail!("{target} has no seeds in {seeds}");
        }
        // Without a sanitizer (`-s none`): no crate but dormouse-sys has unsafe code.
        // RUSTC_BOOTSTRAP lets the stable compiler instrument for coverage.
        crate::command::run(
            cargo(&["fuzz", "run", "-s", "none", target, &corpus, &seeds])
                .args(["--", &limit, "-print_final_stats=1"])
                .env("PATH", &path)
                .env("RUSTC_BOOTSTRAP", "1"),
        )
        .with_context(|| format!("{target} found something; its input is in fuzz/artifacts"))?;
    }
    println!("fuzz: {} targets, {} s each, no crash", chosen.len(), options.seconds);
    Ok(())
}

/// The files in `fuzz/fuzz_targets`, in order.
fn targets() -> Result<Vec<String>> {
    let folder = workspace().join("fuzz/fuzz_targets");
    let entries = fs::read_dir(&folder).with_context(|| format!("no {}", folder.display()))?;
    let mut names = Vec::new();
    for entry in entries {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "rs")
            && let Some(name) = path.file_stem().and_then(|name| name.to_str())
        {
            names.push(name.to_owned());
        }
    }
    names.sort();
    if names.is_empty() {
        bail!("no fuzz targets in {}", folder.display());
    }
    Ok(names)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_are_pairs_in_any_order() {
        let options = Options::parse(&["--target", "map", "--seconds", "5"]).unwrap();
        assert_eq!((options.seconds, options.target.as_deref()), (5, Some("map")));
        for wrong in [&["--seconds"][..], &["--seconds", "x"], &["map"]] {
            assert!(Options::parse(wrong).is_err(), "{wrong:?}");
        }
    }
}
