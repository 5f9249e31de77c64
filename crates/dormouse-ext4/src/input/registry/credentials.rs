//! Who we are to a registry: from the files that `skopeo login` and `docker login` write
//! (`containers-auth.json(5)`), and the helpers that these files name.

use std::fmt;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::Deserialize;

use crate::error::{Context, Error, ErrorKind, Result};
use crate::input::registry::reference::Reference;

/// The longest file of credentials, and the longest answer of a helper.
const FILE_BYTES_MAX: u64 = 1 << 20;

/// The user name by which a helper says that its secret is a token (docker-credential-helpers).
const TOKEN_USER: &str = "<token>";

/// What docker calls its own registry in these files.
const HUB_KEY: &str = "index.docker.io";

/// A name and a password, or a token that stands for both.
#[derive(Clone, PartialEq, Eq)]
pub enum Credentials {
    /// A user.
    Password {
        /// The name.
        user: String,
        /// The password.
        password: String,
    },

    /// A token that is exchanged for another one.
    IdentityToken(String),
}

impl fmt::Debug for Credentials {
    /// Shows nothing that should not be in a log.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Credentials::Password { .. } => "Password",
            Credentials::IdentityToken(_) => "IdentityToken",
        })
    }
}

impl Credentials {
    /// What a file says of a reference's registry; of several keys the longest that fits wins.
    pub fn from_file(path: &Path, reference: &Reference) -> Result<Option<Credentials>> {
        let what = || format!("cannot read credentials from {}", path.display());
        let mut text = Vec::new();
        let file = std::fs::File::open(path).context(what)?;
        file.take(FILE_BYTES_MAX + 1).read_to_end(&mut text).context(what)?;
        if text.len() as u64 > FILE_BYTES_MAX {
            let what = format!("{}: more than 1 MiB", what());
            return Err(Error::new(ErrorKind::Limit, what));
        }
        let file: AuthFile = serde_json::from_slice(&text).map_err(|error| {
            let what = format!("{}: not a file of credentials: {error}", what());
            Error::new(ErrorKind::InvalidInput, what)
        })?;
        file.find(reference).map_err(|error| error.within(what()))
    }

    /// The files that are looked into if none is named, those that are there: what
    /// `REGISTRY_AUTH_FILE` names, containers' and docker's.
    pub fn files() -> Vec<PathBuf> {
        let variable = |name: &str| std::env::var_os(name).map(PathBuf::from);
        let below = |name: &str, path: &str| variable(name).map(|folder| folder.join(path));
        let all = [
            variable("REGISTRY_AUTH_FILE"),
            below("XDG_RUNTIME_DIR", "containers/auth.json"),
            below("XDG_CONFIG_HOME", "containers/auth.json"),
            below("HOME", ".config/containers/auth.json"),
            below("DOCKER_CONFIG", "config.json"),
            below("HOME", ".docker/config.json"),
        ];
        all.into_iter().flatten().filter(|path| path.is_file()).collect()
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct AuthFile {
    #[serde(default)]
    auths: std::collections::BTreeMap<String, Auth>,
    #[serde(default)]
    cred_helpers: std::collections::BTreeMap<String, String>,
    #[serde(default)]
    creds_store: Option<String>,
}

#[derive(Deserialize)]
struct Auth {
    #[serde(default)]
    auth: Option<String>,
    #[serde(default)]
    identitytoken: Option<String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct HelperAnswer {
    username: String,
    secret: String,
}

impl AuthFile {
    fn find(&self, reference: &Reference) -> Result<Option<Credentials>> {
        if let Some(name) = best(&self.cred_helpers, reference) {
            return ask_helper(name, reference);
        }
        if let Some(auth) = best(&self.auths, reference) {
            let found = auth.credentials()?;
            if found.is_some() {
                return Ok(found);
            }
        }
        match &self.creds_store {
            Some(name) => ask_helper(name, reference),
            None => Ok(None),
        }
    }
}

/// The value whose key fits best: `HOST`, `HOST/PART`, or a URL of them.
fn best<'a, T>(
    map: &'a std::collections::BTreeMap<String, T>,
    reference: &Reference,
) -> Option<&'a T> {
    let mut found: Option<(usize, &T)> = None;
    for (key, value) in map {
        let plain = key.strip_prefix("https://").or_else(|| key.strip_prefix("http://"));
        let plain = plain.unwrap_or(key).trim_end_matches('/');
        let plain = ["/v1", "/v2"].iter().find_map(|end| plain.strip_suffix(end)).unwrap_or(plain);
        let (host, path) = plain.split_once('/').unwrap_or((plain, ""));
        let host = if host == HUB_KEY { "docker.io" } else { host };
        let below = reference.repository().strip_prefix(path);
        let fits =
            below.is_some_and(|rest| path.is_empty() || rest.is_empty() || rest.starts_with('/'));
        if host == reference.host() && fits && found.is_none_or(|(len, _)| path.len() >= len) {
            found = Some((path.len(), value));
        }
    }
    found.map(|(_, value)| value)
}

impl Auth {
    fn credentials(&self) -> Result<Option<Credentials>> {
        if let Some(token) = self.identitytoken.as_ref().filter(|token| !token.is_empty()) {
            return Ok(Some(Credentials::IdentityToken(token.clone())));
        }
        let Some(auth) = self.auth.as_ref().filter(|auth| !auth.is_empty()) else {
            return Ok(None);
        };
        let decoded = STANDARD.decode(auth).ok().and_then(|bytes| String::from_utf8(bytes).ok());
        // Some fill up with zeros.
        let pair = decoded.as_deref().map(|text| text.trim_end_matches('\0'));
        let Some((user, password)) = pair.and_then(|pair| pair.split_once(':')) else {
            let what = "an `auth` that is not USER:PASSWORD in base64";
            return Err(Error::new(ErrorKind::InvalidInput, what));
        };
        Ok(Some(Credentials::Password { user: user.to_owned(), password: password.to_owned() }))
    }
}

/// Runs `docker-credential-NAME get`, which reads a host and answers in JSON.
fn ask_helper(name: &str, reference: &Reference) -> Result<Option<Credentials>> {
    let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.');
    if name.is_empty() || !name.bytes().all(is_plain) {
        let what = format!("{name:?} is not a credential helper's name");
        return Err(Error::new(ErrorKind::InvalidInput, what));
    }
    let program = format!("docker-credential-{name}");
    let what = || format!("cannot ask {program}");
    let host = match reference.host() {
        "docker.io" => "https://index.docker.io/v1/",
        host => host,
    };
    let mut child = Command::new(&program)
        .arg("get")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .context(what)?;
    if let Some(mut stdin) = child.stdin.take() {
        // One that does not read answers all the same.
        let _ = stdin.write_all(host.as_bytes());
    }
    let mut answer = Vec::new();
    if let Some(stdout) = child.stdout.take() {
        stdout.take(FILE_BYTES_MAX).read_to_end(&mut answer).context(what)?;
    }
    if !child.wait().context(what)?.success() {
        // It has none for this host.
        return Ok(None);
    }
    let answer: HelperAnswer = serde_json::from_slice(&answer)
        .map_err(|error| Error::new(ErrorKind::InvalidInput, format!("{}: {error}", what())))?;
    Ok(Some(if answer.username == TOKEN_USER {
        Credentials::IdentityToken(answer.secret)
    } else {
        Credentials::Password { user: answer.username, password: answer.secret }
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn find(text: &str, reference: &str) -> Result<Option<Credentials>> {
        let file: AuthFile = serde_json::from_str(text).unwrap();
        file.find(&reference.parse().unwrap())
    }

    fn user(found: Result<Option<Credentials>>) -> Option<String> {
        match found.unwrap()? {
            Credentials::Password { user, .. } => Some(user),
            Credentials::IdentityToken(token) => Some(token),
        }
    }

    #[test]
    fn the_longest_key_that_fits_wins() {
        let auth = |user: &str| STANDARD.encode(format!("{user}:pass:word"));
        let text = format!(
            r#"{{"auths":{{"https://index.docker.io/v1/":{{"auth":"{}"}},"quay.io":{{"auth":"{}"}},
            "quay.io/team":{{"auth":"{}"}},"other.io":{{}},"token.io":{{"identitytoken":"t"}}}}}}"#,
            auth("hub"),
            auth("quay"),
            auth("team")
        );
        for (reference, expected) in [
            ("alpine", Some("hub")),
            ("quay.io/a", Some("quay")),
            ("quay.io/team/a", Some("team")),
            ("quay.io/teams/a", Some("quay")),
            ("token.io/a", Some("t")),
            ("other.io/a", None),
            ("localhost:5000/a", None),
        ] {
            assert_eq!(user(find(&text, reference)).as_deref(), expected, "{reference}");
        }
    }

    #[test]
    fn what_is_wrong_is_told_without_secrets() {
        let wrong = r#"{"auths":{"quay.io":{"auth":"!!"}}}"#;
        assert!(find(wrong, "quay.io/a").unwrap_err().to_string().contains("base64"));
        let helper = r#"{"credHelpers":{"quay.io":"../sh"}}"#;
        assert!(find(helper, "quay.io/a").unwrap_err().to_string().contains("../sh"));
        let shown = format!("{:?}", Credentials::IdentityToken("secret".to_owned()));
        assert!(!shown.contains("secret"));
    }
}
