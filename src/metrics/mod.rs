//! What Prometheus is told: every metric with its name, help and labels in one table, and the page
//! they are written on.
//!
//! Nothing here outlives what it tells of: a [`Page`] is written anew from what there is at each
//! scrape, so that a volume that was forgotten leaves no series. What happens between two scrapes is
//! kept in [`counters`] and [`io`]. Labels are volumes, their purposes, key ARNs and words of ours; never
//! anything that a client chose.

pub mod counters;
pub mod io;
pub mod table;

use std::collections::BTreeMap;

use prometheus::core::Collector;
use prometheus::process_collector::ProcessCollector;
use prometheus::proto::{Bucket, Counter, Gauge, Histogram, LabelPair, Metric, MetricFamily};
use prometheus::{TEXT_FORMAT, TextEncoder};

use crate::metrics::counters::Durations;
use crate::metrics::table::{Described, Kind};

/// The media type of a page.
pub const CONTENT_TYPE: &str = TEXT_FORMAT;

/// One scrape's answer.
#[derive(Default)]
pub struct Page {
    families: BTreeMap<&'static str, MetricFamily>,
}

impl Page {
    /// A value of a gauge, or of a counter.
    pub fn put(&mut self, metric: &'static Described, labels: &[&str], value: f64) {
        let mut sample = Metric::from_label(pairs(metric, labels));
        match metric.kind {
            Kind::Gauge => {
                let mut gauge = Gauge::default();
                gauge.set_value(value);
                sample.set_gauge(gauge);
            }
            Kind::Counter | Kind::Histogram => {
                let mut counter = Counter::default();
                counter.set_value(value);
                sample.set_counter(counter);
            }
        }
        self.family(metric).mut_metric().push(sample);
    }

    /// A whole number.
    pub fn count(&mut self, metric: &'static Described, labels: &[&str], value: u64) {
        #[expect(clippy::cast_precision_loss, reason = "Prometheus knows no other numbers")]
        self.put(metric, labels, value as f64);
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
            self.put(metric, &labels, f64::from(u8::from(state == now)));
        }
    }

    /// A histogram.
    pub fn durations(&mut self, metric: &'static Described, labels: &[&str], values: &Durations) {
        let Durations { bounds, counts, sum } = values;
        let mut so_far = 0;
        let mut buckets = Vec::with_capacity(counts.len());
        for (bound, count) in bounds.iter().zip(counts) {
            so_far += count;
            let mut bucket = Bucket::default();
            bucket.set_upper_bound(*bound);
            bucket.set_cumulative_count(so_far);
            buckets.push(bucket);
        }
        let mut histogram = Histogram::default();
        histogram.set_bucket(buckets);
        histogram.set_sample_count(counts.iter().sum());
        histogram.set_sample_sum(sum.as_secs_f64());
        let mut sample = Metric::from_label(pairs(metric, labels));
        sample.set_histogram(histogram);
        self.family(metric).mut_metric().push(sample);
    }

    fn family(&mut self, metric: &'static Described) -> &mut MetricFamily {
        self.families.entry(metric.name).or_insert_with(|| {
            let mut family = MetricFamily::default();
            family.set_name(metric.name.to_owned());
            family.set_help(metric.help.to_owned());
            family.set_field_type(metric.kind.into());
            family
        })
    }

    /// As text, with what is known of the process.
    #[must_use]
    pub fn text(self) -> String {
        let mut families: Vec<_> = self.families.into_values().collect();
        families.extend(ProcessCollector::for_self().collect());
        let mut text = String::new();
        // It can only fail for a family without samples, and there is none.
        let _written = TextEncoder::new().encode_utf8(&families, &mut text);
        text
    }
}

fn pairs(metric: &Described, values: &[&str]) -> Vec<LabelPair> {
    debug_assert_eq!(metric.labels.len(), values.len(), "{}", metric.name);
    let pair = |(name, value): (&&str, &&str)| {
        let mut pair = LabelPair::default();
        pair.set_name((*name).to_owned());
        pair.set_value((*value).to_owned());
        pair
    };
    metric.labels.iter().zip(values).map(pair).collect()
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::metrics::counters::{Distribution, FENCE_BOUNDS};
    use crate::metrics::table;

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
