//! The files of `systemd/`, as far as a machine without systemd running can tell. What they do is
//! tried in `vm-tests/`.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::support::{have, run};

const PROGRAMS: [(&str, &str); 3] = [
    ("byokd", env!("CARGO_BIN_EXE_byokd")),
    ("byokctl", env!("CARGO_BIN_EXE_byokctl")),
    ("byokd-kernel", env!("CARGO_BIN_EXE_byokd-kernel")),
];

fn units() -> Vec<PathBuf> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("systemd");
    let entries = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
    let is_unit =
        |path: &PathBuf| path.extension().is_some_and(|e| e == "service" || e == "socket");
    entries.filter(is_unit).collect()
}

#[test]
fn systemd_has_nothing_to_say_against_the_units() {
    if !have(&["systemd-analyze"]) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let mut copies = Vec::new();
    for unit in units() {
        // It looks whether programs are there: these are, and udevadm need not be.
        let mut text = fs::read_to_string(&unit).unwrap().replace("/usr/bin/udevadm", "/bin/true");
        for (name, path) in PROGRAMS {
            text = text.replace(&format!("/usr/bin/{name} "), &format!("{path} "));
        }
        let copy = dir.path().join(unit.file_name().unwrap());
        fs::write(&copy, text).unwrap();
        copies.push(copy);
    }
    assert!(copies.len() >= 4, "{copies:?}");
    let said = Command::new("systemd-analyze")
        .args(["verify", "--man=no"])
        .args(&copies)
        .env("SYSTEMD_UNIT_PATH", format!("{}:", dir.path().display()))
        .output()
        .unwrap();
    assert!(said.status.success() && said.stderr.is_empty(), "{said:?}");
}

/// In tenths, as systemd rates a unit: 0 is best, 100 worst.
#[test]
fn the_daemon_is_confined_and_its_helpers_as_far_as_they_can_be() {
    if !have(&["systemd-analyze"]) {
        return;
    }
    for (unit, worst) in
        [("byokd.service", 20), ("byokd-kernel.service", 50), ("byokd-attach@.service", 25)]
    {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("systemd").join(unit);
        // It fails above the threshold.
        run(Command::new("systemd-analyze")
            .args(["security", "--no-pager", "--offline=yes", &format!("--threshold={worst}")])
            .arg(path));
    }
}
