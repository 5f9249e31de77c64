//! `ext4 build docker://…`: from Debian's docker-registry, filled by umoci and skopeo, with every
//! kind of authentication, and from one that lies, breaks off and never ends.

use std::fs;
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use dormouse_testkit::registry::{Answer, Body, Registry, Request};
use sha2::{Digest as _, Sha256};

use crate::ext4::{fsck, root, same};
use crate::fixture::{Home, code};

/// `user:secret`, as docker-registry wants it.
const HTPASSWD: &str = "user:$2b$05$NUy2.F8PcbsvaEq.TkirhO2Sc6k.7htzP4rv.pzfHr9t1M1ot2uhS\n";

fn run(command: &mut Command) -> Vec<u8> {
    let output = command.output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {said}");
    output.stdout
}

/// Debian's docker-registry over a folder, until the end.
struct Server {
    child: Child,
    host: String,
}

impl Server {
    fn start(home: &Home, auth: &str) -> Server {
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let host = format!("127.0.0.1:{port}");
        let storage = home.path("storage");
        let config = format!(
            "version: 0.1\nstorage:\n  filesystem:\n    rootdirectory: {}\nhttp:\n  addr: {host}\n\
             {auth}",
            storage.display()
        );
        let config = home.file("registry.yml", config.as_bytes());
        let child = Command::new("docker-registry")
            .arg("serve")
            .arg(config)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let server = Server { child, host };
        for _ in 0..600 {
            if TcpStream::connect(&server.host).is_ok() {
                return server;
            }
            std::thread::sleep(Duration::from_millis(100));
        }
        panic!("docker-registry does not listen");
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // It may have ended by itself, which the test has noticed.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// An image of two layers made by umoci, in the layout `image`.
fn layout(home: &Home) {
    let umoci = |arguments: &[&str]| {
        run(Command::new("umoci").current_dir(home.path(".")).args(arguments));
    };
    umoci(&["init", "--layout", "image"]);
    umoci(&["new", "--image", "image:v1"]);
    umoci(&["unpack", "--image", "image:v1", "bundle"]);
    run(Command::new("cp").arg("-a").arg(home.path("tree/.")).arg(home.path("bundle/rootfs")));
    umoci(&["repack", "--refresh-bundle", "--image", "image:v1", "bundle"]);
    fs::remove_dir_all(home.path("bundle/rootfs/bin")).unwrap();
    home.file("bundle/rootfs/etc/hostname", b"second layer\n");
    umoci(&["repack", "--refresh-bundle", "--image", "image:v1", "bundle"]);
}

fn authfile(home: &Home, host: &str) {
    let auth = STANDARD.encode("user:secret");
    let text = format!(r#"{{"auths":{{"{host}":{{"auth":"{auth}"}}}}}}"#);
    home.file("auth.json", text.as_bytes());
}

#[test]
fn a_real_registry_with_every_authentication() {
    let home = Home::new();
    root(&home);
    layout(&home);
    let build = ["ext4", "build", "oci:image:v1", "-o", "layout.ext4", "--size", "64M"];
    let manifest = home.json(&build)["manifest"].as_str().unwrap().to_owned();

    let server = Server::start(&home, "");
    let target = format!("docker://{}/some/root:v1", server.host);
    let mut push = Command::new("skopeo");
    push.args(["--insecure-policy", "copy", "--dest-tls-verify=false", "oci:image:v1", &target]);
    run(push.current_dir(home.path(".")));
    let all = ["ext4", "build", &target, "-o", "anonymous.ext4", "--size", "64M"];
    assert_eq!(home.json(&all)["manifest"], *manifest);
    fsck(&home.path("anonymous.ext4"));
    assert!(same(&home.path("layout.ext4"), &home.path("anonymous.ext4")));
    assert_eq!(home.ok(&["ext4", "cat", "anonymous.ext4", "/etc/hostname"]), "second layer\n");
    // By its digest, straight into a store.
    home.ok(&["init"]);
    let by_digest = format!("docker://{}/some/root@{manifest}", server.host);
    home.ok(&["ext4", "build", &by_digest, "--commit", "base", "--size", "64M"]);
    home.ok(&["export", "base:root", "base.ext4"]);
    assert!(same(&home.path("layout.ext4"), &home.path("base.ext4")));
    let missing = format!("docker://{}/some/root:v2", server.host);
    let told = home.fails(code::NOT_FOUND, &["ext4", "build", &missing, "-o", "none.ext4"]);
    assert!(told.contains("manifests/v2") && told.contains("some/root"), "{told}");
    let other = ["ext4", "build", &target, "-o", "none.ext4", "--platform", "linux/s390x"];
    let told = home.fails(code::NOT_FOUND, &other);
    assert!(told.contains("--platform"), "{told}");
    drop(server);

    home.file("htpasswd", HTPASSWD.as_bytes());
    let path = home.path("htpasswd");
    let auth = format!("auth:\n  htpasswd:\n    realm: test\n    path: {}\n", path.display());
    let server = Server::start(&home, &auth);
    with_credentials(&home, &server.host, "basic.ext4");
    drop(server);

    let (key, certificate) = (home.path("key.pem"), home.path("certificate.pem"));
    let mut openssl = Command::new("openssl");
    openssl.args(["req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=tokens"]);
    run(openssl.arg("-keyout").arg(&key).arg("-out").arg(&certificate));
    let tokens = token_server(&key, &certificate);
    let auth = format!(
        "auth:\n  token:\n    realm: http://{}/token\n    service: test\n    issuer: tokens\n    \
         rootcertbundle: {}\n",
        tokens.host(),
        certificate.display()
    );
    let server = Server::start(&home, &auth);
    with_credentials(&home, &server.host, "token.ext4");
    assert!(tokens.asked().iter().any(|asked| asked.path.contains("scope=repository")));
}

/// Is refused without credentials, and with them builds what the layout has.
fn with_credentials(home: &Home, host: &str, image: &str) {
    let target = format!("docker://{host}/some/root:v1");
    let base = ["ext4", "build", &target, "-o", image, "--size", "64M"];
    home.file("none.json", b"{}");
    let told = home.fails(code::REFUSED, &[&base[..], &["--authfile", "none.json"]].concat());
    assert!(told.contains("skopeo login"), "{told}");
    assert!(!home.path(image).exists());
    authfile(home, host);
    home.ok(&[&base[..], &["--authfile", "auth.json"]].concat());
    assert!(same(&home.path("layout.ext4"), &home.path(image)));
}

/// Gives who says the password a token that docker-registry believes.
fn token_server(key: &Path, certificate: &Path) -> Registry {
    let text = fs::read_to_string(certificate).unwrap();
    let chain: String = text.lines().filter(|line| !line.starts_with('-')).collect();
    let key = key.to_owned();
    Registry::serve(move |asked| {
        let expected = format!("Basic {}", STANDARD.encode("user:secret"));
        if asked.header("authorization") != expected {
            return Answer::new(401, r#"{"errors":[{"message":"who are you?"}]}"#);
        }
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
        let now = now.as_secs();
        let header = format!(r#"{{"typ":"JWT","alg":"RS256","x5c":["{chain}"]}}"#);
        let claims = format!(
            r#"{{"iss":"tokens","sub":"user","aud":"test","exp":{},"nbf":{},"iat":{now},"jti":"1",
            "access":[{{"type":"repository","name":"some/root","actions":["pull"]}}]}}"#,
            now + 300,
            now - 10
        );
        let signed = [header, claims].map(|part| URL_SAFE_NO_PAD.encode(part)).join(".");
        let mut openssl = Command::new("openssl");
        openssl.args(["dgst", "-sha256", "-sign"]).arg(&key);
        let mut child = openssl.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        std::io::Write::write_all(&mut child.stdin.take().unwrap(), signed.as_bytes()).unwrap();
        let signature = URL_SAFE_NO_PAD.encode(child.wait_with_output().unwrap().stdout);
        Answer::new(200, format!(r#"{{"token":"{signed}.{signature}"}}"#))
    })
    .unwrap()
}

fn digest_of(bytes: &[u8]) -> String {
    let hex: String = Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect();
    format!("sha256:{hex}")
}

/// An image of one layer, as a registry has it.
#[derive(Clone)]
struct Image {
    layer: Vec<u8>,
    manifest: Vec<u8>,
}

impl Image {
    fn new(home: &Home) -> Image {
        root(home);
        let mut pack = Command::new("tar");
        pack.arg("-C").arg(home.path("tree")).args(["--format=posix", "-zc", "."]);
        let layer = run(&mut pack);
        let manifest = format!(
            r#"{{"schemaVersion":2,"layers":[{{"mediaType":"application/vnd.oci.image.layer.v1.tar+gzip",
            "digest":"{}","size":{}}}]}}"#,
            digest_of(&layer),
            layer.len()
        );
        Image { layer, manifest: manifest.into_bytes() }
    }

    /// What a registry that means well answers.
    fn answer(&self, asked: &Request) -> Answer {
        let path = asked.path.as_str();
        if path.starts_with("/v2/a/b/manifests/") {
            let kind = "application/vnd.oci.image.manifest.v1+json";
            return Answer::new(200, &*self.manifest)
                .with("Content-Type", kind)
                .with("Docker-Content-Digest", digest_of(&self.manifest));
        }
        if path == format!("/v2/a/b/blobs/{}", digest_of(&self.layer)) {
            return Answer::part_of(&self.layer, asked);
        }
        Answer::new(404, r#"{"errors":[{"code":"BLOB_UNKNOWN","message":"no such\u0007thing"}]}"#)
    }

    fn is_layer(&self, asked: &Request) -> bool {
        asked.path.ends_with(&digest_of(&self.layer))
    }
}

/// Builds from a registry; a failure must leave nothing. Returns what was said.
fn pull(home: &Home, registry: &Registry, expected: i32) -> String {
    let target = format!("docker://{}/a/b:v1", registry.host());
    let arguments = ["ext4", "build", &target, "-o", "pulled.ext4", "--size", "64M"];
    let before = fs::read_dir(home.path(".")).unwrap().count();
    if expected != code::OK {
        let told = home.fails(expected, &arguments);
        assert_eq!(fs::read_dir(home.path(".")).unwrap().count(), before, "{told}");
        return told;
    }
    let told = home.ok(&arguments);
    fsck(&home.path("pulled.ext4"));
    assert_eq!(home.ok(&["ext4", "cat", "pulled.ext4", "/root/notes"]), "remember\n");
    fs::remove_file(home.path("pulled.ext4")).unwrap();
    told
}

/// A registry that answers as an image's does, but where `change` says otherwise.
fn changed(
    image: &Image,
    change: impl Fn(&Image, &Request) -> Option<Answer> + Send + Sync + 'static,
) -> Registry {
    let image = image.clone();
    Registry::serve(move |asked| change(&image, asked).unwrap_or_else(|| image.answer(asked)))
        .unwrap()
}

#[test]
fn lies_are_told_by_the_digest() {
    let home = Home::new();
    let image = Image::new(&home);
    pull(&home, &changed(&image, |_, _| None), code::OK);

    let flipped = changed(&image, |image, asked| {
        let mut layer = image.layer.clone();
        // The time in gzip's header, which nothing else checks.
        layer[4] ^= 1;
        image.is_layer(asked).then(|| Answer::part_of(&layer, asked))
    });
    let told = pull(&home, &flipped, code::CORRUPT);
    let layer = digest_of(&image.layer);
    assert!(told.contains("layer 1 of 1") && told.contains(&layer), "{told}");

    let longer = changed(&image, |image, asked| {
        let layer = [&image.layer[..], &[0; 1000]].concat();
        image.is_layer(asked).then(|| Answer::part_of(&layer, asked))
    });
    let told = pull(&home, &longer, code::CORRUPT);
    assert!(told.contains("longer"), "{told}");

    let says_another = changed(&image, |image, asked| {
        asked.path.contains("/manifests/").then(|| {
            let digest = digest_of(b"another");
            Answer::new(200, &*image.manifest).with("Docker-Content-Digest", digest)
        })
    });
    let told = pull(&home, &says_another, code::CORRUPT);
    assert!(told.contains(&digest_of(b"another")), "{told}");

    // Asked for by digest, and given something else.
    let registry = changed(&image, |_, _| None);
    let wanted = digest_of(b"wanted");
    let target = format!("docker://{}/a/b@{wanted}", registry.host());
    let told = home.fails(code::CORRUPT, &["ext4", "build", &target, "-o", "x.ext4"]);
    assert!(told.contains(&wanted) && !home.path("x.ext4").exists(), "{told}");

    let nothing =
        changed(&image, |image, asked| image.is_layer(asked).then(|| Answer::new(404, "{")));
    pull(&home, &nothing, code::NOT_FOUND);
    let old = changed(&image, |_, asked| {
        let kind = "application/vnd.docker.distribution.manifest.v1+prettyjws";
        asked
            .path
            .contains("/manifests/")
            .then(|| Answer::new(200, "{}").with("Content-Type", kind))
    });
    pull(&home, &old, code::UNSUPPORTED);
}

#[test]
fn what_never_ends_is_ended() {
    let home = Home::new();
    let image = Image::new(&home);
    let endless = |what: &'static str| {
        changed(&image, move |_, asked| {
            let body = Body::Endless(vec![b' '; 64 << 10]);
            asked.path.contains(what).then_some(Answer { body, ..Answer::new(200, "") })
        })
    };
    let told = pull(&home, &endless("/manifests/"), code::REFUSED);
    assert!(told.contains("manifest"), "{told}");
    let told = pull(&home, &endless("/blobs/"), code::CORRUPT);
    assert!(told.contains("layer 1 of 1"), "{told}");
    // Complaints and tokens, too.
    let refused = changed(&image, |_, _| {
        let body = Body::Endless(vec![b'x'; 64 << 10]);
        Some(Answer { body, ..Answer::new(403, "") })
    });
    pull(&home, &refused, code::REFUSED);
    let tokens = Registry::serve(|_| {
        let body = Body::Endless(vec![b' '; 64 << 10]);
        Answer { body, ..Answer::new(200, "") }
    })
    .unwrap();
    let realm = format!("Bearer realm=\"http://{}/t\"", tokens.host());
    let asking =
        changed(&image, move |_, _| Some(Answer::new(401, "").with("WWW-Authenticate", &*realm)));
    pull(&home, &asking, code::CORRUPT);
    let circle =
        changed(&image, |_, asked| Some(Answer::new(307, "").with("Location", asked.path.clone())));
    pull(&home, &circle, code::IO);
}

#[test]
fn what_breaks_off_goes_on_where_it_was() {
    let home = Home::new();
    let image = Image::new(&home);
    for knows_parts in [true, false] {
        let breaks = Arc::new(AtomicU32::new(0));
        let registry = changed(&image, move |image, asked| {
            if !image.is_layer(asked) {
                return None;
            }
            let whole = if knows_parts {
                Answer::part_of(&image.layer, asked)
            } else {
                Answer::new(200, &*image.layer)
            };
            let Body::Whole(bytes) = whole.body else { return None };
            let count = breaks.fetch_add(1, Ordering::SeqCst);
            let len = if count < 3 { bytes.len() / 2 } else { bytes.len() };
            Some(Answer { body: Body::Cut(bytes, len), ..whole })
        });
        pull(&home, &registry, code::OK);
        let ranges: Vec<usize> = registry
            .asked()
            .iter()
            .filter(|asked| image.is_layer(asked))
            .map(Request::range_start)
            .collect();
        assert_eq!(ranges.len(), 4);
        assert!(ranges.is_sorted() && ranges[3] > 0, "{ranges:?}");
    }
    // Never whole: given up, and said so.
    let registry = changed(&image, |image, asked| {
        let body = Body::Cut(image.layer.clone(), 0);
        image.is_layer(asked).then_some(Answer { body, ..Answer::new(200, "") })
    });
    pull(&home, &registry, code::IO);

    // A registry that is busy is asked again, and not for ever.
    let count = Arc::new(AtomicU32::new(0));
    let busy = changed(&image, move |_, _| {
        (count.fetch_add(1, Ordering::SeqCst) < 3).then(|| Answer::new(503, ""))
    });
    pull(&home, &busy, code::OK);
    let broken = changed(&image, |_, _| Some(Answer::new(500, "")));
    let told = pull(&home, &broken, code::IO);
    assert!(told.contains("500"), "{told}");
}

/// Tokens are asked for with the password, sent to the registry, and asked for again when they
/// have run out; neither goes where a redirection leads.
#[test]
fn tokens_and_passwords_go_only_where_they_belong() {
    let home = Home::new();
    let image = Image::new(&home);
    let tokens = Registry::serve(|asked| {
        let basic = format!("Basic {}", STANDARD.encode("user:secret"));
        assert_eq!(asked.header("authorization"), basic);
        Answer::new(200, r#"{"access_token":"one-for-all"}"#)
    })
    .unwrap();
    let elsewhere = {
        let layer = image.layer.clone();
        Registry::serve(move |asked| Answer::part_of(&layer, asked)).unwrap()
    };
    let (realm, other) = (format!("http://{}/token", tokens.host()), elsewhere.host());
    let seen = Mutex::new(0);
    let registry = changed(&image, move |image, asked| {
        let mut seen = seen.lock().unwrap();
        *seen += 1;
        // The third request's token has run out.
        if asked.header("authorization") != "Bearer one-for-all" || *seen == 3 {
            let challenge = format!(
                "Bearer realm=\"{realm}\",service=\"a service\",scope=\"repository:a/b:pull\""
            );
            return Some(Answer::new(401, "").with("WWW-Authenticate", challenge));
        }
        image
            .is_layer(asked)
            .then(|| Answer::new(307, "").with("Location", format!("http://{other}/signed?x=1")))
    });
    authfile(&home, &registry.host());
    let target = format!("docker://{}/a/b:v1", registry.host());
    let arguments = ["ext4", "build", &target, "-o", "x.ext4", "--authfile", "auth.json"];
    home.ok(&arguments);
    fsck(&home.path("x.ext4"));
    let asked = tokens.asked();
    assert_eq!(asked.len(), 2, "{asked:?}");
    assert!(asked[0].path.contains("service=a%20service"), "{asked:?}");
    let redirected = elsewhere.asked();
    assert_eq!(redirected.len(), 1);
    assert_eq!(redirected[0].header("authorization"), "");

    // A password in the default place, and a registry that wants it plainly.
    let basic = changed(&image, |_, asked| {
        let expected = format!("Basic {}", STANDARD.encode("user:secret"));
        (asked.header("authorization") != expected)
            .then(|| Answer::new(401, "").with("WWW-Authenticate", "Basic realm=\"x\""))
    });
    authfile(&home, &basic.host());
    let target = format!("docker://{}/a/b:v1", basic.host());
    let mut command = home.command(&["ext4", "build", &target, "-o", "y.ext4"]);
    command.env("REGISTRY_AUTH_FILE", home.path("auth.json"));
    assert!(command.output().unwrap().status.success());

    // A token server that is no server, and a challenge that nobody knows.
    for challenge in ["Bearer realm=\"file:///etc/passwd\"", "Bearer", "Negotiate", ""] {
        let registry = changed(&image, move |_, _| {
            Some(Answer::new(401, "").with("WWW-Authenticate", challenge))
        });
        pull(&home, &registry, code::REFUSED);
    }
}

#[test]
fn a_reference_that_is_none_is_a_mistake_of_usage() {
    let home = Home::new();
    for wrong in ["docker://", "docker://A", "docker://a/../b", "docker://a:b:c"] {
        let told = home.fails(code::USAGE, &["ext4", "build", wrong, "-o", "x"]);
        assert!(told.contains("is not a reference"), "{told}");
    }
}
