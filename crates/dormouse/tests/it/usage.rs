//! Command lines that make no sense, help, completions and man pages. No store is needed.

use crate::fixture::{Home, code, errors};

#[test]
fn help_is_printed_for_every_verb() {
    let home = Home::new();
    let help = home.ok(&["--help"]);
    for verb in [
        "init",
        "commit",
        "ls",
        "show",
        "log",
        "diff",
        "du",
        "map",
        "export",
        "import",
        "detect",
        "have",
        "cat",
        "verify",
        "rm",
        "prune",
        "gc",
        "compact",
        "punch",
        "trace",
        "completions",
        "man",
    ] {
        assert!(help.contains(verb), "{verb}");
        assert!(home.ok(&[verb, "--help"]).contains("Usage"), "{verb}");
    }
    assert!(home.ok(&["--version"]).starts_with("dormouse "));
}

#[test]
fn wrong_usage_is_code_2() {
    let home = Home::new();
    for (arguments, told) in [
        (&["frobnicate"][..], "frobnicate"),
        (&["commit"], "<NAME>"),
        (&["commit", "../x", "--memory", "m"], "not a name"),
        (&["commit", "live"], "reserved"),
        (&["commit", "vm", "--memory", "m", "--memory-diff", "d"], "cannot be used with"),
        (&["commit", "vm", "--disk", "../x=f"], "not a name"),
        (&["commit", "vm", "--label", "novalue"], "KEY=VALUE"),
        (&["commit", "vm", "--codec", "gzip"], "zstd:LEVEL"),
        (&["commit", "vm", "--parent", "vm@0"], "NAME@N"),
        (&["commit", "vm", "--drop", "what/ever"], "state/NAME"),
        (&["commit", "vm", "--label", "a=1", "--label", "a=2"], "given twice"),
        (&["commit", "vm", "--memory", "-", "--disk", "-"], "standard input"),
        (&["commit", "vm", "--vcpus", "many"], "vcpus"),
        (&["show", "vm@"], "NAME@N"),
        (&["map", "vm"], "SNAP:IMAGE"),
        (&["cat", "vm:x/y"], "state/NAME"),
        (&["export", "vm", "out", "--force"], "vm:IMAGE"),
        (&["export", "vm:memory", "-"], "dormouse cat"),
        (&["prune", "vm"], "--keep"),
        (&["prune", "vm", "--keep", "last=0"], "from 1"),
        (&["prune", "vm", "--keep", "minutely=1"], "no rule"),
        (&["du", "a b"], "./a b"),
        (&["compact", "--dead-percent", "101"], "101"),
        (&["compact", "--small", "much"], "not a size"),
        (&["punch"], "PATH"),
        (&["punch", "x", "--holes", "maybe"], "zero"),
        (&["cat", "vm:memory", "--json"], "--json"),
        (&["ls", "-q", "-v"], "cannot be used with"),
    ] {
        let errors = home.fails(code::USAGE, arguments);
        assert!(errors.contains(told), "{arguments:?}: {errors}");
        let is_plain = !arguments.contains(&"--json");
        assert_eq!(errors.starts_with("error: "), is_plain, "{arguments:?}: {errors}");
    }
}

#[test]
fn a_diff_from_standard_input_is_refused() {
    let home = Home::new();
    for option in ["--memory-diff", "--disk-diff"] {
        let errors = home.fails(code::REFUSED, &["commit", "vm", "--parent", "vm@1", option, "-"]);
        assert!(errors.contains("a stream has no holes"), "{errors}");
    }
}

#[test]
fn a_bad_memory_layout_is_told_by_its_line() {
    let home = Home::new();
    for (layout, told) in [
        ("{}", "JSON array"),
        ("[{\"image_offset\": 0}]", "length"),
        ("[{\"image_offset\": 0, \"length\": 1, \"size\": 3}]", "unknown field"),
        ("[", "line 1"),
    ] {
        let file = home.file("layout.json", layout.as_bytes());
        let arguments = ["commit", "vm", "--memory-layout", file.to_str().unwrap()];
        let errors = home.fails(code::USAGE, &arguments);
        assert!(errors.contains(told), "{layout}: {errors}");
    }
    home.fails(code::NOT_FOUND, &["commit", "vm", "--memory-layout", "missing.json"]);
    // It says that it has no bytes, and never ends.
    let errors = home.fails(code::USAGE, &["commit", "vm", "--memory-layout", "/dev/zero"]);
    assert!(errors.contains("more than the 4194304 bytes"), "{errors}");
}

#[test]
fn wrong_usage_is_an_object_with_json() {
    let home = Home::new();
    for arguments in [&["--json", "frobnicate"][..], &["show", "../x", "--json"]] {
        let output = home.run(arguments);
        assert_eq!(output.status.code(), Some(code::USAGE));
        assert!(output.stdout.is_empty());
        let object: serde_json::Value = serde_json::from_str(&errors(&output)).unwrap();
        assert_eq!(object["version"], 1);
        assert_eq!(object["error"]["kind"], "usage");
        assert!(!object["error"]["message"].as_str().unwrap().is_empty());
    }
}

#[test]
fn completions_and_man_pages_are_generated() {
    let home = Home::new();
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        assert!(home.ok(&["completions", shell]).contains("memory-layout"), "{shell}");
    }
    home.ok(&["man", "pages/man1", "-q"]);
    let page = std::fs::read_to_string(home.path("pages/man1/dormouse-commit.1")).unwrap();
    assert!(page.contains("memory\\-layout"), "{page}");
    assert!(home.path("pages/man1/dormouse.1").exists());
}

#[test]
fn colours_and_progress_stay_away_from_pipes() {
    let home = Home::new();
    let output = home.run(&["--help"]);
    assert!(!output.stdout.contains(&0x1b));
    let output = home.command(&["show", "vm"]).env("CLICOLOR_FORCE", "0").output().unwrap();
    assert!(!output.stderr.contains(&0x1b));
}
