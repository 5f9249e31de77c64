//! The daemon's API against its own description, over TLS: schemathesis makes up what the description
//! allows and what it does not, and checks that all answers are as described. And the figures, parsed.

use std::collections::BTreeMap;
use std::fs;
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::json;

use crate::daemon_fixture::Running;
use crate::fixture::{Home, code, errors, noise};
use crate::mounted::path;

/// The version of schemathesis; a Python package that the test installs below `target`.
const SCHEMATHESIS: &str = "4.32.5";

#[test]
fn the_description_that_is_checked_in_is_current() {
    let home = Home::new();
    let printed = home.ok(&["daemon", "--print-openapi"]);
    let docs = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/openapi.json");
    let checked_in = fs::read_to_string(docs).unwrap();
    assert!(
        printed == checked_in,
        "docs/openapi.json is old: dormouse daemon --print-openapi > docs/openapi.json"
    );
    let home = Home::with_store();
    let daemon = Running::start(&home, &[]);
    assert_eq!(daemon.send("GET", "/v1/openapi.json", None).1, printed);
}

/// Certificates of an authority of our own, of a server and of a client.
fn make_certificates(folder: &Path) {
    fs::create_dir(folder).unwrap();
    let file = |name: &str| path(&folder.join(name)).to_owned();
    for (name, template) in [
        ("ca", "cn = \"ours\"\nca\ncert_signing_key\n"),
        ("server", "cn = \"localhost\"\ndns_name = \"localhost\"\ntls_www_server\nsigning_key\n"),
        ("client", "cn = \"guest\"\ntls_www_client\nsigning_key\n"),
    ] {
        let [key, cert, text] =
            ["key", "cert", "template"].map(|end| file(&format!("{name}-{end}.pem")));
        fs::write(&text, template).unwrap();
        certtool(&["--generate-privkey", "--key-type=rsa", "--bits=2048", "--outfile", &key]);
        let (ca_key, ca_cert) = (file("ca-key.pem"), file("ca-cert.pem"));
        let mut args = vec!["--template", &text, "--load-privkey", &key, "--outfile", &cert];
        match name {
            "ca" => args.push("--generate-self-signed"),
            _ => args.extend([
                "--generate-certificate",
                "--load-ca-certificate",
                &ca_cert,
                "--load-ca-privkey",
                &ca_key,
            ]),
        }
        certtool(&args);
    }
}

fn certtool(args: &[&str]) {
    let output = Command::new("certtool").args(args).output().unwrap();
    assert!(output.status.success(), "{}", errors(&output));
}

/// A daemon that listens on TCP, with its port.
fn over_tls(home: &Home, connections: &str) -> (Running, u16) {
    make_certificates(&home.path("tls"));
    let args = ["--tcp", "127.0.0.1:0", "--tls", "tls", "--connections", connections];
    let daemon = Running::start(home, &args);
    let log = daemon.log();
    let port = log.split("address=127.0.0.1:").nth(1).and_then(|rest| rest.split('\n').next());
    let port = port.unwrap_or_else(|| panic!("{log}")).trim().parse().unwrap();
    (daemon, port)
}

const ASK: &str = "
import http.client, ssl, sys
folder, port, has = sys.argv[1], int(sys.argv[2]), sys.argv[3]
context = ssl.create_default_context(cafile=folder + '/ca-cert.pem')
if has == 'with':
    context.load_cert_chain(folder + '/client-cert.pem', folder + '/client-key.pem')
try:
    connection = http.client.HTTPSConnection('localhost', port, context=context)
    connection.request('GET', '/v1/vms')
    print(connection.getresponse().status)
except (ssl.SSLError, ConnectionError) as error:
    print('refused', error)
";

#[test]
fn tcp_is_for_those_with_a_certificate() {
    let home = Home::with_store();
    let (daemon, port) = over_tls(&home, "4");
    let folder = home.path("tls");
    let ask_by = |folder: &Path, has: &str| {
        let output = Command::new("python3")
            .args(["-c", ASK, path(folder), &port.to_string(), has])
            .output()
            .unwrap();
        assert!(output.status.success(), "{}", errors(&output));
        String::from_utf8(output.stdout).unwrap()
    };
    let ask = |has: &str| ask_by(&folder, has);
    assert_eq!(ask("with").trim(), "200");
    assert!(ask("without").starts_with("refused"), "{}", ask("without"));
    // One that another authority gave is none.
    let other = home.path("other");
    make_certificates(&other);
    fs::copy(folder.join("ca-cert.pem"), other.join("ca-cert.pem")).unwrap();
    let said = ask_by(&other, "with");
    assert!(said.starts_with("refused"), "{said}");
    let (_, metrics) = daemon.send("GET", "/metrics", None);
    assert!(metrics.contains("dormouse_refused_total{why=\"handshake\"}"), "{metrics}");
    home.fails(code::USAGE, &["daemon", "--tcp", "127.0.0.1:0"]);
    // Who has no certificate and says nothing takes places of TCP alone, and not for ever.
    let silent: Vec<_> = (0..8).map(|_| TcpStream::connect(("127.0.0.1", port)).unwrap()).collect();
    let begun = Instant::now();
    for _ in 0..20 {
        daemon.get("/v1");
    }
    assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
    assert_eq!(ask("with").trim(), "200", "they are let go");
    drop(silent);
}

/// The environment with schemathesis in it, made once.
fn schemathesis() -> PathBuf {
    let target = Path::new(env!("CARGO_BIN_EXE_dormouse")).ancestors().nth(2).unwrap();
    let folder = target.join(format!("schemathesis-{SCHEMATHESIS}"));
    let (program, whole) = (folder.join("bin/schemathesis"), folder.join("whole"));
    if whole.exists() {
        return program;
    }
    let run = |command: &mut Command| {
        let output = command.output().unwrap();
        assert!(output.status.success(), "{command:?}: {}", errors(&output));
    };
    run(Command::new("python3").args(["-m", "venv", "--clear"]).arg(&folder));
    run(Command::new(folder.join("bin/pip"))
        .args(["--quiet", "--disable-pip-version-check", "install"])
        .arg(format!("schemathesis=={SCHEMATHESIS}")));
    fs::write(whole, "").unwrap();
    program
}

#[test]
fn every_answer_is_as_described_whatever_is_asked() {
    let home = Home::with_store();
    for seed in 0..3 {
        home.file("disk", &noise(seed, 64));
        home.ok(&["commit", "vm", "--disk", "disk"]);
    }
    let (daemon, port) = over_tls(&home, "64");
    let url = format!("https://localhost:{port}");
    let file = |name: &str| home.path("tls").join(name).display().to_string();
    let output = Command::new(schemathesis())
        .current_dir(home.path("."))
        .arg("run")
        .arg(format!("{url}/v1/openapi.json"))
        .args(["--url", &url, "--no-color", "--continue-on-failure"])
        .args(["--tls-verify", &file("ca-cert.pem")])
        .args(["--request-cert", &file("client-cert.pem")])
        .args(["--request-cert-key", &file("client-key.pem")])
        .args(["--max-examples", "10", "--max-time", "60", "--request-timeout", "30"])
        .args(["--suppress-health-check", "all", "--generation-deterministic"])
        // What a guest must have beyond its shape cannot be said in a schema, so not all is accepted.
        .args(["--exclude-checks", "positive_data_acceptance"])
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{said}{}", errors(&output));
    assert!(said.contains("Tested: 18") || said.contains("18 selected / 18 total"), "{said}");
    assert!(!daemon.log().contains("panicked"), "{}", daemon.log());
    // It still works, and nothing was started that should not have been.
    assert_eq!(daemon.get("/v1/vms")["vms"], json!([]));
}

/// A page of figures, held to the format: families, their types, their samples; histograms that add up.
#[test]
fn metrics_are_as_prometheus_reads_them() {
    let home = Home::with_store();
    home.file("disk", &noise(1, 64));
    home.ok(&["commit", "vm", "--disk", "disk"]);
    let daemon = Running::start(&home, &[]);
    daemon.get("/v1/vms");
    daemon.post("/v1/gc?wait=durable", &json!({}));
    daemon.send("DELETE", "/v1/vms/none?wait=durable", None);
    let (status, page) = daemon.send("GET", "/metrics", None);
    assert_eq!(status, 200);
    let mut families: BTreeMap<String, String> = BTreeMap::new();
    let mut samples: BTreeMap<String, f64> = BTreeMap::new();
    let mut family = String::new();
    for line in page.lines() {
        if let Some(help) = line.strip_prefix("# HELP ") {
            family = help.split(' ').next().unwrap().to_owned();
            assert!(!families.contains_key(&family), "{family} is there twice");
        } else if let Some(kind) = line.strip_prefix("# TYPE ") {
            let (name, kind) = kind.split_once(' ').unwrap();
            assert_eq!(name, family);
            families.insert(name.to_owned(), kind.to_owned());
        } else {
            let (sample, value) = line.rsplit_once(' ').unwrap();
            assert!(sample.starts_with(&family), "{line} in {family}");
            let value = value.parse().unwrap_or_else(|error| panic!("{line}: {error}"));
            assert!(samples.insert(sample.to_owned(), value).is_none(), "{sample} is there twice");
        }
    }
    let mut histograms = 0;
    for (name, _) in families.iter().filter(|(_, kind)| *kind == "histogram") {
        let counts = format!("{name}_count");
        for (count_of, count) in samples.iter().filter(|(sample, _)| sample.starts_with(&counts)) {
            let labels = count_of[counts.len()..].trim_matches(['{', '}']);
            let comma = if labels.is_empty() { "" } else { "," };
            let bucket =
                |le: &str| samples[&format!("{name}_bucket{{{labels}{comma}le=\"{le}\"}}")];
            assert_eq!(bucket("+Inf"), *count, "{count_of}");
            assert!(bucket("0.0005") <= bucket("1") && bucket("1") <= bucket("+Inf"), "{count_of}");
            histograms += 1;
        }
    }
    assert!(histograms >= 5, "{page}");
    let docs = include_str!("../../../../docs/api.md");
    let told = docs.split_once("## Figures").unwrap().1.split_once("\n## ").unwrap().0;
    for name in families.keys() {
        let of_many = ["dormouse_disk_", "dormouse_daemon_"];
        let is_told = told.contains(&format!("`{name}`"))
            || of_many.iter().any(|prefix| name.starts_with(prefix))
            || told
                .split('`')
                .any(|word| word.strip_prefix('…').is_some_and(|end| name.ends_with(end)));
        assert!(is_told, "docs/api.md tells nothing of {name}");
    }
    assert_eq!(samples["dormouse_jobs_total{kind=\"gc\",outcome=\"done\"}"], 1.0);
    assert_eq!(samples["dormouse_jobs_total{kind=\"kill\",outcome=\"failed\"}"], 1.0);
    assert_eq!(samples["dormouse_job_service_seconds_count{kind=\"gc\"}"], 1.0);
    assert_eq!(samples["dormouse_store_snapshots"], 1.0);
    assert!(samples["dormouse_store_bytes{what=\"packs\"}"] > 200_000.0);
    assert!(samples["dormouse_daemon_threads"] <= samples["dormouse_daemon_threads_max"], "{page}");
}
