//! Lists in files: a line each, without CR, comments from `#` on, and blanks.

use std::path::Path;

use crate::error::{Context, Error, ErrorKind, Result};

/// The longest list.
const LIST_BYTES_MAX: u64 = 16 << 20;

/// The lines of a list. An empty one is an error that names the file.
pub fn read(path: &Path) -> Result<Vec<String>> {
    let what = || format!("cannot read the list {}", path.display());
    if std::fs::metadata(path).context(what)?.len() > LIST_BYTES_MAX {
        let what = format!("the list {} has more than 16 MiB", path.display());
        return Err(Error::new(ErrorKind::Limit, what));
    }
    let lines = lines(&std::fs::read_to_string(path).context(what)?);
    if lines.is_empty() {
        let what = format!("the list {} has no lines", path.display());
        return Err(Error::new(ErrorKind::InvalidInput, what));
    }
    Ok(lines)
}

fn lines(text: &str) -> Vec<String> {
    text.lines()
        .map(|line| line.split('#').next().unwrap_or_default().trim())
        .filter(|line| !line.is_empty())
        .map(str::to_owned)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn comments_and_blanks_are_left_out() {
        let text = "\r\n# all\r\n a b \r\nc # the rest\n\t\n#\n/d";
        assert_eq!(lines(text), ["a b", "c", "/d"]);
        assert!(lines("# nothing\n\n").is_empty());
    }
}
