//! What Prometheus is told: every metric with its name, help and labels in one table, and the page
//! they are written on.
//!
//! Nothing here outlives what it tells of: a [`Page`] is written anew from what there is at each
//! scrape, so that a volume that was forgotten leaves no series. What happens between two scrapes is
//! kept in [`counters`] and [`io`]. Labels are volumes, their purposes, key ARNs and words of ours; never
//! anything that a client chose.
//!
//! The text is written as it comes, without the `prometheus` crate's model of it, which takes four
//! allocations for each label: a node with hundreds of volumes has tens of thousands of lines. A
//! test holds the text to that crate's.

pub mod counters;
pub mod io;
pub mod table;

use std::collections::BTreeMap;
use std::fmt::{Display, Write};

use prometheus::core::Collector;
use prometheus::process_collector::ProcessCollector;
use prometheus::{TEXT_FORMAT, TextEncoder};

use crate::metrics::counters::Durations;
use crate::metrics::table::{Described, Kind};

/// The media type of a page.
pub const CONTENT_TYPE: &str = TEXT_FORMAT;

/// One scrape's answer.
#[derive(Default)]
pub struct Page {
    /// The text of each metric, by its name.
    families: BTreeMap<&'static str, String>,
    /// Labels of the line that is being written.
    labels: String,
}

impl Page {
    /// A value of a gauge, or of a counter.
    pub fn put(&mut self, metric: &'static Described, labels: &[&str], value: f64) {
        self.line(metric, labels, value);
    }

    /// A whole number.
    pub fn count(&mut self, metric: &'static Described, labels: &[&str], value: u64) {
        self.line(metric, labels, value);
    }

    /// One sample for each of `states`: 1 for the one that is, 0 for the others.
    pub fn states(
        &mut self,
        metric: &'static Described,
        labels: &[&str],
        states: &[impl AsRef<str>],
        now: &str,
    ) {
        for state in states.iter().map(AsRef::as_ref) {
            let labels: Vec<_> = labels.iter().copied().chain([state]).collect();
            self.line(metric, &labels, u8::from(state == now));
        }
    }

    /// A histogram.
    pub fn durations(&mut self, metric: &'static Described, labels: &[&str], values: &Durations) {
        let Durations { bounds, counts, sum } = values;
        self.labels(metric, labels);
        let (text, labels) = self.family(metric);
        let comma = if labels.is_empty() { "" } else { "," };
        let mut so_far = 0;
        let mut bucket = |bound: &dyn Display, count| {
            let name = metric.name;
            put(text, format_args!("{name}_bucket{{{labels}{comma}le=\"{bound}\"}} {count}\n"));
        };
        for (bound, count) in bounds.iter().zip(counts) {
            so_far += count;
            bucket(bound, so_far);
        }
        let count: u64 = counts.iter().sum();
        bucket(&"+Inf", count);
        sample(text, metric.name, "_sum", labels, sum.as_secs_f64());
        sample(text, metric.name, "_count", labels, count);
    }

    fn line(&mut self, metric: &'static Described, labels: &[&str], value: impl Display) {
        self.labels(metric, labels);
        let (text, labels) = self.family(metric);
        sample(text, metric.name, "", labels, value);
    }

    /// Writes the labels of the next line: `volume="v",state="held"`.
    fn labels(&mut self, metric: &Described, values: &[&str]) {
        debug_assert_eq!(metric.labels.len(), values.len(), "{}", metric.name);
        self.labels.clear();
        for (name, value) in metric.labels.iter().zip(values) {
            if !self.labels.is_empty() {
                self.labels.push(',');
            }
            self.labels.push_str(name);
            self.labels.push_str("=\"");
            escape(&mut self.labels, value, &['\\', '\n', '"']);
            self.labels.push('"');
        }
    }

    /// A metric's text so far, and the labels.
    fn family(&mut self, metric: &'static Described) -> (&mut String, &str) {
        let text = self.families.entry(metric.name).or_insert_with(|| {
            let Described { name, kind, help, .. } = metric;
            let kind = match kind {
                Kind::Gauge => "gauge",
                Kind::Counter => "counter",
                Kind::Histogram => "histogram",
            };
            let mut text = format!("# HELP {name} ");
            escape(&mut text, help, &['\\', '\n']);
            put(&mut text, format_args!("\n# TYPE {name} {kind}\n"));
            text
        });
        (text, &self.labels)
    }

    /// As text, with what is known of the process.
    #[must_use]
    pub fn text(self) -> String {
        let mut process = String::new();
        // It can only fail for a family without samples, and there is none.
        let families = ProcessCollector::for_self().collect();
        let _written = TextEncoder::new().encode_utf8(&families, &mut process);
        let families: Vec<_> = self.families.into_values().chain([process]).collect();
        families.concat()
    }
}

/// Writes a line.
fn sample(text: &mut String, name: &str, part: &str, labels: &str, value: impl Display) {
    if labels.is_empty() {
        put(text, format_args!("{name}{part} {value}\n"));
    } else {
        put(text, format_args!("{name}{part}{{{labels}}} {value}\n"));
    }
}

fn put(text: &mut String, what: std::fmt::Arguments<'_>) {
    // Memory takes everything.
    let _written = text.write_fmt(what);
}

/// Adds a text whose `special` characters would end it.
fn escape(text: &mut String, value: &str, special: &[char]) {
    let mut rest = value;
    while let Some(at) = rest.find(special) {
        text.push_str(&rest[..at]);
        text.push('\\');
        let newline = rest[at..].starts_with('\n');
        text.push_str(if newline { "n" } else { &rest[at..=at] });
        rest = &rest[at + 1..];
    }
    text.push_str(rest);
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::metrics::counters::{Distribution, FENCE_BOUNDS};
    use crate::metrics::table;

    use prometheus::proto::{
        Bucket, Counter, Gauge, Histogram, LabelPair, Metric, MetricFamily, MetricType,
    };

    fn pairs(labels: &[(&str, &str)]) -> Vec<LabelPair> {
        let pair = |(name, value): &(&str, &str)| {
            let mut pair = LabelPair::default();
            pair.set_name((*name).to_owned());
            pair.set_value((*value).to_owned());
            pair
        };
        labels.iter().map(pair).collect()
    }

    fn family(metric: &Described, kind: MetricType, samples: Vec<Metric>) -> MetricFamily {
        let mut family = MetricFamily::default();
        family.set_name(metric.name.to_owned());
        family.set_help(metric.help.to_owned());
        family.set_field_type(kind);
        family.set_metric(samples);
        family
    }

    #[test]
    fn a_page_is_what_the_prometheus_crate_would_write() {
        static COUNTER: Described =
            Described { name: "a_total", kind: Kind::Counter, help: "A\\b\nc\"d", labels: &[] };
        static GAUGE: Described =
            Described { name: "b", kind: Kind::Gauge, help: "B", labels: &["x", "y"] };
        static HISTOGRAM: Described =
            Described { name: "c_seconds", kind: Kind::Histogram, help: "C", labels: &["x"] };
        let strange = "a\"b\\c\nd{e},ä";
        let values = [0.0, 1.0, -2.5, 0.1, 1e-9, 123_456_789.123, 1e21];
        let durations = Durations {
            bounds: &[50e-6, 0.25, 1.0, 5.0],
            counts: vec![1, 0, 7, 2, 3],
            sum: Duration::from_micros(12_345_678),
        };
        let mut page = Page::default();
        page.count(&COUNTER, &[], 1 << 40);
        values.iter().for_each(|value| page.put(&GAUGE, &[strange, "2"], *value));
        page.durations(&HISTOGRAM, &[strange], &durations);

        let mut counter = Counter::default();
        counter.set_value(f64::from(2).powi(40));
        let mut total = Metric::from_label(Vec::new());
        total.set_counter(counter);
        let gauges = values.map(|value| {
            let mut gauge = Gauge::default();
            gauge.set_value(value);
            let mut sample = Metric::from_label(pairs(&[("x", strange), ("y", "2")]));
            sample.set_gauge(gauge);
            sample
        });
        let mut histogram = Histogram::default();
        let buckets = [(50e-6, 1), (0.25, 1), (1.0, 8), (5.0, 10)].map(|(bound, count)| {
            let mut bucket = Bucket::default();
            bucket.set_upper_bound(bound);
            bucket.set_cumulative_count(count);
            bucket
        });
        histogram.set_bucket(buckets.to_vec());
        histogram.set_sample_count(13);
        histogram.set_sample_sum(12.345_678);
        let mut seconds = Metric::from_label(pairs(&[("x", strange)]));
        seconds.set_histogram(histogram);
        let families = [
            family(&COUNTER, MetricType::COUNTER, vec![total]),
            family(&GAUGE, MetricType::GAUGE, gauges.to_vec()),
            family(&HISTOGRAM, MetricType::HISTOGRAM, vec![seconds]),
        ];
        let mut theirs = String::new();
        TextEncoder::new().encode_utf8(&families, &mut theirs).unwrap();
        let ours = page.text();
        assert_eq!(ours.split("# HELP process_").next().unwrap(), theirs);
    }

    #[test]
    fn a_page_is_what_prometheus_reads() {
        let mut page = Page::default();
        page.states(&table::KEY_LEASE_STATE, &["a\"b"], &["held", "revoked"], "held");
        let fences = Distribution::new(FENCE_BOUNDS);
        fences.add(Duration::from_millis(504));
        page.durations(&table::KEY_DENIAL_TO_FENCE, &["v"], &fences.read());
        let text = page.text();
        assert!(
            text.contains("byokd_key_lease_state{state=\"held\",volume=\"a\\\"b\"} 1\n")
                || text.contains("byokd_key_lease_state{volume=\"a\\\"b\",state=\"held\"} 1\n"),
            "{text}"
        );
        for line in [
            "byokd_key_denial_to_fence_seconds_bucket{volume=\"v\",le=\"0.5\"} 0",
            "byokd_key_denial_to_fence_seconds_bucket{volume=\"v\",le=\"1\"} 1",
            "byokd_key_denial_to_fence_seconds_bucket{volume=\"v\",le=\"+Inf\"} 1",
            "byokd_key_denial_to_fence_seconds_count{volume=\"v\"} 1",
            "# TYPE byokd_key_lease_state gauge",
            "# TYPE process_cpu_seconds_total counter",
        ] {
            assert!(text.lines().any(|l| l == line), "{line} in {text}");
        }
    }
}
