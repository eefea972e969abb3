//! How volumes are shown to people: what is wrong first, then a line for each, or all of one.

use std::collections::BTreeMap;

use crate::cli::lines::{Lines, line};
use crate::control::{DeviceRequests, DeviceStatus, Problem, VolumeState, VolumeStatus};
use crate::kms::trouble::unverified;

/// The least width for notes, however narrow the terminal is.
const NARROWEST_NOTE: usize = 20;

/// How wide lines may be, and how many of them there may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Room {
    /// In characters.
    pub(super) width: usize,
    /// In lines as the terminal shows them, where what is longer takes several.
    pub(super) height: usize,
}

impl Room {
    /// Of what is no terminal.
    pub(super) const ENDLESS: Self = Self { width: usize::MAX, height: usize::MAX };

    fn takes(self, line: &str) -> usize {
        line.chars().count().div_ceil(self.width.max(1)).max(1)
    }

    /// How many of these, from the first on, have room.
    fn holds(self, lines: &[String]) -> usize {
        let mut taken = 0usize;
        let fits = |line: &&String| {
            taken = taken.saturating_add(self.takes(line));
            taken <= self.height
        };
        lines.iter().take_while(fits).count()
    }

    /// Takes away what there is no room for, and room for a line about that; how many are left, if
    /// any had to go.
    fn cut(self, lines: &mut Lines) -> Option<usize> {
        if self.holds(lines.each()) == lines.each().len() {
            return None;
        }
        let left = Self { height: self.height.saturating_sub(1), ..self }.holds(lines.each());
        lines.truncate(left);
        Some(left)
    }

    /// What is left beside these.
    fn beside(self, lines: &Lines) -> Self {
        let taken = lines.each().iter().map(|line| self.takes(line)).sum();
        Self { height: self.height.saturating_sub(taken), ..self }
    }
}

/// All that was asked for, as lines.
pub(super) fn status(volumes: &[VolumeStatus], problems: &[Problem], room: Room) -> Lines {
    let mut lines = Lines::default();
    tell_problems(&mut lines, problems);
    match volumes {
        [] => lines.push("There are no volumes. Make one with `byokctl volume create`."),
        [one] => {
            let mut all = detail(one);
            let count = all.each().len();
            if let Some(shown) = room.beside(&lines).cut(&mut all) {
                all.push(format_args!(
                    "… and {} more lines, for which there is no room",
                    count - shown
                ));
            }
            lines.append(all);
        }
        several => {
            lines.push(summary(several));
            lines.append(table(several, room.beside(&lines)));
        }
    }
    lines
}

/// What is wrong with the daemon as a whole.
fn tell_problems(lines: &mut Lines, problems: &[Problem]) {
    for problem in problems {
        lines.push(format_args!("PROBLEM since {}: {}", problem.at, problem.why));
        lines.push(format_args!("  do: {}", problem.remedy));
    }
}

/// What whoever reads line after line has been shown.
#[derive(Default)]
pub(super) struct Shown {
    volumes: Option<BTreeMap<String, String>>,
    problems: Vec<String>,
    silent: Option<String>,
}

impl Shown {
    /// What has changed since: of each volume that is another way, all of it. First all there is,
    /// and also after a silence.
    pub(super) fn news(&mut self, volumes: &[VolumeStatus], problems: &[Problem]) -> Lines {
        let now = volumes.iter().map(|volume| (volume.name.clone(), gist(volume))).collect();
        let problems_now = problems.iter().map(|problem| problem.why.clone()).collect();
        let known = match (self.silent.take(), self.volumes.replace(now)) {
            (None, Some(known)) => known,
            (_, _) => {
                self.problems = problems_now;
                return status(volumes, problems, Room::ENDLESS);
            }
        };
        let mut news = Lines::default();
        if self.problems != problems_now {
            tell_problems(&mut news, problems);
            if problems.is_empty() {
                news.push("Nothing is wrong with the daemon any more.");
            }
            self.problems = problems_now;
        }
        let changed = |volume: &&VolumeStatus| known.get(&volume.name) != Some(&gist(volume));
        let changed: Vec<_> = volumes.iter().filter(changed).collect();
        match (volumes, &changed[..]) {
            ([_], [one]) => news.append(detail(one)),
            (_, changed) => {
                let width = name_width(volumes);
                for volume in changed {
                    news.push(row(volume, width, usize::MAX));
                }
            }
        }
        for name in known.keys().filter(|name| volumes.iter().all(|v| v.name != **name)) {
            news.push(format_args!("{name}  is not known any more"));
        }
        if !news.each().is_empty() && volumes.len() > 1 {
            news.push(summary(volumes));
        }
        news
    }

    /// Whether it is news that there is no answer, for this reason.
    pub(super) fn falls_silent(&mut self, why: &str) -> bool {
        let news = self.silent.as_deref() != Some(why);
        self.silent = Some(why.to_owned());
        news
    }
}

/// How a volume is, without what is another with each probe: times, and the ids of requests.
fn gist(volume: &VolumeStatus) -> String {
    let said = volume.lease.as_ref().and_then(|lease| lease.evidence.as_ref());
    let said = said.filter(|_| volume.trouble.is_some()).map(|said| (&said.code, &said.message));
    let trouble = volume.trouble.as_ref().map(|t| (&t.cause, &t.effect, &t.remedy));
    let lease = volume.lease.as_ref().map(|lease| &lease.state);
    let device = volume.device.as_ref().map(|device| (&device.requests, &device.recover));
    format!(
        "{:?}",
        (
            (state(volume), lease, said, trouble, &volume.header_note),
            (volume.size, &volume.key, volume.connections, device, &volume.at_next_attach),
        )
    )
}

fn state(volume: &VolumeStatus) -> &'static str {
    match volume.state {
        // It is being tried again: that is no news until it is served.
        VolumeState::Detached | VolumeState::Attaching if volume.problem.is_some() => "NOT SERVED",
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
        VolumeState::Detached | VolumeState::Attaching if volume.trouble.is_some() => 1,
        VolumeState::Unverified => 2,
        VolumeState::Serving if volume.trouble.is_some() => 3,
        VolumeState::Attaching | VolumeState::Detaching => 4,
        VolumeState::Serving => 5,
        VolumeState::Detached => 6,
    }
}

/// How many are how, in the order of the table.
fn summary(volumes: &[VolumeStatus]) -> String {
    format!("{} volumes: {}", volumes.len(), counts(volumes.iter()))
}

fn counts<'a>(volumes: impl Iterator<Item = &'a VolumeStatus>) -> String {
    let mut counts: Vec<(u8, String, usize)> = Vec::new();
    for volume in volumes {
        let (urgency, mut state) = (urgency(volume), state(volume).to_owned());
        if let (VolumeState::Unverified, Some(lease)) = (volume.state, &volume.lease) {
            state += &format!(" ({})", unverified(lease.verdict));
        }
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
    counts.join(", ")
}

/// A line for each volume there is room for: what is wrong comes first, and stays.
fn table(volumes: &[VolumeStatus], room: Room) -> Lines {
    let width = name_width(volumes);
    let mut volumes: Vec<_> = volumes.iter().collect();
    // They come by name, and stay so among equals.
    volumes.sort_by_key(|volume| urgency(volume));
    let mut lines = Lines::default();
    lines.push(format_args!(
        "{:width$}  {:10}  {:13}  {:>9}  {:>5}  NOTE",
        "VOLUME", "STATE", "PURPOSE", "SIZE", "CONNS"
    ));
    for volume in &volumes {
        lines.push(row(volume, width, room.width));
    }
    if let Some(shown) = room.cut(&mut lines) {
        let rest = volumes.get(shown.saturating_sub(1)..).unwrap_or_default();
        let more = counts(rest.iter().copied());
        lines.push(format_args!("… and {} more, for which there is no room: {more}", rest.len()));
    }
    lines
}

fn name_width(volumes: &[VolumeStatus]) -> usize {
    volumes.iter().map(|v| v.name.chars().count()).max().unwrap_or(0).max(6)
}

/// A volume on a line, which is no longer than this if that can be.
fn row(volume: &VolumeStatus, name_width: usize, line_width: usize) -> String {
    let purpose = volume.purpose.map(|p| p.as_str()).unwrap_or("-");
    let before = format!(
        "{:name_width$}  {:10}  {purpose:13}  {:>9}  {:>5}  ",
        volume.name,
        state(volume),
        volume.size.map(size).unwrap_or_else(|| "-".to_owned()),
        volume.connections,
    );
    let room = line_width.saturating_sub(before.chars().count()).max(NARROWEST_NOTE);
    // As it is shown: escapes are longer than what they stand for.
    let note: String = line(note(volume)).chars().take(room).collect();
    format!("{before}{note}").trim_end().to_owned()
}

/// What there is to say: how long it is served yet, if that may end, and what shows why.
fn note(volume: &VolumeStatus) -> String {
    let Some(trouble) = &volume.trouble else {
        return volume.header_note.clone().unwrap_or_default();
    };
    let served = matches!(volume.state, VolumeState::Serving | VolumeState::Unverified);
    match volume.lease.as_ref().and_then(|lease| lease.remaining).filter(|_| served) {
        Some(left) => format!("fenced in {}: {}", span(left), trouble.evidence),
        None => trouble.evidence.clone(),
    }
}

/// Seconds, for people.
fn span(seconds: u64) -> String {
    match (seconds / 3600, seconds / 60) {
        (0, 0) => format!("{seconds} s"),
        (0, minutes) => format!("{minutes} min {} s", seconds % 60),
        (hours, minutes) => format!("{hours} h {} min", minutes % 60),
    }
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
pub(super) fn detail(volume: &VolumeStatus) -> Lines {
    let mut lines = Lines::default();
    lines.push(format_args!("{}: {}: {}", volume.name, state(volume), volume.headline));
    let mut line = |name: &str, value: &str| lines.push(format_args!("  {name:<12} {value}"));
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
    lines
}

/// Those that had errors.
fn clients(volume: &VolumeStatus, line: &mut impl FnMut(&str, &str)) {
    for client in volume.clients.iter().filter(|client| client.failed_requests > 0) {
        let program = client.program.as_deref().unwrap_or("a client of another machine");
        let pid = client.pid.map(|pid| format!(" (pid {pid})")).unwrap_or_default();
        let errors = client.failed_requests;
        let requests = if errors == 1 { "request" } else { "requests" };
        let what = "failed; a file system on it has to be mounted anew";
        line("had errors", &format!("{program}{pid}: {errors} {requests} {what}"));
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
    match (lease.fence_ms, lease.fence_reason) {
        (Some(millis), _) => {
            let what = "from the first denial to the key's destruction";
            line("last fence", &format!("{millis} ms {what}"));
        }
        (None, Some(reason)) => line("last fence", reason.explain()),
        (None, None) => {}
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
        let shown = status(&volumes, &[], Room::ENDLESS);
        let mut lines = shown.each().iter().map(String::as_str);
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
        for line in table(&volumes, Room { width: 80, height: usize::MAX }).each() {
            assert!(line.chars().count() <= 80, "{line}");
        }
        let all = table(&volumes, Room::ENDLESS).text();
        assert!(all.contains("DisabledException: it is disabled."));
    }

    #[test]
    fn nothing_that_anybody_says_is_acted_upon_or_forges_a_line() {
        let mut volume = volume("y", "fenced", true);
        let said = "no\u{1b}[2J\u{1b}[H3 volumes: 3 serving\nzeebe-0  serving\u{202e}\u{2028}x";
        let trouble = volume.trouble.as_mut().unwrap();
        trouble.evidence = said.to_owned();
        trouble.remedy = said.to_owned();
        volume.headline = said.to_owned();
        volume.header_note = Some(said.to_owned());
        volume.backing = said.into();
        volume.context = serde_json::from_value(serde_json::json!({"tenant": said})).unwrap();
        let harmless = |lines: Lines, count: usize| {
            let text = lines.text();
            assert_eq!(text.lines().count(), count, "{text}");
            for hidden in ['\u{1b}', '\u{202e}', '\u{2028}'] {
                assert!(!text.contains(hidden), "{text}");
            }
            assert!(text.contains(r"no\u{1b}[2J\u{1b}[H3 volumes: 3 serving\nzeebe-0  serving"));
        };
        let count = detail(&volume).each().len();
        harmless(detail(&volume), count);
        let two = [volume.clone(), volume];
        harmless(status(&two, &[], Room::ENDLESS), 4);
        let problem =
            Problem { at: "now".to_owned(), why: said.to_owned(), remedy: said.to_owned() };
        harmless(status(&two, &[problem], Room::ENDLESS), 6);
        for line in table(&two, Room { width: 80, height: usize::MAX }).each() {
            assert!(line.chars().count() <= 80, "{line}");
        }
    }

    #[test]
    fn where_there_is_no_room_what_is_wrong_stays_and_the_rest_is_counted() {
        let mut volumes: Vec<_> =
            (0..60).map(|n| volume(&format!("a{n:02}"), "serving", false)).collect();
        volumes.extend([volume("x", "unverified", true), volume("y", "fenced", true)]);
        let room = Room { width: 80, height: 24 };
        let problem =
            Problem { at: "now".to_owned(), why: "w".repeat(200), remedy: "r".to_owned() };
        for problems in [&[][..], &[problem]] {
            let shown = status(&volumes, problems, room);
            assert_eq!(room.holds(shown.each()), shown.each().len(), "{}", shown.text());
            let text = shown.text();
            assert!(text.contains("\ny  ") && text.contains("\nx  "), "{text}");
            assert!(text.contains("62 volumes: 1 FENCED"), "{text}");
            let rows = text.lines().filter(|line| line.contains("serving  ")).count();
            let last = format!("… and {} more, for which there is no room: {0} serving", 60 - rows);
            assert_eq!(text.lines().last(), Some(last.as_str()));
        }
        let many: Vec<_> = (0..30).map(|n| volume(&format!("f{n}"), "fenced", true)).collect();
        let text = status(&many, &[], Room { width: 80, height: 10 }).text();
        assert!(text.ends_with("… and 23 more, for which there is no room: 23 FENCED\n"), "{text}");
        let one = [volume("y", "fenced", true)];
        let text = status(&one, &[], Room { width: 80, height: 4 }).text();
        assert!(text.starts_with("y: FENCED: a cause\n") && text.lines().count() == 4, "{text}");
        assert!(text.ends_with("more lines, for which there is no room\n"), "{text}");
        assert_eq!(status(&volumes, &[], Room { width: 80, height: 64 }).each().len(), 64);
    }

    fn leased(state: &str, lease: &serde_json::Value) -> VolumeStatus {
        let mut all = serde_json::json!({
            "state": "unverified", "since": "s", "last_success": "l", "allowance_left": 1183,
            "verdict": "unavailable", "remaining": 1183,
            "evidence": {"at": "now", "code": "Timeout", "message": "m", "request_id": "r1",
                         "verdict": "unavailable", "remedy": "wait"},
        });
        all.as_object_mut().unwrap().extend(lease.as_object().unwrap().clone());
        let mut volume = volume("v", state, true);
        volume.lease = Some(serde_json::from_value(all).unwrap());
        volume
    }

    #[test]
    fn whoever_is_served_without_a_verdict_is_told_why_and_for_how_long() {
        let silent = leased("unverified", &serde_json::json!({}));
        let ours = leased("unverified", &serde_json::json!({"verdict": "credentials"}));
        let text = status(&[silent, ours], &[], Room::ENDLESS).text();
        let counts = "2 volumes: 1 unverified (KMS gives no verdict), \
                      1 unverified (byokd's own credentials fail)";
        assert!(text.starts_with(counts), "{text}");
        assert_eq!(text.matches("fenced in 19 min 43 s: Disabled").count(), 2, "{text}");
    }

    #[test]
    fn the_last_fence_is_told_with_what_led_to_it() {
        let last = |lease: serde_json::Value| {
            let lines = detail(&leased("fenced", &lease));
            lines.each().iter().find(|line| line.contains("last fence")).cloned()
        };
        let denied = last(serde_json::json!({"fence_ms": 512, "fence_reason": "denied"})).unwrap();
        assert!(denied.ends_with("512 ms from the first denial to the key's destruction"));
        let expired = last(serde_json::json!({"fence_reason": "expired"})).unwrap();
        assert!(expired.ends_with("longer than the outage allowance"), "{expired}");
        assert_eq!(last(serde_json::json!({})), None);
    }

    #[test]
    fn who_reads_line_after_line_is_told_what_has_changed_and_nothing_twice() {
        let mut shown = Shown::default();
        let serving = volume("w", "serving", false);
        let first = [leased("unverified", &serde_json::json!({})), serving.clone()];
        assert_eq!(shown.news(&first, &[]).each().len(), 4, "all there is");
        let mut probed = first[0].clone();
        let lease = probed.lease.as_mut().unwrap();
        (lease.remaining, lease.allowance_left) = (Some(1173), Some(1173));
        let said = lease.evidence.as_mut().unwrap();
        (said.request_id, said.at) = (Some("r2".to_owned()), "later".to_owned());
        probed.trouble.as_mut().unwrap().evidence = "another id".to_owned();
        assert_eq!(shown.news(&[probed.clone(), serving.clone()], &[]), Lines::default());
        let fenced = leased("fenced", &serde_json::json!({"state": "expired"}));
        let news = shown.news(&[fenced.clone(), serving.clone()], &[]).text();
        assert_eq!(news.lines().count(), 2, "{news}");
        assert!(news.starts_with("v       FENCED") && news.contains("1 FENCED, 1 serving"));
        assert!(shown.falls_silent("gone") && !shown.falls_silent("gone"));
        let all = shown.news(&[fenced, serving.clone()], &[]);
        assert_eq!(all.each().len(), 4, "all there is, after a silence");
        let news = shown.news(&[serving], &[]).text();
        assert!(news.starts_with("v  is not known any more"), "{news}");
    }

    #[test]
    fn a_volume_that_is_tried_again_is_no_other_way_until_it_is_served() {
        let mut tried = volume("y", "attaching", true);
        assert_eq!(state(&tried), "attaching");
        let (at, why, remedy) = ("t".to_owned(), "w".to_owned(), "r".to_owned());
        tried.problem = Some(Problem { at, why, remedy });
        let failed = VolumeStatus { state: VolumeState::Detached, ..tried.clone() };
        assert_eq!(state(&tried), "NOT SERVED");
        assert_eq!(row(&tried, 6, usize::MAX), row(&failed, 6, usize::MAX));
        assert_eq!((urgency(&tried), gist(&tried)), (urgency(&failed), gist(&failed)));
    }

    #[test]
    fn what_is_wrong_with_a_volume_stands_at_the_top() {
        let shown = detail(&volume("y", "fenced", true));
        let lines = shown.each();
        assert_eq!(lines[0], "y: FENCED: a cause");
        assert_eq!(lines[2], "  evidence     DisabledException: it is disabled.");
        assert_eq!(lines[4], "  do           a remedy");
    }
}
