//! byokd.toml(5): what docs/configuration.md says, as a manual page.

use std::collections::BTreeSet;

use roff::{Inline, Roff, bold, italic, roman};

use super::{first_column, read, section};

/// Its name among the manual pages.
pub(super) const FILE: &str = "byokd.toml.5";

/// What byokd(8) has already.
const ELSEWHERE: &str = "## The command line of byokd";

/// The page.
pub(super) fn page() -> String {
    let text = read("docs/configuration.md");
    let text = text.replace(&format!("{ELSEWHERE}{}", section(&text, ELSEWHERE)), "");
    let mut page = Roff::new();
    let source = concat!("byokd ", env!("CARGO_PKG_VERSION"));
    page.control("TH", ["byokd.toml", "5", "", source, "byokd"]);
    page.control("SH", ["NAME"]);
    page.text([roman("byokd.toml, volumes.d - settings of byokd, and definitions of its volumes")]);
    let mut lines = text.lines().peekable();
    while let Some(line) = lines.next() {
        if line.is_empty() {
        } else if line.starts_with("# ") {
            page.control("SH", ["DESCRIPTION"]);
        } else if let Some(heading) = line.strip_prefix("## ") {
            page.control("SH", [heading]);
        } else if let Some(heading) = line.strip_prefix("### ") {
            page.control("SS", [heading.replace('`', "").as_str()]);
        } else if line.starts_with("```") {
            let example: Vec<_> = lines.by_ref().take_while(|line| *line != "```").collect();
            page.control("PP", []).control("EX", []);
            page.text([roman(example.join("\n"))]).control("EE", []);
        } else if line.starts_with("| ") {
            let titles = cells(line);
            let _ruler = lines.next();
            while let Some(row) = lines.next_if(|line| line.starts_with("| ")) {
                setting(&mut page, &titles, &cells(row));
            }
        } else {
            let mut paragraph = line.to_owned();
            while let Some(more) = lines.next_if(|line| !line.is_empty() && !line.starts_with('|'))
            {
                paragraph = paragraph + "\n" + more;
            }
            page.control("PP", []);
            page.text(inlines(&paragraph));
        }
    }
    page.control("SH", ["FILES"]);
    for (file, what) in [
        ("/etc/byokd/byokd.toml", "The settings."),
        ("/etc/byokd/volumes.d/NAME.toml", "The definition of the volume NAME."),
        ("/usr/share/doc/byokd/docs", "The documents that are named here."),
    ] {
        page.control("TP", []).text([roman(file)]).text([roman(what)]);
    }
    page.render()
}

fn cells(row: &str) -> Vec<&str> {
    row.trim_matches('|').split(" | ").map(str::trim).collect()
}

/// A row of a table of settings.
fn setting(page: &mut Roff, titles: &[&str], row: &[&str]) {
    let cell = |title: &str| {
        let at = titles.iter().position(|one| *one == title);
        row[at.unwrap_or_else(|| panic!("no column {title}: {titles:?}"))]
    };
    let default = match cell("default") {
        "required" => "required".to_owned(),
        default => format!("default: {default}"),
    };
    let mut tag = inlines(cell("key"));
    tag.extend(inlines(&format!(" ({}; {default})", cell("type"))));
    page.control("TP", []).text(tag).text(inlines(cell("meaning")));
}

/// Text with code, stress and links, whose words stay.
fn inlines(text: &str) -> Vec<Inline> {
    let (mut parts, mut plain, mut rest) = (Vec::new(), String::new(), text);
    while let Some(c) = rest.chars().next() {
        let of_link = (c == '[').then(|| rest[1..].split_once("](")).flatten();
        let of_link = of_link.filter(|(words, _)| !words.contains(['[', ']']));
        let between = |mark: char| (c == mark).then(|| rest[1..].split_once(mark)).flatten();
        let (part, after) = if let Some((words, after)) = of_link {
            (inlines(words), after.split_once(')').unwrap().1)
        } else if let Some((code, after)) = between('`') {
            (vec![bold(code)], after)
        } else if let Some((stressed, after)) = between('*') {
            (vec![italic(stressed)], after)
        } else {
            plain.push(c);
            rest = &rest[c.len_utf8()..];
            continue;
        };
        if !plain.is_empty() {
            parts.push(roman(std::mem::take(&mut plain)));
        }
        parts.extend(part);
        rest = after;
    }
    if !plain.is_empty() {
        parts.push(roman(plain));
    }
    parts
}

#[test]
fn every_setting_is_on_the_page_of_the_settings() {
    let document = read("docs/configuration.md");
    let mut wanted = first_column(section(&document, "## byokd.toml"));
    wanted.extend(first_column(section(&document, "## volumes.d/NAME.toml")));
    assert!(wanted.len() > 40, "{wanted:?}");
    let page = page();
    let tags: BTreeSet<_> = page
        .split("\n.TP\n\\fB")
        .skip(1)
        .map(|rest| rest.split("\\fR").next().unwrap().replace("\\-", "-"))
        .collect();
    assert_eq!(tags, wanted);
    assert!(!page.contains("](") && !page.contains("**"), "no Markdown is left: {page}");
}
