//! Values of settings.

use std::time::Duration;

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::key::lease::Allowance;

/// A duration written like `10s`, `5m`, `1h`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub struct Seconds(pub Duration);

/// Why a text is not a duration.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("`{0}` is not a duration; write it like `10s`, `500ms`, `5m` or `1h`")]
pub struct DurationError(String);

impl std::str::FromStr for Seconds {
    type Err = DurationError;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let wrong = || DurationError(text.to_owned());
        let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
        let (number, unit) = text.split_at(digits);
        let number: u64 = number.parse().map_err(|_| wrong())?;
        let millis = match unit {
            "ms" => 1,
            "s" => 1000,
            "m" => 60_000,
            "h" => 3_600_000,
            "d" => 86_400_000,
            "" if number == 0 => 0,
            _ => return Err(wrong()),
        };
        Ok(Self(Duration::from_millis(number.checked_mul(millis).ok_or_else(wrong)?)))
    }
}

impl TryFrom<String> for Seconds {
    type Error = DurationError;
    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

/// An outage allowance: a duration, or `never`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub struct FailClosedAfter(pub Allowance);

impl TryFrom<String> for FailClosedAfter {
    type Error = DurationError;
    fn try_from(text: String) -> Result<Self, Self::Error> {
        if text == "never" {
            return Ok(Self(Allowance::Never));
        }
        text.parse().map(|Seconds(duration)| Self(Allowance::For(duration)))
    }
}

/// Whether something is done by itself.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Auto {
    /// It is.
    #[default]
    Auto,
    /// Only when asked for.
    Off,
}
