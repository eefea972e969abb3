//! Manual pages and shell completions: written from the command lines themselves and the document of
//! the settings, kept in the tree, and current.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::{Command as Process, Stdio};

use byokd::cli::args::Args;
use byokd::{daemon, kernel};
use clap::{Command, CommandFactory};
use clap_complete::Shell;
use clap_mangen::Man;

use super::{read, root, section, settings_page};
use crate::support::{have, run};

/// Makes the tests write what they would compare.
const WRITE: &str = "BYOKD_WRITE_MANUAL";

#[test]
fn the_pages_are_current() {
    let mut pages = BTreeMap::new();
    add_pages(&Args::command(), "1", &mut pages);
    add_pages(&daemon::args::Args::command(), "8", &mut pages);
    add_pages(&kernel::args::Args::command(), "8", &mut pages);
    pages.insert(settings_page::FILE.to_owned(), settings_page::page() + SEE_ALSO);
    assert!(pages.len() > 25, "the tree is walked");
    assert_current("docs/man", &pages);
    if !have(&["groff"]) {
        return;
    }
    for (name, page) in &pages {
        let file = root().join("docs/man").join(name);
        let said = Process::new("groff")
            .args(["-man", "-Kutf8", "-Tutf8", "-ww", "-z"])
            .arg(&file)
            .output()
            .unwrap();
        assert!(said.status.success() && said.stderr.is_empty(), "{name}: {said:?}\n{page}");
    }
}

#[test]
fn the_completions_are_current() {
    let mut files = BTreeMap::new();
    for command in [Args::command(), daemon::args::Args::command()] {
        let name = command.get_name().to_owned();
        for (shell, file) in [
            (Shell::Bash, name.clone()),
            (Shell::Zsh, format!("_{name}")),
            (Shell::Fish, format!("{name}.fish")),
        ] {
            let mut text = Vec::new();
            clap_complete::generate(shell, &mut visible(&command), &name, &mut text);
            files.insert(file, String::from_utf8(text).unwrap());
        }
    }
    assert_current("packaging/completions", &files);
    // What bash would offer.
    let offered = |words: &[&str]| {
        let (last, before) = (words.len() - 1, words.len() - 2);
        let script = format!(
            "source packaging/completions/byokctl; COMP_WORDS=({}); COMP_CWORD={last}; \
             _byokctl byokctl '{}' '{}'; printf '%s ' \"${{COMPREPLY[@]}}\"",
            words.join(" "),
            words[last],
            words[before],
        );
        run(Process::new("bash").args(["-euc", &script]).current_dir(root()).stdin(Stdio::null()))
    };
    assert_eq!(offered(&["byokctl", "volume", "cr"]).trim(), "create");
    assert!(offered(&["byokctl", "attach", "--"]).contains("--read-only"));
    assert_eq!(offered(&["byokctl", "s"]).trim(), "status");
}

/// A command without what is hidden, which completions would offer.
fn visible(command: &Command) -> Command {
    let inner = command.get_subcommands().filter(|inner| !inner.is_hide_set()).map(visible);
    let mut copy = Command::new(&*command.get_name().to_owned().leak())
        .args(command.get_arguments().cloned())
        .subcommands(inner)
        .disable_help_subcommand(true);
    if let Some(about) = command.get_about() {
        copy = copy.about(about.clone());
    }
    if command.get_version().is_some() {
        copy = copy.version(env!("CARGO_PKG_VERSION"));
    }
    copy
}

/// A command's page and those of what is below it, by their files' names.
fn add_pages(command: &Command, section: &str, into: &mut BTreeMap<String, String>) {
    let mut command = command.clone().disable_help_subcommand(true);
    command.build();
    add_built_pages(&command, section, into);
}

fn add_built_pages(command: &Command, section: &str, into: &mut BTreeMap<String, String>) {
    for inner in command.get_subcommands().filter(|inner| !inner.is_hide_set()) {
        add_built_pages(inner, section, into);
    }
    let source = concat!("byokd ", env!("CARGO_PKG_VERSION"));
    let page = Man::new(command.clone()).section(section).source(source).manual("byokd");
    let mut text = Vec::new();
    page.render(&mut text).unwrap();
    let text = String::from_utf8(text).unwrap() + &more(command.get_name());
    into.insert(page.get_filename(), text);
}

/// What the command line does not know of itself.
fn more(command: &str) -> String {
    let mut text = String::new();
    if command == "byokctl" {
        text += ".SH \"EXIT STATUS\"\n";
        let cli = read("docs/cli.md");
        for row in section(&cli, "## Exit codes").lines().filter(|line| line.starts_with("| ")) {
            let cells: Vec<_> = row.split('|').map(str::trim).collect();
            if let Ok(code) = cells[1].parse::<u8>() {
                text += &format!(".TP\n{code}\n{}\n", cells[3]);
            }
        }
    }
    if command == "byokd" {
        text += ".SH FILES\n.TP\n/etc/byokd/byokd.toml\nSettings.\n\
                 .TP\n/etc/byokd/volumes.d/NAME.toml\nWhat byokd knows of a volume.\n\
                 .TP\n/var/lib/byokd/audit\nThe audit trail.\n\
                 .TP\n/usr/share/doc/byokd\nThe documents: operations, settings, formats, promises.\n\
                 .SH SIGNALS\n.TP\nSIGHUP\nReads settings and definitions anew, as byokctl reload does.\n\
                 .TP\nSIGTERM\nDrains, flushes, destroys all keys, and ends.\n";
    }
    text + SEE_ALSO
}

const SEE_ALSO: &str = ".SH \"SEE ALSO\"\nbyokctl(1), byokd.toml(5), byokd(8), byokd-kernel(8)\n";

/// The files of a directory are these and no others.
fn assert_current(dir: &str, wanted: &BTreeMap<String, String>) {
    let place = root().join(dir);
    if std::env::var_os(WRITE).is_some() {
        write(&place, wanted);
    }
    let entries = fs::read_dir(&place).unwrap().map(|entry| entry.unwrap().path());
    let name = |path: &Path| path.file_name().unwrap().to_str().unwrap().to_owned();
    let there: BTreeMap<_, _> =
        entries.map(|path| (name(&path), fs::read_to_string(&path).unwrap())).collect();
    let names = |files: &BTreeMap<String, String>| files.keys().cloned().collect::<Vec<_>>();
    let how = format!("{WRITE}=1 cargo test --test it documents::manual writes {dir} anew");
    assert_eq!(names(&there), names(wanted), "{how}");
    for (name, text) in wanted {
        assert!(there[name] == *text, "{dir}/{name} is not what its source says now; {how}");
    }
}

fn write(place: &Path, files: &BTreeMap<String, String>) {
    for entry in fs::read_dir(place).unwrap() {
        fs::remove_file(entry.unwrap().path()).unwrap();
    }
    for (name, text) in files {
        fs::write(place.join(name), text).unwrap();
    }
}
