//! One file of settings, read strictly; what is wrong with it, in words.

use std::fmt;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use thiserror::Error;

use crate::audit::chain::Hash;

/// What is wrong with the files, all of it.
#[derive(Debug, Error)]
#[error("{}", .0.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n"))]
pub struct ConfigErrors(pub Vec<ConfigError>);

/// One thing that is wrong.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConfigError {
    /// In which file.
    pub file: PathBuf,
    /// On which line, counted from one, if it is on one.
    pub line: Option<usize>,
    /// What.
    pub what: String,
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.line {
            Some(line) => write!(f, "{}:{line}: {}", self.file.display(), self.what),
            None => write!(f, "{}: {}", self.file.display(), self.what),
        }
    }
}

/// A file's settings, and the SHA-256 of what was read.
///
/// # Errors
/// What is wrong with the file: the first thing, with its line.
pub(super) fn parse<T: for<'de> Deserialize<'de>>(path: &Path) -> Result<(T, Hash), ConfigError> {
    let fail = |line, what| ConfigError { file: path.to_owned(), line, what };
    let text = std::fs::read_to_string(path).map_err(|e| fail(None, e.to_string()))?;
    let sha256 = Hash::of(text.as_bytes());
    toml::from_str(&text).map(|settings| (settings, sha256)).map_err(|error| {
        let line = error.span().map(|span| {
            text.get(..span.start).unwrap_or_default().bytes().filter(|b| *b == b'\n').count() + 1
        });
        fail(line, format!("{}{}", setting(&text, line, error.message()), explain(error.message())))
    })
}

/// The setting on that line, for words that do not name it: `http.listen: `.
fn setting(text: &str, line: Option<usize>, message: &str) -> String {
    let Some(line) = line.filter(|_| !message.contains('`')) else { return String::new() };
    let before: Vec<_> = text.lines().take(line).collect();
    let Some((key, _)) = before.last().and_then(|line| line.split_once('=')) else {
        return String::new();
    };
    let table =
        before.iter().rev().find_map(|line| line.trim().strip_prefix('[')?.split(']').next());
    let key = key.trim();
    match table {
        Some(table) => format!("{table}.{key}: "),
        None => format!("{key}: "),
    }
}

/// Serde's words for an unknown key list all known ones; what helps is the nearest.
fn explain(message: &str) -> String {
    let Some(rest) = message.strip_prefix("unknown field `") else { return message.to_owned() };
    let Some((unknown, rest)) = rest.split_once('`') else { return message.to_owned() };
    let known = rest.split('`').skip(1).step_by(2);
    let nearest = known.min_by_key(|known| strsim::damerau_levenshtein(unknown, known));
    match nearest {
        Some(nearest) => format!("unknown key `{unknown}`; did you mean `{nearest}`?"),
        None => format!("unknown key `{unknown}`"),
    }
}
