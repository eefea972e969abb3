//! What checking a trail and holding it against CloudTrail found, for people and for programs.

use std::fmt::Display;

use serde::Serialize;
use serde_json::Value;

use crate::audit::reconcile::{CloudEvent, Comparison, Difference, Excused, is_unproven};
use crate::audit::verify::Report;
use crate::cli::output::Output;
use crate::units::word;

/// Requests that are listed where there may be thousands; programs get all.
const LISTED: usize = 10;

/// What checking an audit trail found.
pub(super) fn verified(report: &Report, out: &Output) {
    out.value(&answer("audit-verify", "intact", report.is_intact(), report));
    verdict(report).iter().for_each(|line| out.line(line));
}

/// What holding a trail against CloudTrail found.
pub(super) fn compared(found: &Comparison, out: &Output) {
    out.value(&answer("audit-reconcile", "agrees", found.agrees(), found));
    comparison(found).iter().for_each(|line| out.line(line));
}

fn answer(name: &str, verdict: &str, good: bool, found: &impl Serialize) -> Value {
    let mut value = serde_json::to_value(found).unwrap_or_default();
    if let Some(members) = value.as_object_mut() {
        members.insert("answer".to_owned(), name.into());
        members.insert(verdict.to_owned(), good.into());
    }
    value
}

fn verdict(report: &Report) -> Vec<String> {
    let findings = report.findings.iter().map(|finding| {
        format!("{}:{}: {}: {}", finding.file, finding.line, word(finding.wrong), finding.what)
    });
    let notes = report.notes.iter().map(|note| format!("note: {note}"));
    let mut lines: Vec<_> = findings.chain(notes).collect();
    let range = match (report.first, &report.last) {
        (Some(first), Some(last)) => format!(" from {first} to {}", last.seq),
        _ => String::new(),
    };
    let signed = match report.signed_up_to {
        Some(seq) if report.last.is_some_and(|last| last.seq == seq) => ", signed to the end",
        Some(_) => ", its end not signed",
        None => "",
    };
    let records = format!("{}{range}", count(report.records, "record"));
    let files = count(report.files, "file");
    if report.is_intact() {
        lines.push(format!("intact: {records}, in {files}{signed}"));
        lines.extend(report.last.map(|last| format!("head {last}")));
    } else {
        let findings = count(report.findings.len(), "finding");
        lines.push(format!("NOT INTACT: {findings}; what fits: {records}, in {files}"));
    }
    lines
}

fn comparison(found: &Comparison) -> Vec<String> {
    let mut lines = Vec::new();
    for Difference { seq, request_id, what } in &found.differences {
        lines.push(format!("DIFFERS  record {seq}, request {request_id}: {what}"));
    }
    for event in &found.missing_in_trail {
        lines.push(format!("IN CLOUDTRAIL ALONE  {}", cloud_event(event)));
    }
    for call in &found.missing_in_cloudtrail {
        let id = call.request_id.as_deref().unwrap_or("none");
        lines.push(format!(
            "IN THE TRAIL ALONE  {}  record {}, {}, request {id}",
            call.at, call.seq, call.operation
        ));
    }
    for event in &found.administration {
        lines.push(format!("administration  {}", cloud_event(event)));
    }
    for (principal, times) in &found.others {
        lines.push(format!("used by others  {principal}: {}", count(*times, "time")));
    }
    for (why, excused) in &found.explained {
        lines.push(format!("explained  {} {why}", excused.len()));
        if is_unproven(why) {
            lines.extend(excused.iter().take(LISTED).map(request));
            if excused.len() > LISTED {
                lines.push(format!("    and {} more: --json has all", excused.len() - LISTED));
            }
        }
    }
    let principals: Vec<_> = found.principals.iter().map(String::as_str).collect();
    let principals =
        if principals.is_empty() { "nobody there".to_owned() } else { principals.join(", ") };
    lines.push(format!("byokd is {principals}"));
    let (calls, events) = (count(found.calls, "request"), count(found.events, "event"));
    lines.push(format!("the trail has {calls}, the export {events} of KMS"));
    lines.push(if found.compared() {
        let (matched, by_context) = (count(found.matched, "request"), found.matched_by_context);
        let verdict = if found.agrees() { "agrees" } else { "DOES NOT AGREE" };
        format!(
            "{verdict}: {matched} by their ids, {by_context} without an answer by their context"
        )
    } else {
        "NOTHING WAS COMPARED: no request is in both; does the export cover the time, the region \
         and the account of the key?"
            .to_owned()
    });
    lines
}

fn request(excused: &Excused) -> String {
    let id = excused.request_id.as_deref().unwrap_or("none");
    format!("    {}  {}, request {id}", excused.at, excused.operation)
}

fn cloud_event(event: &CloudEvent) -> String {
    let CloudEvent { at, operation, request_id, principal, .. } = event;
    let error = event.error.as_deref().map(|error| format!(", {error}")).unwrap_or_default();
    format!("{at}  {operation} by {principal}, request {request_id}{error}")
}

fn count(n: impl Display, one: &str) -> String {
    let n = n.to_string();
    let plural = if n == "1" { "" } else { "s" };
    format!("{n} {one}{plural}")
}

#[cfg(test)]
mod tests {
    use crate::audit::chain::Hash;
    use crate::audit::verify::{Anchor, Finding, Wrong};

    use super::*;

    #[test]
    fn one_is_one_and_a_range_says_what_it_is_a_range_of() {
        let last = Some(Anchor { seq: 1, hash: Hash::default() });
        let mut report = Report { files: 1, records: 1, first: Some(1), last, ..Report::default() };
        assert_eq!(verdict(&report)[0], "intact: 1 record from 1 to 1, in 1 file");
        let (file, what) = ("f".to_owned(), "w".to_owned());
        report.findings.push(Finding { file, line: 1, wrong: Wrong::Torn, what });
        let last = verdict(&report).pop().unwrap();
        assert!(last.starts_with("NOT INTACT: 1 finding; what fits: 1 record"), "{last}");
    }

    #[test]
    fn what_is_explained_away_is_listed_and_many_are_counted() {
        let excused = |n: usize| Excused {
            at: jiff::Timestamp::UNIX_EPOCH,
            operation: "Decrypt".to_owned(),
            request_id: Some(format!("id-{n}")),
            seq: None,
        };
        let why = "in CloudTrail alone: the daemon crashed before it wrote it".to_owned();
        let explained = [(why, (0..LISTED + 2).map(excused).collect())].into();
        let lines = comparison(&Comparison { explained, ..Comparison::default() });
        assert!(lines.iter().any(|line| line.contains("id-0")), "{lines:#?}");
        assert!(lines.iter().any(|line| line.contains("and 2 more")), "{lines:#?}");
        assert!(lines.last().unwrap().starts_with("NOTHING WAS COMPARED"), "{lines:#?}");
    }
}
