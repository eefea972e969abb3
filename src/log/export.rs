//! Where an OpenTelemetry collector is, if there is to be one: what the settings say, else what
//! OpenTelemetry's own variables say.

use thiserror::Error;

/// What an endpoint that takes several kinds of things has for logs.
const PATH: &str = "/v1/logs";

/// Takes logs, and nothing else.
const LOGS_ENDPOINT: &str = "OTEL_EXPORTER_OTLP_LOGS_ENDPOINT";

/// Takes all kinds of things.
const ENDPOINT: &str = "OTEL_EXPORTER_OTLP_ENDPOINT";

/// Why lines cannot be exported.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum ExportError {
    /// This build cannot.
    #[error(
        "this byokd is built without OpenTelemetry: build it with `cargo build --release --features otel`"
    )]
    NotBuilt,
    /// That is no URL of a collector.
    #[error("`{0}` is no URL of a collector; write it like `http://127.0.0.1:4318`")]
    Url(String),
    /// Whoever reads the log would read it.
    #[error("the collector's URL has a user in it: credentials go into OTEL_EXPORTER_OTLP_HEADERS")]
    Credentials,
    /// The exporter does not start.
    #[error("nothing can be exported: {0}")]
    Start(String),
}

/// Where a collector takes logs, whose URL the settings have.
///
/// # Errors
/// It is none, or this build has no use for it.
pub fn collector(url: &str) -> Result<String, ExportError> {
    let url = logs(url)?;
    if cfg!(feature = "otel") { Ok(url) } else { Err(ExportError::NotBuilt) }
}

/// The URL for logs of a collector with this URL.
fn logs(url: &str) -> Result<String, ExportError> {
    checked(url).map(|url| format!("{}{PATH}", url.trim_end_matches('/')))
}

/// A URL as it stands.
fn checked(url: &str) -> Result<String, ExportError> {
    let rest = url.strip_prefix("http://").or_else(|| url.strip_prefix("https://"));
    let authority = rest.and_then(|rest| rest.split('/').next()).unwrap_or_default();
    if authority.contains('@') {
        return Err(ExportError::Credentials);
    }
    if authority.is_empty() || url.contains(|c: char| c.is_whitespace() || c.is_control()) {
        return Err(ExportError::Url(url.to_owned()));
    }
    Ok(url.to_owned())
}

/// What the environment names, looked up by `variable`; an empty one is none.
pub(super) fn of_environment(
    variable: impl Fn(&str) -> Option<String>,
) -> Option<Result<String, ExportError>> {
    let named = |name| variable(name).filter(|value| !value.is_empty());
    let alone = named(LOGS_ENDPOINT).map(|url| checked(&url));
    alone.or_else(|| named(ENDPOINT).map(|url| logs(&url)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_variables_say_where_as_opentelemetry_has_it() {
        let with = |set: &[(&str, &str)]| {
            let found = |name: &str| set.iter().find(|(known, _)| *known == name);
            of_environment(|name| found(name).map(|(_, value)| (*value).to_owned()))
        };
        let url = |url: &str| Some(Ok(url.to_owned()));
        assert_eq!(with(&[]), None);
        assert_eq!(with(&[(ENDPOINT, "")]), None);
        assert_eq!(with(&[(ENDPOINT, "http://c:4318")]), url("http://c:4318/v1/logs"));
        assert_eq!(with(&[(ENDPOINT, "https://c/x/")]), url("https://c/x/v1/logs"));
        let both = [(ENDPOINT, "http://c:4318"), (LOGS_ENDPOINT, "http://logs/here")];
        assert_eq!(with(&both), url("http://logs/here"));
    }

    #[test]
    fn what_is_no_url_of_a_collector_is_refused() {
        for wrong in ["", "c:4318", "grpc://c:4317", "http://", "http:///x", "http://a b"] {
            assert_eq!(logs(wrong), Err(ExportError::Url(wrong.to_owned())), "{wrong}");
        }
        assert_eq!(logs("http://user:word@c"), Err(ExportError::Credentials));
    }
}
