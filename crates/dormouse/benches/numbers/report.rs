//! What was measured, as a table and as JSON.

use std::fmt;
use std::path::Path;

use anyhow::Result;
use comfy_table::Table;
use serde::Serialize;

/// A measured figure; displayed with its unit.
#[derive(Clone, Copy, Debug, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Value {
    Seconds(f64),
    Bytes(f64),
    BytesPerSecond(f64),
    /// Requests a second.
    PerSecond(f64),
    Count(f64),
}

/// What was promised. A ratio is ours ÷ the other's: of times and sizes less is better, of speeds
/// more.
#[derive(Clone, Copy, Debug, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Bar {
    /// Ours ÷ the other's is at most this.
    RatioAtMost(f64),

    /// Ours ÷ the other's is at least this.
    RatioAtLeast(f64),

    /// Ours is at most this, in its unit.
    AtMost(f64),

    /// Ours is at least this, in its unit.
    AtLeast(f64),
}

/// One row: what was measured, ours, perhaps somebody else's, and the bar, if there is one.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Row {
    group: String,
    what: String,
    ours: Value,
    other: Option<Value>,
    other_is: Option<String>,
    ratio: Option<f64>,
    bar: Option<Bar>,
    reached: Option<bool>,
}

impl Row {
    pub(crate) fn new(what: impl Into<String>, ours: Value) -> Row {
        Row {
            group: String::new(),
            what: what.into(),
            ours,
            other: None,
            other_is: None,
            ratio: None,
            bar: None,
            reached: None,
        }
    }

    /// Compares with somebody else's figure, which has the same unit.
    pub(crate) fn beside(mut self, other_is: impl Into<String>, other: Value) -> Row {
        self.other_is = Some(other_is.into());
        self.ratio = Some(self.ours.number() / other.number());
        self.other = Some(other);
        self
    }

    /// Compares with somebody else's figure by the ratio that rounds in pairs gave.
    pub(crate) fn paired(mut self, other_is: impl Into<String>, other: Value, ratio: f64) -> Row {
        self = self.beside(other_is, other);
        self.ratio = Some(ratio);
        self
    }

    /// Sets the bar. One for a ratio comes after `beside`.
    pub(crate) fn bar(mut self, bar: Bar) -> Row {
        self.reached = Some(match bar {
            Bar::RatioAtMost(limit) => self.ratio.is_some_and(|ratio| ratio <= limit),
            Bar::RatioAtLeast(limit) => self.ratio.is_some_and(|ratio| ratio >= limit),
            Bar::AtMost(limit) => self.ours.number() <= limit,
            Bar::AtLeast(limit) => self.ours.number() >= limit,
        });
        self.bar = Some(bar);
        self
    }
}

/// All rows, and remarks that belong to them.
#[derive(Debug, Default, Serialize)]
pub(crate) struct Report {
    rows: Vec<Row>,
    notes: Vec<String>,
    #[serde(skip)]
    group: String,
}

impl Report {
    pub(crate) fn begin(&mut self, group: &str) {
        self.group = group.to_owned();
    }

    pub(crate) fn row(&mut self, mut row: Row) {
        row.group.clone_from(&self.group);
        self.rows.push(row);
    }

    pub(crate) fn note(&mut self, text: impl fmt::Display) {
        self.notes.push(format!("{}: {text}", self.group));
    }

    pub(crate) fn save(&self, path: &Path) -> Result<()> {
        Ok(std::fs::write(path, serde_json::to_vec_pretty(self)?)?)
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut table = Table::new();
        table.set_header(["group", "what", "ours", "the other", "ratio", "bar", "reached"]);
        for row in &self.rows {
            let other = match (&row.other_is, row.other) {
                (Some(name), Some(value)) => format!("{value} {name}"),
                _ => String::new(),
            };
            let bar = row.bar.map_or(String::new(), |bar| match bar {
                Bar::RatioAtMost(limit) => format!("ratio ≤ {limit:.2}"),
                Bar::RatioAtLeast(limit) => format!("ratio ≥ {limit:.2}"),
                Bar::AtMost(limit) => format!("≤ {}", row.ours.like(limit)),
                Bar::AtLeast(limit) => format!("≥ {}", row.ours.like(limit)),
            });
            table.add_row([
                row.group.clone(),
                row.what.clone(),
                row.ours.to_string(),
                other,
                row.ratio.map_or(String::new(), |ratio| format!("{ratio:.3}")),
                bar,
                row.reached.map_or("", |reached| if reached { "yes" } else { "NO" }).to_owned(),
            ]);
        }
        writeln!(f, "{table}")?;
        self.notes.iter().try_for_each(|note| writeln!(f, "{note}"))
    }
}

impl Value {
    fn number(self) -> f64 {
        match self {
            Value::Seconds(number)
            | Value::Bytes(number)
            | Value::BytesPerSecond(number)
            | Value::PerSecond(number)
            | Value::Count(number) => number,
        }
    }

    /// Another figure in this one's unit.
    fn like(self, number: f64) -> Value {
        match self {
            Value::Seconds(_) => Value::Seconds(number),
            Value::Bytes(_) => Value::Bytes(number),
            Value::BytesPerSecond(_) => Value::BytesPerSecond(number),
            Value::PerSecond(_) => Value::PerSecond(number),
            Value::Count(_) => Value::Count(number),
        }
    }
}

impl fmt::Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Value::Seconds(s) if s < 1e-6 => write!(f, "{:.0} ns", s * 1e9),
            Value::Seconds(s) if s < 1e-3 => write!(f, "{:.2} µs", s * 1e6),
            Value::Seconds(s) if s < 10.0 => write!(f, "{:.1} ms", s * 1e3),
            Value::Seconds(s) => write!(f, "{s:.1} s"),
            Value::Bytes(b) if b < 1024.0 => write!(f, "{b:.2} B"),
            Value::Bytes(b) if b < (1 << 20) as f64 => write!(f, "{:.1} KiB", b / 1024.0),
            Value::Bytes(b) => write!(f, "{:.1} MiB", b / (1 << 20) as f64),
            Value::BytesPerSecond(b) => write!(f, "{:.2} GB/s", b / 1e9),
            Value::PerSecond(n) if n >= 1e4 => write!(f, "{:.1} k/s", n / 1e3),
            Value::PerSecond(n) => write!(f, "{n:.0} /s"),
            Value::Count(n) => write!(f, "{n:.0}"),
        }
    }
}
