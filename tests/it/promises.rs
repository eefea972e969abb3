//! docs/PROMISES.md, and what auditors are given, name tests that there are.

use std::path::{Path, PathBuf};

/// The files in which a test of this name may stand: `a::b::tests::c` in `src/a/b.rs` or
/// `src/a/b/mod.rs` or `src/a/b/tests.rs`, `a::c` in `tests/it/a.rs`, `vm-tests/a::c` in `vm-tests/tests/a.py`.
fn homes(name: &str) -> Vec<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    if let Some((file, _)) = name.strip_prefix("vm-tests/").and_then(|name| name.split_once("::")) {
        return vec![root.join("vm-tests/tests").join(file).with_extension("py")];
    }
    let modules: Vec<_> = name.split("::").collect();
    let modules = &modules[..modules.len() - 1];
    match modules.split_last() {
        Some((&"tests", path)) => {
            let path = root.join("src").join(path.join("/"));
            vec![path.with_extension("rs"), path.join("mod.rs"), path.join("tests.rs")]
        }
        _ => vec![root.join("tests/it").join(modules.join("/")).with_extension("rs")],
    }
}

fn is_there(name: &str) -> bool {
    let keyword = if name.starts_with("vm-tests/") { "\ndef" } else { "fn" };
    let function = format!("{keyword} {}(", name.rsplit("::").next().unwrap());
    let holds = |home: &PathBuf| {
        std::fs::read_to_string(home).is_ok_and(|source| source.contains(&function))
    };
    homes(name).iter().any(holds)
}

#[test]
fn every_promise_names_a_test_that_there_is_or_is_pending() {
    let promises = include_str!("../../docs/PROMISES.md");
    let rows = promises.lines().filter(|line| line.starts_with("| ") && !line.contains("held by"));
    let mut named = 0;
    for row in rows {
        let held_by = row.rsplit(" | ").next().unwrap();
        if held_by.contains("*pending*") {
            continue;
        }
        let names: Vec<_> = held_by.split('`').skip(1).step_by(2).collect();
        assert!(!names.is_empty(), "{row} names no test");
        for name in names {
            if name.starts_with("benches/") {
                assert!(Path::new(env!("CARGO_MANIFEST_DIR")).join(name).exists(), "no {name}");
                continue;
            }
            if let Some(story) = name.strip_prefix("workloads/run ") {
                let home = format!("{}/workloads/stories/{story}.py", env!("CARGO_MANIFEST_DIR"));
                assert!(Path::new(&home).exists(), "no {home}");
                continue;
            }
            assert!(is_there(name), "there is no test {name}");
            named += 1;
        }
    }
    assert!(named > 20, "the table is read");
}

#[test]
fn every_test_that_an_auditor_is_told_of_is_there() {
    let mut named = 0;
    for document in
        [include_str!("../../docs/REVOCATION.md"), include_str!("../../docs/THREAT-MODEL.md")]
    {
        let words = document.split('`').skip(1).step_by(2);
        for name in words.filter(|word| word.contains("::") && !word.ends_with("::")) {
            assert!(is_there(name), "there is no test {name}");
            named += 1;
        }
    }
    assert!(named > 25, "the tables are read");
}
