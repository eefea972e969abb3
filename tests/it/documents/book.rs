//! The documents as a book: docs/SUMMARY.md lists each of them once, under its own title, and no
//! link of theirs leaves the book. Whether mdbook has anything to say of it, such as HTML that nobody
//! closes, `.ci/run` finds out.

use std::collections::BTreeMap;
use std::path::{Component, Path, PathBuf};

use super::{documents, read};

/// Documents of the book by their paths in it, with their titles.
fn chapters() -> BTreeMap<PathBuf, String> {
    let of_the_book = documents().into_iter().filter_map(|path| {
        let inside = path.strip_prefix("docs").ok()?.to_owned();
        let title = read(path.to_str().unwrap()).lines().next()?.strip_prefix("# ")?.to_owned();
        (inside != Path::new("SUMMARY.md")).then_some((inside, title))
    });
    of_the_book.collect()
}

#[test]
fn the_summary_lists_every_document_once_and_by_its_title() {
    assert!(read("book.toml").contains("\nsrc = \"docs\"\n"));
    let summary = read("docs/SUMMARY.md");
    let mut listed = BTreeMap::new();
    for line in summary.lines().filter(|line| line.trim_start().starts_with('-')) {
        let entry = line.trim_start().strip_prefix("- [").and_then(|e| e.strip_suffix(')'));
        let (title, path) = entry.unwrap().split_once("](").unwrap();
        assert_eq!(listed.insert(PathBuf::from(path), title.to_owned()), None, "{line}");
    }
    let mut wanted = chapters();
    for (path, title) in &mut wanted {
        if path.starts_with("runbooks") {
            *title = title.split(':').next().unwrap().to_owned();
        }
    }
    assert!(wanted.len() > 25, "{wanted:?}");
    assert_eq!(listed, wanted);
}

#[test]
fn the_list_of_runbooks_has_each_with_its_title() {
    let page = read("docs/runbooks.md");
    let (mut rows, mut wanted) = (Vec::new(), Vec::new());
    rows.extend(page.lines().filter(|line| line.starts_with("| [")).map(str::to_owned));
    for (path, title) in chapters().iter().filter(|(path, _)| path.starts_with("runbooks")) {
        let (alert, what) = title.split_once(": ").unwrap();
        wanted.push(format!("| [{alert}]({}) | {what} |", path.display()));
    }
    assert_eq!(rows, wanted);
}

#[test]
fn no_link_leaves_the_book() {
    for path in chapters().keys() {
        let text = read(Path::new("docs").join(path).to_str().unwrap());
        for link in text.split("](").skip(1).filter_map(|rest| rest.split(')').next()) {
            let file = link.split('#').next().unwrap();
            let inside = path.parent().unwrap().join(file);
            let depth = inside.components().try_fold(0usize, |depth, part| {
                if part == Component::ParentDir { depth.checked_sub(1) } else { Some(depth + 1) }
            });
            let shown = file.ends_with(".md") || file.ends_with(".svg");
            let page = file.is_empty() || link.starts_with("http") || shown;
            assert!(page && depth.is_some(), "{}: {link}", path.display());
        }
    }
}
