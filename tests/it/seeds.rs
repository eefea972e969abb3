//! The seeds of the fuzz targets, run through the same checks: what was found once stays mended.

use std::path::Path;

#[path = "../../fuzz/src/lib.rs"]
#[expect(unreachable_pub, reason = "it is a library of its own for the fuzzer")]
mod checks;

/// Runs every seed of a target.
fn replay(target: &str, check: fn(&[u8])) {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/seeds").join(target);
    let mut count = 0;
    for entry in std::fs::read_dir(&dir).unwrap() {
        let path = entry.unwrap().path();
        println!("{}", path.display());
        check(&std::fs::read(&path).unwrap());
        count += 1;
    }
    assert!(count >= 3, "only {count} seeds in {}", dir.display());
}

#[test]
fn the_luks2_header_keeps_what_it_reads() {
    replay("luks2_header", checks::luks2_header);
}

#[test]
fn the_luks2_metadata_keeps_what_it_reads() {
    replay("luks2_metadata", checks::luks2_metadata);
}

#[test]
fn every_handshake_ends_and_is_answered() {
    replay("nbd_handshake", checks::nbd_handshake);
}

#[test]
fn every_request_is_read_whole_and_answered_by_its_cookie() {
    replay("nbd_request", checks::nbd_request);
}

#[test]
fn only_the_words_of_kms_are_a_denial() {
    replay("kms_answer", checks::kms_answer);
}

#[test]
fn a_trail_is_checked_to_its_end_whatever_is_in_it() {
    replay("audit", checks::audit);
}

#[test]
fn every_error_of_settings_names_a_line_that_there_is() {
    replay("config", checks::config);
}
