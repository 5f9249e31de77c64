//! Figures for Prometheus, in its text format 0.0.4: counters and histograms of what the daemon did,
//! beside which [`crate::daemon::api::host`] puts what is asked for at each scrape.
//!
//! Labels are of small sets (routes, kinds, outcomes), never of names that users choose but for those of
//! VMs that live, so that the number of series stays bounded.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use dormouse_store::manifest::Figures;

/// Bounds in seconds, from a cached look-up to the sleep of a large guest.
const SECONDS: [f64; 17] = [
    0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0,
    60.0, 300.0,
];

/// All that is counted.
#[derive(Debug)]
pub(crate) struct Metrics {
    requests: Counters,
    request_seconds: Histograms,
    lookup_queue: Histograms,
    lookup_service: Histograms,
    jobs: Counters,
    job_queue: Histograms,
    job_service: Histograms,
    wake: Histograms,
    freeze: Histograms,
    sleep_vmm: Histograms,
    durable: Histograms,
    slept_bytes: Counters,
    captured_bytes: Counters,
    refused: Counters,
}

impl Metrics {
    /// Nothing has happened yet.
    pub(crate) fn new() -> Metrics {
        Metrics {
            requests: Counters::new("dormouse_http_requests_total", "Requests that were answered."),
            request_seconds: Histograms::new(
                "dormouse_http_request_seconds",
                "From a request's head to its answer's head, waiting for a job included.",
            ),
            lookup_queue: Histograms::new(
                "dormouse_lookup_queue_seconds",
                "Waiting of requests that are no jobs for a thread.",
            ),
            lookup_service: Histograms::new(
                "dormouse_lookup_service_seconds",
                "Work for requests that are no jobs.",
            ),
            jobs: Counters::new("dormouse_jobs_total", "Jobs that ended."),
            job_queue: Histograms::new(
                "dormouse_job_queue_seconds",
                "From a job's acceptance to its begin.",
            ),
            job_service: Histograms::new(
                "dormouse_job_service_seconds",
                "From a job's begin to its end.",
            ),
            wake: Histograms::new(
                "dormouse_wake_seconds",
                "Wakes, forks and boots of VMs: ready until disks and memory are there, vmm for its \
                 start and its state, total for all.",
            ),
            freeze: Histograms::new(
                "dormouse_sleep_frozen_seconds",
                "How long guests stood still to be stored.",
            ),
            sleep_vmm: Histograms::new(
                "dormouse_sleep_vmm_seconds",
                "Of that, the VMM's pause and state.",
            ),
            durable: Histograms::new(
                "dormouse_sleep_durable_seconds",
                "From the pause of a guest until its snapshot was durable.",
            ),
            slept_bytes: Counters::new(
                "dormouse_sleep_written_bytes_total",
                "What sleeps wrote to the store.",
            ),
            captured_bytes: Counters::new(
                "dormouse_sleep_captured_bytes_total",
                "Blocks of images that sleeps stored, by what was found: zero; unchanged, as in the parent \
                 at the same place; elsewhere in the store; self, stored just before by the same commit; \
                 new.",
            ),
            refused: Counters::new(
                "dormouse_refused_total",
                "Who was turned away: strangers, failed handshakes, full queues.",
            ),
        }
    }

    /// A request was answered.
    pub(crate) fn request(&self, method: &str, route: &str, status: u16, took: Duration) {
        let labels = labels(&[("method", method), ("route", route)]);
        self.request_seconds.add(labels.clone(), took.as_secs_f64());
        self.requests.add(format!("{labels},status=\"{status}\""), 1);
    }

    /// Something was looked up.
    pub(crate) fn lookup(&self, what: &str, queue: Duration, service: Duration) {
        let labels = labels(&[("what", what)]);
        self.lookup_queue.add(labels.clone(), queue.as_secs_f64());
        self.lookup_service.add(labels, service.as_secs_f64());
    }

    /// A job ended.
    pub(crate) fn job(&self, kind: &str, outcome: &str, queue: Duration, service: Duration) {
        self.jobs.add(labels(&[("kind", kind), ("outcome", outcome)]), 1);
        let labels = labels(&[("kind", kind)]);
        self.job_queue.add(labels.clone(), queue.as_secs_f64());
        self.job_service.add(labels, service.as_secs_f64());
    }

    /// A VM is awake.
    pub(crate) fn awake(&self, kind: &str, seconds: &crate::vm::wake::WakeSeconds) {
        for (part, seconds) in
            [("total", seconds.total), ("ready", seconds.ready), ("vmm", seconds.vmm)]
        {
            self.wake.add(labels(&[("kind", kind), ("part", part)]), seconds);
        }
    }

    /// A VM was stored.
    pub(crate) fn slept(&self, slept: &crate::vm::sleep::Slept) {
        self.freeze.add(String::new(), slept.frozen_seconds);
        self.sleep_vmm.add(String::new(), slept.vmm_seconds);
        self.durable.add(String::new(), slept.durable_seconds);
        self.slept_bytes.add(String::new(), slept.written_bytes);
    }

    /// What the capture of a sleep found.
    pub(crate) fn captured(&self, figures: &Figures) {
        for (found, bytes) in [
            ("zero", figures.zero_bytes),
            ("unchanged", figures.unchanged_bytes),
            ("elsewhere", figures.elsewhere_bytes),
            ("self", figures.self_bytes),
            ("new", figures.new_bytes),
        ] {
            self.captured_bytes.add(labels(&[("found", found)]), bytes);
        }
    }

    /// Somebody was turned away.
    pub(crate) fn refused(&self, why: &str) {
        self.refused.add(labels(&[("why", why)]), 1);
    }

    /// All of it, for a scrape.
    pub(crate) fn render(&self, page: &mut Page) {
        self.requests.render(page);
        self.jobs.render(page);
        self.slept_bytes.render(page);
        self.captured_bytes.render(page);
        self.refused.render(page);
        for histograms in [
            &self.request_seconds,
            &self.lookup_queue,
            &self.lookup_service,
            &self.job_queue,
            &self.job_service,
            &self.wake,
            &self.freeze,
            &self.sleep_vmm,
            &self.durable,
        ] {
            histograms.render(page);
        }
    }
}

/// A scrape's answer.
#[derive(Debug, Default)]
pub(crate) struct Page {
    text: String,
}

impl Page {
    /// A family begins.
    pub(crate) fn family(&mut self, name: &str, kind: &str, help: &str) {
        let _ = write!(self.text, "# HELP {name} {help}\n# TYPE {name} {kind}\n");
    }

    /// A sample of the family.
    pub(crate) fn sample(&mut self, name: &str, labels: &str, value: impl std::fmt::Display) {
        // Writing to a string cannot fail, here and above.
        let _ = match labels {
            "" => writeln!(self.text, "{name} {value}"),
            labels => writeln!(self.text, "{name}{{{labels}}} {value}"),
        };
    }

    /// A family of one gauge.
    pub(crate) fn gauge(&mut self, name: &str, help: &str, value: impl std::fmt::Display) {
        self.family(name, "gauge", help);
        self.sample(name, "", value);
    }

    /// The text.
    pub(crate) fn into_text(self) -> String {
        self.text
    }
}

/// Labels as they stand in a sample.
pub(crate) fn labels(pairs: &[(&str, &str)]) -> String {
    let mut text = String::new();
    for (name, value) in pairs {
        if !text.is_empty() {
            text.push(',');
        }
        let value = value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n");
        let _ = write!(text, "{name}=\"{value}\"");
    }
    text
}

#[derive(Debug)]
struct Counters {
    name: &'static str,
    help: &'static str,
    /// By labels; held for an addition.
    series: Mutex<BTreeMap<String, u64>>,
}

impl Counters {
    fn new(name: &'static str, help: &'static str) -> Counters {
        Counters { name, help, series: Mutex::default() }
    }

    fn add(&self, labels: String, count: u64) {
        let mut series = lock(&self.series);
        let value = series.entry(labels).or_default();
        *value = value.saturating_add(count);
    }

    fn render(&self, page: &mut Page) {
        page.family(self.name, "counter", self.help);
        for (labels, value) in &*lock(&self.series) {
            page.sample(self.name, labels, value);
        }
    }
}

#[derive(Debug)]
struct Histograms {
    name: &'static str,
    help: &'static str,
    /// By labels; held for an addition.
    series: Mutex<BTreeMap<String, Histogram>>,
}

#[derive(Clone, Debug, Default)]
struct Histogram {
    /// Of each bound, those up to it and over the one before; the last are over all bounds.
    counts: [u64; SECONDS.len() + 1],
    sum: f64,
}

impl Histograms {
    fn new(name: &'static str, help: &'static str) -> Histograms {
        Histograms { name, help, series: Mutex::default() }
    }

    fn add(&self, labels: String, seconds: f64) {
        let mut series = lock(&self.series);
        let histogram = series.entry(labels).or_default();
        histogram.counts[SECONDS.partition_point(|bound| *bound < seconds)] += 1;
        histogram.sum += seconds;
    }

    fn render(&self, page: &mut Page) {
        page.family(self.name, "histogram", self.help);
        for (labels, histogram) in &*lock(&self.series) {
            let mut sum = 0;
            let comma = if labels.is_empty() { "" } else { "," };
            let bucket = format!("{}_bucket", self.name);
            for (at, count) in histogram.counts.iter().enumerate() {
                sum += count;
                let bound = SECONDS.get(at).map_or("+Inf".to_owned(), f64::to_string);
                page.sample(&bucket, &format!("{labels}{comma}le=\"{bound}\""), sum);
            }
            page.sample(&format!("{}_sum", self.name), labels, histogram.sum);
            page.sample(&format!("{}_count", self.name), labels, sum);
        }
    }
}

/// Numbers are whole, whoever panicked.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_is_as_the_format_has_it() {
        let metrics = Metrics::new();
        metrics.request("GET", "/v1/vms", 200, Duration::from_micros(700));
        metrics.request("GET", "/v1/vms", 200, Duration::from_secs(400));
        let mut page = Page::default();
        metrics.render(&mut page);
        let text = page.into_text();
        for line in [
            r#"dormouse_http_requests_total{method="GET",route="/v1/vms",status="200"} 2"#,
            r#"dormouse_http_request_seconds_bucket{method="GET",route="/v1/vms",le="0.0005"} 0"#,
            r#"dormouse_http_request_seconds_bucket{method="GET",route="/v1/vms",le="0.001"} 1"#,
            r#"dormouse_http_request_seconds_bucket{method="GET",route="/v1/vms",le="300"} 1"#,
            r#"dormouse_http_request_seconds_bucket{method="GET",route="/v1/vms",le="+Inf"} 2"#,
            r#"dormouse_http_request_seconds_sum{method="GET",route="/v1/vms"} 400.0007"#,
            r#"dormouse_http_request_seconds_count{method="GET",route="/v1/vms"} 2"#,
        ] {
            assert!(text.lines().any(|there| there == line), "{line}\n{text}");
        }
    }

    #[test]
    fn labels_are_escaped() {
        assert_eq!(labels(&[("a", "x\"y\\z\n")]), r#"a="x\"y\\z\n""#);
    }
}
