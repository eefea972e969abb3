//! How volumes are shown to people: what is wrong first, then a line for each, or all of one.

use std::fmt::Write as _;
use std::io::{IsTerminal, stdout};

use crate::control::{DeviceRequests, DeviceStatus, Problem, VolumeState, VolumeStatus};

/// The least width for notes, however narrow the terminal is.
const NARROWEST_NOTE: usize = 20;

/// Adds a line. Writing to a text cannot fail.
macro_rules! line {
    ($text:expr, $($words:tt)*) => {{
        let _written = writeln!($text, $($words)*);
    }};
}

/// All that was asked for, as lines.
pub(super) fn status(volumes: &[VolumeStatus], problems: &[Problem]) -> String {
    let mut text = String::new();
    for problem in problems {
        line!(text, "PROBLEM since {}: {}", problem.at, problem.why);
        line!(text, "  do: {}", problem.remedy);
    }
    match volumes {
        [] => line!(text, "There are no volumes. Make one with `byokctl volume create`."),
        [one] => text += &detail(one),
        several => {
            line!(text, "{}", summary(several));
            text += &table(several, line_width());
        }
    }
    text
}

/// How wide lines may be: a terminal's width, or as they are.
fn line_width() -> usize {
    let terminal = if stdout().is_terminal() { terminal_size::terminal_size() } else { None };
    terminal.map_or(usize::MAX, |(width, _)| width.0.into())
}

fn state(volume: &VolumeStatus) -> &'static str {
    match volume.state {
        VolumeState::Detached if volume.problem.is_some() => "NOT SERVED",
        VolumeState::Detached => "detached",
        VolumeState::Attaching => "attaching",
        VolumeState::Detaching => "detaching",
        VolumeState::Serving => "serving",
        VolumeState::Unverified => "unverified",
        VolumeState::Fenced => "FENCED",
    }
}

/// Who needs somebody to look comes first.
fn urgency(volume: &VolumeStatus) -> u8 {
    match volume.state {
        VolumeState::Fenced => 0,
        VolumeState::Detached if volume.trouble.is_some() => 1,
        VolumeState::Unverified => 2,
        VolumeState::Serving if volume.trouble.is_some() => 3,
        VolumeState::Attaching | VolumeState::Detaching => 4,
        VolumeState::Serving => 5,
        VolumeState::Detached => 6,
    }
}

/// How many are how, in the order of the table.
fn summary(volumes: &[VolumeStatus]) -> String {
    let mut counts: Vec<(u8, &str, usize)> = Vec::new();
    for volume in volumes {
        let (urgency, state) = (urgency(volume), state(volume));
        match counts.iter_mut().find(|(_, of, _)| *of == state) {
            Some((first, _, count)) => {
                *count += 1;
                *first = urgency.min(*first);
            }
            None => counts.push((urgency, state, 1)),
        }
    }
    counts.sort_unstable();
    let counts: Vec<_> = counts.iter().map(|(_, state, n)| format!("{n} {state}")).collect();
    format!("{} volumes: {}", volumes.len(), counts.join(", "))
}

fn table(volumes: &[VolumeStatus], line_width: usize) -> String {
    let mut text = String::new();
    let width = volumes.iter().map(|v| v.name.len()).max().unwrap_or(0).max(6);
    line!(
        text,
        "{:width$}  {:10}  {:13}  {:>9}  {:>5}  NOTE",
        "VOLUME",
        "STATE",
        "PURPOSE",
        "SIZE",
        "CONNS"
    );
    let mut volumes: Vec<_> = volumes.iter().collect();
    // They come by name, and stay so among equals.
    volumes.sort_by_key(|volume| urgency(volume));
    for volume in volumes {
        let purpose = volume.purpose.map(|p| p.as_str()).unwrap_or("-");
        let note = match &volume.trouble {
            Some(trouble) => trouble.evidence.as_str(),
            None => volume.header_note.as_deref().unwrap_or_default(),
        };
        let before = format!(
            "{:width$}  {:10}  {purpose:13}  {:>9}  {:>5}  ",
            volume.name,
            state(volume),
            volume.size.map(size).unwrap_or_else(|| "-".to_owned()),
            volume.connections,
        );
        let room = line_width.saturating_sub(before.len()).max(NARROWEST_NOTE);
        let note: String = note.chars().take(room).collect();
        line!(text, "{}", format!("{before}{note}").trim_end());
    }
    text
}

fn size(bytes: u64) -> String {
    let units = [(40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")];
    for (shift, unit) in units {
        let whole = 1u64 << shift;
        if bytes >= whole {
            let tenths = bytes / (whole / 10).max(1);
            return if bytes.is_multiple_of(whole) {
                format!("{} {unit}", bytes / whole)
            } else {
                format!("{}.{} {unit}", tenths / 10, tenths % 10)
            };
        }
    }
    format!("{bytes} B")
}

/// All that is known of a volume, as lines.
pub(super) fn detail(volume: &VolumeStatus) -> String {
    let mut text = String::new();
    line!(text, "{}: {}: {}", volume.name, state(volume), volume.headline);
    let mut line = |name: &str, value: &str| line!(text, "  {name:<12} {value}");
    if let Some(trouble) = &volume.trouble {
        line("cause", &trouble.cause);
        line("evidence", &trouble.evidence);
        line("effect", &trouble.effect);
        line("do", &trouble.remedy);
    }
    if let Some(purpose) = volume.purpose {
        line("purpose", purpose.as_str());
    }
    if let (Some(bytes), Some(sector)) = (volume.size, volume.sector_size) {
        let mode = if volume.read_only { ", read-only" } else { "" };
        let (of, sector) = (size(bytes), sector.bytes());
        line("size", &format!("{of} ({bytes} bytes), sectors of {sector}{mode}"));
    }
    line("backing", &volume.backing.display().to_string());
    if let Some(uuid) = volume.uuid {
        line("uuid", &uuid.to_string());
    }
    if let Some(key) = &volume.key {
        line("key", key.as_str());
    }
    if let Some(context) = &volume.context {
        let pairs: Vec<_> = context.pairs().iter().map(|(k, v)| format!("{k}={v}")).collect();
        line("context", &pairs.join(" "));
    }
    if let Some(note) = &volume.header_note {
        line("header", note);
    }
    if let Some(uri) = &volume.uri {
        line("uri", uri);
        line("connections", &volume.connections.to_string());
    }
    if !volume.at_next_attach.is_empty() {
        line("at next attach", &format!("its new {}", volume.at_next_attach.join(", ")));
    }
    clients(volume, &mut line);
    if let Some(device) = &volume.device {
        device_lines(device, &mut line);
    }
    lease(volume, &mut line);
    text
}

/// Those that had errors.
fn clients(volume: &VolumeStatus, line: &mut impl FnMut(&str, &str)) {
    for client in volume.clients.iter().filter(|client| client.failed_requests > 0) {
        let program = client.program.as_deref().unwrap_or("a client of another machine");
        let pid = client.pid.map(|pid| format!(" (pid {pid})")).unwrap_or_default();
        let errors = client.failed_requests;
        line(
            "had errors",
            &format!("{program}{pid}, {errors}: a file system on it has to be mounted anew"),
        );
    }
}

fn device_lines(device: &DeviceStatus, line: &mut impl FnMut(&str, &str)) {
    let requests = match device.requests {
        DeviceRequests::Served => "requests are served",
        DeviceRequests::Wait => "requests wait for the key",
        DeviceRequests::Refused => "requests are answered with errors",
    };
    let (path, link) = (&device.path, &device.link);
    line("device", &format!("{path} ({link}), {requests}"));
    for step in &device.purge {
        let done = if step.done { "done" } else { "not all done" };
        let details = step.details.join("; ");
        let details = if details.is_empty() { details } else { format!(": {details}") };
        line("purge", &format!("{} {done}{details} ({})", step.step, step.at));
    }
    for (point, command) in device.damaged_mounts.iter().zip(&device.recover) {
        let what = format!("the file system on {point} saw errors and has to be mounted anew");
        line("damaged", &what);
        line("do", command);
    }
}

fn lease(volume: &VolumeStatus, line: &mut impl FnMut(&str, &str)) {
    let Some(lease) = &volume.lease else { return };
    line("lease", &format!("{} since {}", lease.state, lease.since));
    if let Some(last) = &lease.last_success {
        line("last success", last);
    }
    if let Some(left) = lease.allowance_left {
        line("allowance", &format!("{left} s left, then the volume is fenced"));
    }
    if let Some(left) = lease.held_for {
        line("held", &format!("requests wait for the key, {left} s more, then they fail"));
    }
    if let Some(millis) = lease.fence_ms {
        line("last fence", &format!("{millis} ms from the first denial to the key's destruction"));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn volume(name: &str, state: &str, trouble: bool) -> VolumeStatus {
        let trouble = trouble.then(|| {
            serde_json::json!({
                "cause": "a cause", "evidence": "DisabledException: it is disabled.",
                "effect": "an effect", "remedy": "a remedy",
            })
        });
        serde_json::from_value(serde_json::json!({
            "name": name, "state": state, "backing": "/b", "read_only": false, "connections": 1,
            "clients": [], "failed_requests": 0, "io": {}, "headline": "a cause",
            "trouble": trouble,
        }))
        .unwrap()
    }

    #[test]
    fn of_a_hundred_volumes_those_with_trouble_come_first() {
        let mut volumes: Vec<_> =
            (0..97).map(|n| volume(&format!("a{n:02}"), "serving", false)).collect();
        volumes.push(volume("x", "unverified", true));
        volumes.push(volume("y", "fenced", true));
        volumes.push(volume("z", "detached", false));
        let text = status(&volumes, &[]);
        let mut lines = text.lines();
        let summary = "100 volumes: 1 FENCED, 1 unverified, 97 serving, 1 detached";
        assert_eq!(lines.next(), Some(summary));
        assert!(lines.next().unwrap().starts_with("VOLUME"));
        let names: Vec<_> = lines.map(|line| line.split(' ').next().unwrap()).collect();
        assert_eq!(names.len(), 100);
        assert_eq!((&names[..3], names[99]), (&["y", "x", "a00"][..], "z"));
    }

    #[test]
    fn a_line_is_no_wider_than_the_terminal() {
        let volumes = [volume("y", "fenced", true), volume("z", "serving", false)];
        for line in table(&volumes, 80).lines() {
            assert!(line.len() <= 80, "{line}");
        }
        assert!(table(&volumes, usize::MAX).contains("DisabledException: it is disabled."));
    }

    #[test]
    fn what_is_wrong_with_a_volume_stands_at_the_top() {
        let text = detail(&volume("y", "fenced", true));
        let lines: Vec<_> = text.lines().collect();
        assert_eq!(lines[0], "y: FENCED: a cause");
        assert_eq!(lines[2], "  evidence     DisabledException: it is disabled.");
        assert_eq!(lines[4], "  do           a remedy");
    }
}
