//! What a registry wants to see first: the `WWW-Authenticate` header (RFC 9110, 11.6.1).

/// Parameters in one challenge; more are left out.
const PARAMETERS_MAX: usize = 32;

/// Challenges in all headers; more are left out.
const CHALLENGES_MAX: usize = 16;

/// One way to be let in.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Challenge {
    /// The scheme in small letters, such as `bearer`.
    pub scheme: String,

    /// Its parameters, with names in small letters.
    pub parameters: Vec<(String, String)>,
}

impl Challenge {
    /// A parameter's value.
    pub fn get(&self, name: &str) -> Option<&str> {
        let found = self.parameters.iter().find(|(key, _)| key == name);
        found.map(|(_, value)| value.as_str())
    }
}

/// The challenges of a header. What cannot be understood is left out.
pub fn parse(header: &str) -> Vec<Challenge> {
    let mut challenges: Vec<Challenge> = Vec::new();
    let mut rest = header;
    loop {
        rest = rest.trim_start_matches([' ', '\t', ',']);
        let token = token(rest);
        if token.is_empty() || challenges.len() > CHALLENGES_MAX {
            return challenges;
        }
        rest = &rest[token.len()..];
        let after = rest.trim_start_matches([' ', '\t']);
        // A name with a value belongs to the scheme before it; any other begins a new one.
        let Some(value) = after.strip_prefix('=') else {
            let scheme = token.to_ascii_lowercase();
            challenges.push(Challenge { scheme, parameters: Vec::new() });
            continue;
        };
        let (value, after) = quoted_or_token(value.trim_start_matches([' ', '\t']));
        rest = after;
        if let Some(challenge) = challenges.last_mut()
            && challenge.parameters.len() < PARAMETERS_MAX
        {
            challenge.parameters.push((token.to_ascii_lowercase(), value));
        }
    }
}

fn token(text: &str) -> &str {
    let is_token = |char: char| char.is_ascii_alphanumeric() || "!#$%&'*+-.^_`|~".contains(char);
    let end = text.find(|char| !is_token(char)).unwrap_or(text.len());
    &text[..end]
}

fn quoted_or_token(text: &str) -> (String, &str) {
    let Some(quoted) = text.strip_prefix('"') else {
        let token = token(text);
        return (token.to_owned(), &text[token.len()..]);
    };
    let mut value = String::new();
    let mut chars = quoted.char_indices();
    while let Some((at, char)) = chars.next() {
        match char {
            '"' => return (value, &quoted[at + 1..]),
            '\\' => value.extend(chars.next().map(|(_, char)| char)),
            char => value.push(char),
        }
    }
    // The quote never ends: nothing is left.
    (value, "")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn challenges_are_told_apart() {
        let found = parse(
            "Basic realm=\"a, b\", charset=UTF-8, BEARER Realm = \"https://x/y\\\"z\",\
             service=reg,scope=\"repository:a/b:pull\"",
        );
        assert_eq!(found.len(), 2);
        assert_eq!(found[0].scheme, "basic");
        assert_eq!((found[0].get("realm"), found[0].get("charset")), (Some("a, b"), Some("UTF-8")));
        assert_eq!(found[1].scheme, "bearer");
        assert_eq!(found[1].get("realm"), Some("https://x/y\"z"));
        assert_eq!(found[1].get("scope"), Some("repository:a/b:pull"));
        assert_eq!(parse("Negotiate")[0].scheme, "negotiate");
    }

    #[test]
    fn nonsense_ends() {
        for text in ["", "=", ",,,", "\"", "Bearer realm=\"never", "a=b", "Bearer =x", "é"] {
            // Only that it ends without a panic.
            let _ = parse(text);
        }
        let many = "x,".repeat(100_000);
        assert!(parse(&many).len() <= CHALLENGES_MAX + 1);
    }
}
