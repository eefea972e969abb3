//! Who may import whom, held against the `use` lines: an arrow the wrong way fails here.
//!
//! The two ways through the program (see `src/lib.rs`) meet in `fence` alone; what decides is pure;
//! the ring, the cipher library and the KMS client can each be changed in the files named below.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

/// A module, and what it may import besides what lies under it. `x::*` is `x` and what lies under
/// it. The most particular row counts; a module without one fails the test.
const MAY_IMPORT: &[(&str, &[&str])] = &[
    // Shared words.
    ("units", &[]),
    ("exit", &[]),
    ("visible", &[]),
    ("log", &["log::*", "visible"]),
    ("log::export", &[]),
    ("log::limit", &[]),
    ("log::queue", &[]),
    ("harden", &[]),
    ("registers", &[]),
    ("turns", &[]),
    ("progress", &[]),
    ("systemd", &["progress"]),
    ("buffer", &["units"]),
    // The data's way.
    ("crypt", &["buffer", "key::*", "units"]),
    ("clock", &["key::lease"]),
    ("fence", &["buffer", "clock", "crypt::*", "key::*", "units"]),
    ("store", &["buffer", "units"]),
    ("device", &["buffer", "fence", "registers", "store::*", "units"]),
    // The kernel's client: a helper of its own, which has nothing to do with keys or data.
    ("kernel", &["exit"]),
    (
        "export",
        &[
            "clock",
            "crypt",
            "device",
            "fence",
            "key",
            "key::lease",
            "metrics::io",
            "store",
            "units",
            "volume",
        ],
    ),
    ("nbd::wire", &[]),
    ("nbd::handshake", &["nbd::wire"]),
    ("nbd::stream", &[]),
    (
        "nbd",
        &[
            "buffer",
            "device",
            "export",
            "fence",
            "metrics::io",
            "registers",
            "store::*",
            "turns",
            "units",
        ],
    ),
    ("listener", &["export", "nbd", "nbd::stream"]),
    // The key's way.
    ("key", &["units"]),
    ("key::secret", &["registers"]),
    ("key::wrapped", &[]),
    ("key::lease", &["key", "units"]),
    ("luks2", &["key::*", "units"]),
    ("volume", &["key::*", "luks2::*", "store::*", "units"]),
    ("kms", &["key::*"]),
    ("kms::aws", &["clock", "key::*", "kms::*", "metrics::counters", "units"]),
    ("kms::trouble", &["key::lease", "kms"]),
    ("kms::verdict", &["key::lease"]),
    // Speaks the wire protocol and knows nothing of byokd.
    ("kms::dev", &[]),
    // What is recorded of the key's way.
    ("audit", &["audit::*", "exit", "key::lease", "key::wrapped", "kms", "units"]),
    ("audit::chain", &["audit::record"]),
    (
        "audit::record",
        &["audit::chain", "exit", "key::lease", "key::wrapped", "kms", "kms::trouble", "units"],
    ),
    ("audit::words", &["audit::record", "key::lease", "units"]),
    ("audit::verify", &["audit::chain", "audit::record", "units"]),
    ("audit::reconcile", &["audit::record", "units"]),
    (
        "keeper",
        &[
            "audit",
            "audit::record",
            "clock",
            "exit",
            "export",
            "key::*",
            "kms",
            "kms::trouble",
            "luks2",
            "metrics::counters",
            "progress",
            "units",
        ],
    ),
    (
        "keeper::plan",
        &["audit", "audit::record", "export", "keeper::threads", "key::lease", "units"],
    ),
    ("keeper::threads", &[]),
    ("keeper::group", &["keeper::pace", "key::lease", "key::wrapped"]),
    ("keeper::pace", &[]),
    // A volume's kernel device: joins what the kernel is asked to what answers it.
    (
        "attachment",
        &[
            "audit",
            "audit::record",
            "clock",
            "exit",
            "export",
            "keeper",
            "kernel::*",
            "nbd::kernel",
            "nbd::stand_in",
            "nbd::transmission",
            "units",
        ],
    ),
    // Around both.
    ("metrics", &["metrics::*"]),
    ("metrics::counters", &[]),
    ("metrics::io", &["metrics::counters"]),
    ("metrics::table", &[]),
    ("http", &["config", "daemon", "http::*", "listener", "metrics"]),
    ("http::api", &["audit::record", "control", "daemon", "units"]),
    ("http::console", &[]),
    ("http::admission", &[]),
    ("http::tls", &[]),
    (
        "control",
        &[
            "audit",
            "audit::record",
            "exit",
            "key::lease",
            "key::wrapped",
            "kms",
            "kms::trouble",
            "units",
        ],
    ),
    (
        "config",
        &[
            "audit",
            "audit::chain",
            "kernel",
            "kernel::sysfs",
            "key::lease",
            "key::wrapped",
            "log::export",
            "units",
        ],
    ),
    ("control::client", &["control", "exit"]),
    ("control::server", &["audit::record", "control", "daemon", "exit", "listener", "progress"]),
    (
        "daemon",
        &[
            "audit::*",
            "attachment::*",
            "clock",
            "config",
            "control::*",
            "crypt",
            "exit",
            "export",
            "fence",
            "http",
            "keeper::*",
            "kernel::*",
            "key::*",
            "kms::*",
            "listener",
            "luks2",
            "metrics::*",
            "progress",
            "store",
            "systemd",
            "units",
            "volume",
        ],
    ),
    (
        "cli::audit",
        &[
            "audit::*",
            "cli::args",
            "cli::audit_words",
            "cli::output",
            "control",
            "control::client",
            "exit",
        ],
    ),
    (
        "cli",
        &[
            "audit::reconcile",
            "audit::record",
            "audit::verify",
            "config",
            "control",
            "control::client",
            "exit",
            "key::wrapped",
            "kms::trouble",
            "units",
            "visible",
        ],
    ),
    // Runs a daemon of its own.
    (
        "cli::demo",
        &[
            "cli::*",
            "control",
            "control::client",
            "daemon",
            "exit",
            "harden",
            "key::wrapped",
            "systemd",
            "units",
        ],
    ),
    ("cli::dev_keys", &["cli::args", "cli::output", "control", "exit", "key::wrapped", "kms::dev"]),
    ("cli::nbd_client", &["nbd::handshake", "nbd::wire"]),
    (
        "bin::byokd-kernel",
        &[
            "config",
            "exit",
            "kernel::args",
            "kernel::noted",
            "kernel::records",
            "kernel::server",
            "log",
        ],
    ),
    ("bin::byokctl", &["cli::*", "control", "exit", "harden"]),
    (
        "bin::byokd",
        &["config", "daemon", "daemon::args", "exit", "harden", "log", "registers", "systemd"],
    ),
];

/// What decides takes values and time and gives values: bytes, sockets, files and clocks are
/// somebody else's.
const PURE: &[&str] = &[
    "audit::chain",
    "audit::reconcile",
    "audit::record",
    "audit::verify",
    "exit",
    "key::lease",
    "key::wrapped",
    "kms::verdict",
    "luks2",
    "nbd::handshake",
    "nbd::wire",
    "units",
];

/// What gives it away that something is not pure.
const IMPURE: &[&str] = &[
    "std::env",
    "std::fs",
    "std::net",
    "std::os",
    "std::process::Command",
    "std::thread",
    "tokio",
    "nix",
    "rustix",
    "libc",
    "Instant::now",
    "SystemTime::now",
    "Timestamp::now",
    "Uuid::new_v4",
];

/// Names that only these modules may use: so much has to be changed to change what they name.
const ONLY_IN: &[(&str, &[&str])] = &[
    ("io_uring", &["store::uring"]),
    ("aws_lc_sys", &["crypt::awslc"]),
    ("xts_mode", &["crypt::reference"]),
    ("aws_sdk_kms", &["kms::aws", "cli::dev_keys"]),
    ("aws_smithy_http_client", &["kms::http"]),
    ("hyper_util", &["http", "kms::dev", "log::otlp"]),
    ("opentelemetry", &["log::otlp"]),
    ("opentelemetry_otlp", &["log::otlp"]),
    ("opentelemetry_sdk", &["log::otlp"]),
    ("prometheus", &["metrics"]),
    ("neli", &["kernel::netlink"]),
    ("tokio_rustls", &["http::tls"]),
    ("x509_cert", &["http::tls"]),
    ("rustix", &["kernel::holders", "kernel::mounts", "kernel::passing", "kernel::purge"]),
    ("toml", &["config", "daemon", "control::server"]),
    // The data's way waits for nothing but its own sockets and its own ring.
    (
        "tokio",
        &[
            "attachment",
            "bin",
            "cli",
            "control",
            "daemon",
            "http",
            "keeper",
            "kms",
            "listener",
            "log::otlp",
        ],
    ),
];

/// Where `unsafe` may stand. Each of these says at its top that it expects it, and why.
const UNSAFE: &[&str] = &[
    "buffer",
    "crypt::awslc",
    "kernel::ioctl",
    "key::secret",
    "registers",
    "store::uring",
    "turns",
];

/// A module's source without its comments, strings and tests.
struct Module {
    name: String,
    code: String,
}

fn sources() -> Vec<Module> {
    fn read(dir: &Path, prefix: &str, found: &mut Vec<Module>) {
        for entry in std::fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            let stem = path.file_stem().unwrap().to_str().unwrap();
            let name =
                if prefix.is_empty() { stem.to_owned() } else { format!("{prefix}::{stem}") };
            if path.is_dir() {
                read(&path, &name, found);
            } else if path.extension().is_some_and(|extension| extension == "rs") && name != "lib" {
                let name = name.strip_suffix("::mod").unwrap_or(&name).to_owned();
                let text = std::fs::read_to_string(&path).unwrap();
                found.push(Module { name, code: code_of(&text) });
            }
        }
    }
    let mut found = Vec::new();
    read(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src"), "", &mut found);
    found
}

/// Without comments, string literals, and everything from the tests on.
fn code_of(text: &str) -> String {
    let text = text.split("\n#[cfg(test)]").next().unwrap_or_default();
    let mut code = String::new();
    let mut rest = text;
    while let Some(c) = rest.chars().next() {
        let skipped = if rest.starts_with("//") {
            rest.find('\n').unwrap_or(rest.len())
        } else if rest.starts_with("'\"'") || rest.starts_with("b'\"'") {
            4
        } else if let Some(raw) = rest.strip_prefix("r#\"") {
            3 + raw.find("\"#").map_or(raw.len(), |end| end + 2)
        } else if c == '"' {
            string_len(rest)
        } else {
            code.push(c);
            rest = &rest[c.len_utf8()..];
            continue;
        };
        rest = &rest[skipped.min(rest.len())..];
    }
    code
}

/// Bytes of the string literal at the start of `text`, its quotes included.
fn string_len(text: &str) -> usize {
    let mut escaped = false;
    for (at, c) in text.char_indices().skip(1) {
        match c {
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            '"' => return at + 1,
            _ => {}
        }
    }
    text.len()
}

/// Every path of ours that the module names, as the module it leads to.
fn imports(module: &Module, all: &BTreeSet<&str>) -> BTreeSet<String> {
    let parent = module.name.rsplit_once("::").map_or("", |(parent, _)| parent);
    let mut found = BTreeSet::new();
    for (root, base) in [("crate::", ""), ("byokd::", ""), ("super::", parent)] {
        for (at, _) in module.code.match_indices(root) {
            let before = module.code[..at].chars().next_back();
            if before.is_some_and(|c| c.is_alphanumeric() || c == '_' || c == ':') {
                continue;
            }
            for path in use_tree(&module.code[at + root.len()..]) {
                let path = if base.is_empty() { path } else { format!("{base}::{path}") };
                if let Some(target) = longest_module(&path, all) {
                    found.insert(target.to_owned());
                }
            }
        }
    }
    found
}

/// The paths of a use tree: `a::{b, c::d}` gives `a::b` and `a::c::d`.
fn use_tree(text: &str) -> Vec<String> {
    let end = text.find(|c: char| !(c.is_alphanumeric() || c == '_' || c == ':'));
    let (path, rest) = text.split_at(end.unwrap_or(text.len()));
    let (Some(prefix), Some(inner)) = (path.strip_suffix("::"), rest.strip_prefix('{')) else {
        return if path.is_empty() && rest.starts_with('{') {
            branches(&rest[1..]).flat_map(use_tree).collect()
        } else {
            vec![path.to_owned()]
        };
    };
    branches(inner).flat_map(use_tree).map(|path| format!("{prefix}::{path}")).collect()
}

/// The parts of a list up to the brace that closes it.
fn branches(list: &str) -> impl Iterator<Item = &str> {
    let mut depth = 0usize;
    let mut from = 0;
    let mut parts = Vec::new();
    for (at, c) in list.char_indices() {
        match c {
            '{' => depth += 1,
            '}' if depth > 0 => depth -= 1,
            '}' | ',' if depth == 0 => {
                parts.push(list[from..at].trim());
                from = at + 1;
                if c == '}' {
                    break;
                }
            }
            _ => {}
        }
    }
    parts.into_iter().filter(|part| !part.is_empty())
}

fn longest_module<'a>(path: &'a str, all: &BTreeSet<&str>) -> Option<&'a str> {
    let mut path = path;
    loop {
        if all.contains(path) {
            return Some(path);
        }
        path = path.rsplit_once("::")?.0;
    }
}

/// Whether `name` is `module` or lies under it.
fn is_in(name: &str, module: &str) -> bool {
    name.strip_prefix(module).is_some_and(|rest| rest.is_empty() || rest.starts_with("::"))
}

#[test]
fn imports_go_only_where_the_table_lets_them() {
    let modules = sources();
    let all: BTreeSet<_> = modules.iter().map(|module| module.name.as_str()).collect();
    let rows: BTreeMap<_, _> = MAY_IMPORT.iter().copied().collect();
    assert_eq!(rows.len(), MAY_IMPORT.len(), "a module has one row");
    let (mut wrong, mut arrows) = (Vec::new(), 0);
    for module in &modules {
        let Some(row) = rows.keys().filter(|row| is_in(&module.name, row)).max_by_key(|r| r.len())
        else {
            wrong.push(format!("{} has no row", module.name));
            continue;
        };
        for target in imports(module, &all) {
            arrows += 1;
            let allowed = is_in(&target, row)
                || rows[row].iter().any(|entry| match entry.strip_suffix("::*") {
                    Some(subtree) => is_in(&target, subtree),
                    None => target == *entry,
                });
            if !allowed {
                wrong.push(format!("{} imports {target}", module.name));
            }
        }
    }
    wrong.extend(
        rows.keys().filter(|row| !all.contains(*row)).map(|row| format!("{row} is no module")),
    );
    assert!(wrong.is_empty(), "{wrong:#?}");
    assert!(arrows > 100, "only {arrows} imports were found: is the source read rightly?");
}

#[test]
fn what_decides_touches_no_file_socket_or_clock() {
    for module in sources() {
        if PURE.iter().any(|pure| is_in(&module.name, pure)) {
            for word in IMPURE {
                assert!(!names(&module.code, word), "{} names {word}", module.name);
            }
        }
    }
}

#[test]
fn what_could_be_exchanged_is_named_in_few_places() {
    let modules = sources();
    for (word, places) in ONLY_IN {
        let users: Vec<_> =
            modules.iter().filter(|m| names(&m.code, word)).map(|m| m.name.as_str()).collect();
        assert!(!users.is_empty(), "{word} is used nowhere");
        for user in users {
            let known = places.iter().any(|place| is_in(user, place));
            assert!(known, "{user} names {word}, which is for {places:?}");
        }
    }
}

#[test]
fn unsafe_code_stands_only_where_it_is_expected() {
    let mut found: Vec<_> = sources()
        .into_iter()
        .filter(|module| names(&module.code, "unsafe"))
        .map(|module| {
            let expected = module.code.contains("#![expect(unsafe_code, reason = ");
            assert!(expected, "{} does not say why it has unsafe code", module.name);
            module.name
        })
        .collect();
    found.sort();
    assert_eq!(found, UNSAFE);
}

/// Whether the code names a word: as a whole, not as a part of a longer one.
fn names(code: &str, word: &str) -> bool {
    let part = |c: char| c.is_alphanumeric() || c == '_';
    code.match_indices(word).any(|(at, _)| {
        let before = code[..at].chars().next_back();
        let after = code[at + word.len()..].chars().next();
        !before.is_some_and(part) && !after.is_some_and(part)
    })
}

#[test]
fn the_source_is_read_as_rust_reads_it() {
    let code = code_of(
        "//! crate::doc\nuse crate::{a, b::{c, d}}; let x = \"crate::e \\\" crate::f\"; '\"' /* */ \
         crate::g::h(); // crate::i\n#[cfg(test)]\nmod tests { use crate::j; }",
    );
    assert!(!["doc", "e", "f", "i", "j"].iter().any(|word| names(&code, word)), "{code}");
    assert_eq!(use_tree("{a, b::{c, d::e}, f}; x"), ["a", "b::c", "b::d::e", "f"]);
    assert_eq!(use_tree("g::h(); y::{z}"), ["g::h"]);
    let module =
        Module { name: "x::y".into(), code: "use super::z; use crate::a::{b::C, d};".into() };
    let all = ["x", "x::y", "x::z", "a", "a::b"].into();
    let found: Vec<_> = imports(&module, &all).into_iter().collect();
    assert_eq!(found, ["a", "a::b", "x::z"]);
}
