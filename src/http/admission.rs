//! Who may see what: the token, and the name by which the daemon is asked.

use std::io;
use std::net::IpAddr;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use aws_lc_rs::constant_time::verify_slices_are_equal;
use aws_lc_rs::digest::{SHA256, digest};
use hyper::HeaderMap;
use hyper::header::{AUTHORIZATION, HOST};

/// The shortest token: 16 characters of base64 are 96 bits.
const SHORTEST: usize = 16;

/// Why a token cannot be taken.
#[derive(Debug, thiserror::Error)]
pub enum TokenError {
    /// The file cannot be read.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// Others can read the file.
    #[error("everybody can read it (mode {0:o}); use 0600 or 0640")]
    Mode(u32),
    /// There is none, or one that can be guessed.
    #[error("it is shorter than {SHORTEST} characters")]
    Short,
}

/// What a request must bring.
pub(super) enum Admission {
    /// Nothing; but no page of another name may ask.
    Anybody,
    /// The token with this SHA-256.
    Token(Vec<u8>),
}

/// What a request lacks.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Refusal {
    /// The token.
    Token,
    /// A name that is ours.
    Host,
}

impl Admission {
    /// With the token in that file, if one is named.
    pub(super) fn of(file: Option<&Path>) -> Result<Self, TokenError> {
        let Some(file) = file else { return Ok(Self::Anybody) };
        let mode = std::fs::metadata(file)?.mode() & 0o7777;
        if mode & 0o007 != 0 {
            return Err(TokenError::Mode(mode));
        }
        let text = std::fs::read_to_string(file)?;
        let token = text.trim();
        if token.len() < SHORTEST {
            return Err(TokenError::Short);
        }
        Ok(Self::Token(sha256(token)))
    }

    /// What this request lacks, if anything.
    pub(super) fn refuses(&self, headers: &HeaderMap) -> Option<Refusal> {
        match self {
            // A page on another site can have a browser ask a loopback address, by a name of its
            // own that leads there, and then read the answer as its own.
            Self::Anybody => {
                let host = headers.get(HOST).and_then(|host| host.to_str().ok());
                (!host.is_some_and(is_this_machine)).then_some(Refusal::Host)
            }
            Self::Token(wanted) => {
                let given = headers.get(AUTHORIZATION).and_then(|given| given.to_str().ok());
                // The scheme's case says nothing (RFC 9110, section 11.1).
                let given = given
                    .and_then(|given| given.split_once(' '))
                    .filter(|(scheme, _)| scheme.eq_ignore_ascii_case("bearer"))
                    .map(|(_, token)| token);
                // By hashes, so that neither time nor length says anything.
                let right = given.is_some_and(|given| {
                    verify_slices_are_equal(&sha256(given.trim()), wanted).is_ok()
                });
                (!right).then_some(Refusal::Token)
            }
        }
    }
}

fn sha256(text: &str) -> Vec<u8> {
    digest(&SHA256, text.as_bytes()).as_ref().to_vec()
}

/// Whether a Host header has an address or `localhost`, which no other site can be.
fn is_this_machine(host: &str) -> bool {
    let name = match host.strip_prefix('[') {
        Some(v6) => v6.split(']').next().unwrap_or_default(),
        None => host.split(':').next().unwrap_or_default(),
    };
    name.eq_ignore_ascii_case("localhost") || name.parse::<IpAddr>().is_ok()
}

#[cfg(test)]
mod tests {
    use hyper::header::HeaderValue;

    use super::*;

    fn with(name: hyper::header::HeaderName, value: &'static str) -> HeaderMap {
        HeaderMap::from_iter([(name, HeaderValue::from_static(value))])
    }

    #[test]
    fn without_a_token_only_this_machines_own_names_are_answered() {
        for host in ["127.0.0.1:9441", "[::1]:9441", "localhost", "LOCALHOST:1"] {
            assert_eq!(Admission::Anybody.refuses(&with(HOST, host)), None, "{host}");
        }
        for host in ["evil.example", "127.0.0.1.evil.example:9441", "localhost.evil.example", ""] {
            let refused = Admission::Anybody.refuses(&with(HOST, host));
            assert_eq!(refused, Some(Refusal::Host), "{host}");
        }
        assert_eq!(Admission::Anybody.refuses(&HeaderMap::new()), Some(Refusal::Host));
    }

    #[test]
    fn with_a_token_only_who_has_it_is_answered() {
        let admission = Admission::Token(sha256("0123456789abcdef"));
        for given in ["Bearer 0123456789abcde", "Bearer 0123456789abcdef0", "Bearer", "Basic eDp5"]
        {
            let refused = admission.refuses(&with(AUTHORIZATION, given));
            assert_eq!(refused, Some(Refusal::Token), "{given}");
        }
        for given in
            ["Bearer 0123456789abcdef", "bearer 0123456789abcdef", "BEARER  0123456789abcdef"]
        {
            assert_eq!(admission.refuses(&with(AUTHORIZATION, given)), None, "{given}");
        }
        assert_eq!(admission.refuses(&with(HOST, "127.0.0.1")), Some(Refusal::Token));
    }
}
