//! Which snapshots of a name the rules keep.

use std::collections::HashSet;

use jiff::Timestamp;
use jiff::tz::TimeZone;

use super::{KeepRules, PruneReport};
use crate::error::{Error, ErrorKind, Result};
use crate::name::{Name, SnapRef};
use crate::store::Store;

/// Removes the snapshots of a name that no rule keeps; see [`Store::prune`].
pub(crate) fn prune(
    store: &Store,
    name: &Name,
    keep: &KeepRules,
    dry_run: bool,
) -> Result<PruneReport> {
    let listing = store.list(Some(name))?;
    if let Some((damaged, error)) = listing.damaged.into_iter().next() {
        return Err(Error::with_source(
            ErrorKind::Corrupt,
            format!("{damaged} cannot be judged; `dormouse rm {damaged}` removes it"),
            error,
        ));
    }
    if listing.snapshots.is_empty() {
        return Err(Error::new(ErrorKind::NotFound, format!("{name} has no snapshots")));
    }
    let created: Vec<_> =
        listing.snapshots.iter().map(|manifest| (manifest.number, manifest.created)).collect();
    let mut report = PruneReport::default();
    for (number, rules) in judge(&created, keep) {
        let snap = SnapRef { name: name.clone(), number: Some(number) };
        if !rules.is_empty() {
            report.kept.push((snap.to_string(), rules));
            continue;
        }
        if !dry_run {
            match store.remove(&snap) {
                // Somebody else was faster.
                Err(error) if error.kind() == ErrorKind::NotFound => {}
                result => result?,
            }
        }
        report.removed.push(snap.to_string());
    }
    Ok(report)
}

/// For each snapshot, in the given order, the rules that keep it.
fn judge(snapshots: &[(u64, Timestamp)], keep: &KeepRules) -> Vec<(u64, Vec<String>)> {
    type Period = fn(&jiff::Zoned) -> (i16, i16);
    let periods: [(&str, usize, Period); 5] = [
        ("hourly", keep.hourly, |at| (at.year(), at.day_of_year() * 24 + i16::from(at.hour()))),
        ("daily", keep.daily, |at| (at.year(), at.day_of_year())),
        ("weekly", keep.weekly, |at| {
            let week = at.date().iso_week_date();
            (week.year(), i16::from(week.week()))
        }),
        ("monthly", keep.monthly, |at| (at.year(), i16::from(at.month()))),
        ("yearly", keep.yearly, |at| (at.year(), 0)),
    ];
    let mut rules: Vec<Vec<String>> = vec![Vec::new(); snapshots.len()];
    for (age, rules) in rules.iter_mut().rev().enumerate() {
        if age < keep.last {
            rules.push("last".to_owned());
        }
        if age == 0 && keep.last == 0 {
            rules.push("newest".to_owned());
        }
    }
    for (name, count, period) in periods {
        let mut seen = HashSet::new();
        for (rules, (_, created)) in rules.iter_mut().zip(snapshots).rev() {
            if seen.len() == count {
                break;
            }
            if seen.insert(period(&created.to_zoned(TimeZone::UTC))) {
                rules.push(name.to_owned());
            }
        }
    }
    snapshots.iter().map(|(number, _)| *number).zip(rules).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kept(times: &[&str], keep: &str) -> Vec<u64> {
        let snapshots: Vec<_> =
            (1..).zip(times).map(|(number, time)| (number, time.parse().unwrap())).collect();
        let judged = judge(&snapshots, &keep.parse().unwrap());
        judged.into_iter().filter(|(_, rules)| !rules.is_empty()).map(|(n, _)| n).collect()
    }

    #[test]
    fn rules_keep_the_newest_of_each_period() {
        let times = [
            "2026-01-01T10:00:00Z",
            "2026-01-01T10:30:00Z",
            "2026-01-01T11:00:00Z",
            "2026-01-02T09:00:00Z",
            "2026-01-09T09:00:00Z",
            "2026-01-09T09:59:59Z",
        ];
        let cases: [(&str, &[u64]); 7] = [
            ("last=1", &[6]),
            ("last=3", &[4, 5, 6]),
            ("last=99", &[1, 2, 3, 4, 5, 6]),
            ("hourly=3", &[3, 4, 6]),
            ("daily=2", &[4, 6]),
            ("weekly=2", &[4, 6]),
            ("last=1,daily=9,yearly=1", &[3, 4, 6]),
        ];
        for (keep, expected) in cases {
            assert_eq!(kept(&times, keep), expected, "{keep}");
        }
    }

    #[test]
    fn rules_are_parsed_strictly() {
        for bad in ["", "last", "last=", "last=0", "last=-1", "last=1,last=2", "often=3", "last=1,"]
        {
            bad.parse::<KeepRules>().unwrap_err();
        }
    }
}
