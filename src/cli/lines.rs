//! Lines for people. What stands in them may be anybody's words: whatever a line is made of, it is
//! one line, and nothing in it is acted upon by the terminal.

use std::fmt::Display;

use crate::visible::visible;

/// Lines, each of them visible.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Lines(Vec<String>);

impl Lines {
    /// Adds one.
    pub(super) fn push(&mut self, words: impl Display) {
        self.0.push(line(words));
    }

    /// Adds others.
    pub(super) fn append(&mut self, mut more: Self) {
        self.0.append(&mut more.0);
    }

    /// Each, without an end.
    pub(super) fn each(&self) -> &[String] {
        &self.0
    }

    /// Only so many, the first.
    pub(super) fn truncate(&mut self, count: usize) {
        self.0.truncate(count);
    }

    /// As they are printed.
    pub(super) fn text(&self) -> String {
        self.0.iter().map(|line| format!("{line}\n")).collect()
    }
}

/// Words as one line.
pub(super) fn line(words: impl Display) -> String {
    visible(&words.to_string()).into_owned()
}
