//! Sizes as people write and read them, in powers of 1024.

const UNITS: [(&str, u64); 6] = [
    ("EiB", 1 << 60),
    ("PiB", 1 << 50),
    ("TiB", 1 << 40),
    ("GiB", 1 << 30),
    ("MiB", 1 << 20),
    ("KiB", 1 << 10),
];

/// `98.4 MiB`; under 1 KiB exact.
pub(crate) fn human(bytes: u64) -> String {
    // The next unit is taken a little early, where this one would read "1024.0".
    match UNITS.iter().find(|(_, size)| bytes >= size - size / 2048) {
        None => format!("{bytes} B"),
        Some((unit, size)) => {
            let tenths = (u128::from(bytes) * 10 + u128::from(size / 2)) / u128::from(*size);
            format!("{}.{} {unit}", tenths / 10, tenths % 10)
        }
    }
}

/// Reads `4096`, `64K`, `64KiB`, `1.5G`; letters may be small.
pub(crate) fn parse(text: &str) -> Result<u64, String> {
    let refuse = || format!("{text:?} is not a size, such as 4096, 64K or 1.5GiB");
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let unit = text[digits.len()..].to_ascii_uppercase();
    let unit = unit.strip_suffix("IB").or(unit.strip_suffix('B')).unwrap_or(&unit);
    let shift = match unit {
        "" => 0,
        "K" => 10,
        "M" => 20,
        "G" => 30,
        "T" => 40,
        _ => return Err(refuse()),
    };
    let (whole, fraction) = digits.split_once('.').unwrap_or((digits, "0"));
    let all_digits = |part: &str| !part.is_empty() && part.bytes().all(|b| b.is_ascii_digit());
    if !all_digits(whole) || !all_digits(fraction) || fraction.len() > 9 {
        return Err(refuse());
    }
    let whole: u64 = whole.parse().map_err(|_| refuse())?;
    let nanos: u64 = format!("{fraction:0<9}").parse().map_err(|_| refuse())?;
    let fraction =
        u64::try_from((u128::from(nanos) << shift) / 1_000_000_000).map_err(|_| refuse())?;
    let bytes = whole.checked_mul(1 << shift).and_then(|bytes| bytes.checked_add(fraction));
    bytes.ok_or_else(refuse)
}

/// `12.5 %`, `<0.1 %`, or nothing to divide by: `-`.
pub(crate) fn percent(part: u64, whole: u64) -> String {
    if whole == 0 {
        return "-".to_owned();
    }
    let tenths = u128::from(part) * 1000 / u128::from(whole);
    if tenths == 0 && part > 0 {
        return "<0.1 %".to_owned();
    }
    format!("{}.{} %", tenths / 10, tenths % 10)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_printed() {
        for (bytes, text) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1.0 KiB"),
            (103_178_240, "98.4 MiB"),
            ((1 << 20) - 1, "1.0 MiB"),
            (512 << 20, "512.0 MiB"),
            (u64::MAX, "16.0 EiB"),
        ] {
            assert_eq!(human(bytes), text);
        }
    }

    #[test]
    fn sizes_are_read() {
        for (text, bytes) in [
            ("0", 0),
            ("4096", 4096),
            ("4096B", 4096),
            ("64K", 65536),
            ("64kib", 65536),
            ("1.5GiB", 3 << 29),
            ("2T", 2 << 40),
        ] {
            assert_eq!(parse(text), Ok(bytes), "{text}");
        }
        for text in ["", "K", "-1", "1 K", "1.K", ".5K", "1X", "20000000T", "1e3"] {
            assert!(parse(text).is_err(), "{text}");
        }
    }

    #[test]
    fn shares_are_printed() {
        assert_eq!(percent(1, 8), "12.5 %");
        assert_eq!(percent(1, 1 << 40), "<0.1 %");
        assert_eq!(percent(0, 5), "0.0 %");
        assert_eq!(percent(5, 0), "-");
        assert_eq!(percent(5, 5), "100.0 %");
    }
}
