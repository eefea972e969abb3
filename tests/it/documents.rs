//! The documents say what is so: links lead somewhere, examples are taken, and every setting,
//! option, JSON member and verdict stands in its table.

mod book;
mod manual;
mod settings_page;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::Duration;

use byokd::cli::args::Args;
use byokd::config;
use byokd::key::lease::{
    DisconnectedStore, FENCE_MARGIN, KeyLease, LeasePolicy, Moment, PROBE_LIMIT, UNCONFIRMED,
};
use byokd::kms::verdict::{Answer, judge};
use clap::CommandFactory;
use serde_json::Value;

use crate::support::{Daemon, until};

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn read(path: &str) -> String {
    std::fs::read_to_string(root().join(path)).unwrap()
}

/// Every document, by its path from the root.
fn documents() -> Vec<PathBuf> {
    let markdown = |dir: &str| {
        let entries = std::fs::read_dir(root().join(dir)).unwrap();
        let names = entries.map(|entry| Path::new(dir).join(entry.unwrap().file_name()));
        names.filter(|path| path.extension().is_some_and(|e| e == "md")).collect::<Vec<_>>()
    };
    ["", "docs", "docs/runbooks", "fuzz", "tests/fixtures/luks2", "vm-tests", "workloads"]
        .into_iter()
        .flat_map(markdown)
        .collect()
}

/// The part of a document under a heading, up to the next of the same level or a higher one.
fn section<'a>(text: &'a str, heading: &str) -> &'a str {
    let level = heading.split(' ').next().unwrap().len();
    let start = text.find(&format!("\n{heading}\n")).unwrap_or_else(|| panic!("no {heading}")) + 1;
    let rest = &text[start + heading.len()..];
    let mut ends = rest.match_indices("\n#").map(|(at, _)| at + 1);
    let of_level = |at: &usize| rest[*at..].chars().take_while(|c| *c == '#').count() <= level;
    ends.find(of_level).map_or(rest, |end| &rest[..end])
}

/// The words in backticks in the first column of all tables of a text.
fn first_column(text: &str) -> BTreeSet<String> {
    let cells = text.lines().filter_map(|line| line.strip_prefix("| ")?.split(" | ").next());
    let words = cells.flat_map(|cell| cell.split('`').skip(1).step_by(2));
    words.map(str::to_owned).collect()
}

/// The anchor that a heading has on a page: small letters, digits, dashes for blanks.
fn anchor(heading: &str) -> String {
    let kept = heading.trim().chars().filter(|c| c.is_alphanumeric() || " -_".contains(*c));
    kept.collect::<String>().to_lowercase().replace(' ', "-")
}

#[test]
fn every_link_leads_somewhere() {
    let mut followed = 0;
    for document in documents() {
        let text = read(document.to_str().unwrap());
        for link in text.split("](").skip(1).filter_map(|rest| rest.split(')').next()) {
            if link.starts_with("http") {
                continue;
            }
            let (path, part) = link.split_once('#').unwrap_or((link, ""));
            let target = match path {
                "" => document.clone(),
                _ => document.parent().unwrap().join(path),
            };
            assert!(root().join(&target).exists(), "{}: {link}", document.display());
            if !part.is_empty() {
                let page = read(target.to_str().unwrap());
                let headings = page.lines().filter(|line| line.starts_with('#'));
                let mut anchors = headings.map(|line| anchor(line.trim_start_matches('#')));
                assert!(anchors.any(|a| a == part), "{}: {link}", document.display());
            }
            followed += 1;
        }
    }
    assert!(followed > 15, "links are found");
}

#[test]
fn the_examples_of_settings_are_taken() {
    let text = read("docs/configuration.md");
    let mut examples =
        text.split("```toml\n").skip(1).map(|rest| rest.split("```").next().unwrap());
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("zeebe-0.toml");
    std::fs::write(&file, examples.next().unwrap()).unwrap();
    config::load(&file).unwrap();
    for _ in 0..3 {
        std::fs::write(&file, examples.next().unwrap()).unwrap();
        config::load_volume(&file).unwrap().unwrap();
    }
    assert_eq!(examples.next(), None, "every example is tried");
    config::load(&root().join("systemd/byokd.toml")).unwrap();
}

#[test]
fn every_setting_is_described() {
    let source = read("src/config/mod.rs") + &read("src/config/volume.rs");
    let fields = |name: &str| {
        let start = source.find(&format!("pub struct {name} {{")).unwrap();
        let body = source[start..].split("\n}").next().unwrap();
        let names =
            body.lines().filter_map(|line| line.strip_prefix("    pub ")?.split(':').next());
        names.map(str::to_owned).collect::<BTreeSet<_>>()
    };
    let text = read("docs/configuration.md");
    let mut top = fields("Config");
    top.remove("kms");
    top.remove("lease");
    top.remove("audit");
    top.remove("http");
    top.remove("log");
    for (heading, written) in [
        ("### `[kms]`", fields("KmsConfig")),
        ("### `[lease]`", fields("LeaseConfig")),
        ("### `[audit]`", fields("AuditConfig")),
        ("### `[http]`", fields("HttpConfig")),
        ("### `[log]`", fields("LogConfig")),
        (
            "## volumes.d/NAME.toml",
            fields("VolumeConfig")
                .into_iter()
                .chain(fields("OnFence"))
                .chain(fields("PurgeConfig"))
                .collect(),
        ),
    ] {
        assert_eq!(first_column(section(&text, heading)), written, "{heading}");
    }
    let whole = section(&text, "## byokd.toml");
    assert_eq!(first_column(whole.split("\n### ").next().unwrap()), top);
}

#[test]
fn every_command_and_option_is_described() {
    fn walk(command: &clap::Command, path: &str, text: &str, seen: &mut usize) {
        for option in command.get_arguments().filter_map(clap::Arg::get_long) {
            assert!(text.contains(&format!("--{option}")), "{path}--{option}");
            *seen += 1;
        }
        for inner in command.get_subcommands().filter(|c| !c.is_hide_set()) {
            let name = inner.get_name();
            // Siblings may share one line: `dev key create | list`.
            let there = text.contains(&format!("`{path}{name}"))
                || text.contains(&format!("--{name}"))
                || text.lines().any(|line| {
                    line.contains(&format!("`{path}")) && line.contains(&format!("| {name}"))
                });
            assert!(there, "{path}{name}");
            *seen += 1;
            walk(inner, &format!("{path}{name} "), text, seen);
        }
    }
    let mut seen = 0;
    walk(&Args::command(), "", &read("docs/cli.md"), &mut seen);
    assert!(seen > 25, "the tree is walked");
}

#[test]
fn every_kind_of_event_is_described() {
    let source = read("src/audit/record.rs");
    let members = |start: &str| {
        let body = &source[source.find(start).unwrap()..];
        body.split("\n}").next().unwrap().to_owned()
    };
    let kinds = members("pub enum Kind {");
    let names = kinds.lines().filter_map(|line| line.trim().strip_suffix(','));
    let kebab = |name: &str| {
        let words = name.chars().flat_map(|c| {
            let dash = c.is_uppercase().then_some('-');
            dash.into_iter().chain(c.to_lowercase())
        });
        words.collect::<String>().trim_start_matches('-').to_owned()
    };
    let kinds: BTreeSet<_> = names.map(kebab).collect();
    let openapi: Value = serde_json::from_str(&read("src/http/openapi.json")).unwrap();
    let record = &openapi["components"]["schemas"]["Record"]["properties"];
    let words = record["event"]["enum"].as_array().unwrap().iter();
    let told: BTreeSet<_> = words.map(|kind| kind.as_str().unwrap().to_owned()).collect();
    assert_eq!(told, kinds, "kinds of events in the OpenAPI description");
    let text = read("docs/audit.md");
    assert_eq!(first_column(section(&text, "## Events")), kinds);
    let fields = members("pub struct Event {") + &members("pub struct Record {");
    let fields = fields.lines().filter_map(|line| line.strip_prefix("    pub ")?.split(':').next());
    let fields: BTreeSet<_> = fields.map(str::to_owned).collect();
    let described = first_column(section(&text, "## A record"));
    assert_eq!(described, fields, "members of a record");
    // `event` stands for itself and for all that is flattened.
    let told: BTreeSet<_> = record.as_object().unwrap().keys().cloned().collect();
    assert_eq!(told, fields, "members of a record in the OpenAPI description");
}

/// Names of the members of an answer, except those that operators chose.
fn members(value: &Value, into: &mut BTreeSet<String>) {
    match value {
        Value::Object(map) => {
            for (name, inner) in map {
                into.insert(name.clone());
                if name != "context" {
                    members(inner, into);
                }
            }
        }
        Value::Array(all) => all.iter().for_each(|inner| members(inner, into)),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
    }
}

#[test]
fn every_member_of_an_answer_is_described() {
    let daemon = Daemon::start();
    let key = daemon.key();
    daemon.volume("v", "8M", &key);
    let mut volume = BTreeSet::new();
    members(&daemon.ok(&["key", "check", &key]), &mut volume);
    daemon.ok(&["dev", "key", "disable", &key]);
    until("the volume is fenced", || daemon.state("v") == "fenced");
    members(&daemon.ok(&["status"]), &mut volume);
    let (code, failed) = daemon.ctl(&["key", "check", &key]);
    assert_eq!(code, 3);
    members(&failed, &mut volume);
    let (code, failed) = daemon.ctl(&["attach", "unknown"]);
    assert_eq!(code, 5);
    members(&failed, &mut volume);
    let text = read("docs/cli.md");
    let text = section(&text, "## JSON");
    for name in &volume {
        assert!(text.contains(&format!("`{name}`")), "{name}");
    }
    let tables = [section(text, "### A volume"), section(text, "### A lease")];
    for name in tables.into_iter().flat_map(first_column) {
        assert!(volume.contains(&name), "{name} is described, and never answered");
    }
}

#[test]
fn every_code_has_the_verdict_that_the_table_says() {
    let text = read("docs/kms.md");
    let rows = section(&text, "## What each answer means").lines();
    let rows = rows.filter_map(|line| line.strip_prefix("| `")?.split_once("` | "));
    // Verdicts have small letters, and rows that say more than a code have blanks.
    let is_code = |(code, _): &(&str, &str)| {
        code.starts_with(char::is_uppercase) && code.chars().all(char::is_alphanumeric)
    };
    let mut read = 0;
    for (code, verdict) in rows.filter(is_code) {
        let answer = Answer::Error { code, message: "", key_state: None };
        let judged = judge(answer, DisconnectedStore::Denied);
        let judged_word = serde_json::to_value(judged.verdict).unwrap();
        assert_eq!(judged_word, verdict.trim_end_matches([' ', '|']), "{code}");
        assert!(judged.known, "{code}");
        read += 1;
    }
    assert!(read > 20, "the table is read");
}

#[test]
fn the_bounds_of_a_fence_are_those_that_the_lease_keeps() {
    let seconds = |time: Duration| format!("{} s", time.as_secs_f64());
    let margin = seconds(FENCE_MARGIN);
    let promise = format!("probe interval and {margin}");
    for (document, words) in [
        ("docs/REVOCATION.md", format!("the {promise}**")),
        ("docs/REVOCATION.md", format!("| within the interval + {margin} |")),
        ("docs/REVOCATION.md", format!("an interval and {} after it", seconds(UNCONFIRMED))),
        ("docs/PROMISES.md", promise.clone()),
        ("docs/kms.md", format!("| i + {margin} | i + {margin} |")),
        ("docs/kms.md", format!("{} for an attempt and for a probe", seconds(PROBE_LIMIT))),
        ("docs/metrics.md", promise.clone()),
        ("docs/runbooks/FenceSlow.md", promise.clone()),
        ("monitoring/alerts.yml", promise.clone()),
        ("monitoring/slo.yml", promise),
    ] {
        // However its lines are broken.
        let text = std::fs::read_to_string(root().join(document)).unwrap();
        let text = text.split_whitespace().filter(|word| *word != "#").collect::<Vec<_>>();
        assert!(text.join(" ").contains(&words), "{document} does not say `{words}`");
    }
    let policy = LeasePolicy::default();
    let asked = Moment(Duration::from_secs(1));
    assert_eq!(KeyLease::new(policy, asked).fenced_within(), policy.interval + FENCE_MARGIN);
}
