//! What an answer of KMS means for the customer's key: a table, as one pure function.
//!
//! [`judge`] is called by [`super::aws`] for every call that did not succeed. It matches on the
//! error **code**, never on the HTTP status: access, throttling, credential and signature errors
//! are not modelled by the SDK, and a proxy between us and AWS can make up any status.
//!
//! What stays true here: only words that KMS itself uses for "the customer took the key away"
//! give [`Verdict::Denied`]; whatever is unknown gives [`Verdict::Unavailable`], so that nothing
//! but a denial fences a volume before its outage allowance ends.
//!
//! Source: the errors of `Decrypt`, `GenerateDataKey` and `DescribeKey` in the AWS KMS API
//! reference, its common errors, "Key states of AWS KMS keys", and "Troubleshooting external key
//! stores" in the developer guide.

use crate::key::lease::{DisconnectedStore, Verdict};

/// What came back of a call that did not succeed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer<'a> {
    /// KMS answered with an error that has a code.
    Error {
        /// The exception's name, without its namespace: `DisabledException`.
        code: &'a str,
        /// Its message, verbatim; may be empty.
        message: &'a str,
        /// `KeyState` of `DescribeKey`, where it was asked: only `KMSInvalidStateException` needs
        /// it.
        key_state: Option<&'a str>,
    },
    /// Something answered, but not with an error of KMS or not with a proof.
    Unproven(Unproven),
    /// Nothing answered.
    Transport(Transport),
}

/// An answer that is no error of KMS and no proof either.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unproven {
    /// An HTTP error without an error code: a page of a proxy or a load balancer.
    NoCode,
    /// It could not be parsed.
    Garbled,
    /// A success without plaintext, blob or key ARN.
    Empty,
    /// A success that names another key than the one asked for.
    OtherKey,
    /// A success with another plaintext than the one expected.
    OtherPlaintext,
    /// An answer that came before, by its request id: a cache or a replay.
    Replayed,
}

/// Why there was no answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transport {
    /// A time limit ran out.
    Timeout,
    /// The endpoint's name could not be resolved.
    Dns,
    /// No connection could be made.
    Connect,
    /// The TLS handshake failed.
    Tls,
    /// The connection was lost before the answer was complete.
    Reset,
    /// The credentials chain gave no credentials.
    NoCredentials,
    /// The client could not even make the request: endpoint, region or FIPS settings.
    Configuration,
}

impl Unproven {
    /// Our word for it, where KMS gives no code.
    #[must_use]
    pub fn code(self) -> &'static str {
        match self {
            Self::NoCode => "NoErrorCode",
            Self::Garbled => "GarbledAnswer",
            Self::Empty => "EmptyAnswer",
            Self::OtherKey => "OtherKey",
            Self::OtherPlaintext => "OtherPlaintext",
            Self::Replayed => "ReplayedAnswer",
        }
    }
}

impl Transport {
    /// Our word for it, where KMS gives no code.
    #[must_use]
    pub fn code(self) -> &'static str {
        match self {
            Self::Timeout => "Timeout",
            Self::Dns => "Dns",
            Self::Connect => "Connect",
            Self::Tls => "Tls",
            Self::Reset => "Reset",
            Self::NoCredentials => "NoCredentials",
            Self::Configuration => "Configuration",
        }
    }
}

/// What an answer means, and what a person should do about it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Judgement {
    /// What it means for the customer's key.
    pub verdict: Verdict,
    /// What to do about it, one sentence.
    pub remedy: &'static str,
    /// Whether `code` is one this table knows; an unknown one deserves an alarm of its own.
    pub known: bool,
}

/// What `answer` means for the customer's key.
#[must_use]
pub fn judge(answer: Answer<'_>, store: DisconnectedStore) -> Judgement {
    match answer {
        Answer::Error { code: "KMSInvalidStateException", message, key_state } => {
            judge_invalid_state(message, key_state, store)
        }
        Answer::Error { code, .. } => judge_code(code),
        Answer::Unproven(unproven) => judge_unproven(unproven),
        Answer::Transport(transport) => judge_transport(transport),
    }
}

/// Whether a code says that our signature or clock was at fault: the SDK measures the clock's
/// error from such an answer, so that a second attempt is signed right.
#[must_use]
pub fn is_signature_error(code: &str) -> bool {
    matches!(
        code,
        "InvalidSignatureException"
            | "SignatureDoesNotMatch"
            | "RequestTimeTooSkewed"
            | "RequestExpired"
            | "AuthFailure"
    )
}

fn judge_code(code: &str) -> Judgement {
    match code {
        "AccessDeniedException" | "AccessDenied" => denied(
            "if the customer withdrew access, nothing; otherwise look at our own side too (IAM role, \
             service control policy, VPC endpoint policy) and compare the key's policy with \
             `byokctl key policy`",
        ),
        "DisabledException" => denied("the customer disabled the key; only they can enable it"),
        "NotFoundException" => denied(
            "the key does not exist in this account and region: check the ARN; a deleted key \
             cannot be brought back",
        ),
        "InvalidGrantTokenException" => {
            denied("the grant was retired or revoked; ask the customer for a new one")
        }

        "ThrottlingException"
        | "Throttling"
        | "RequestLimitExceeded"
        | "LimitExceededException" => {
            unavailable("the account's KMS request quota is used up: raise it or probe less often")
        }
        "DependencyTimeoutException"
        | "KMSInternalException"
        | "KeyUnavailableException"
        | "InternalFailure"
        | "InternalServerError"
        | "InternalError"
        | "ServiceUnavailable"
        | "ServiceUnavailableException" => {
            unavailable("KMS has a fault of its own: wait, and see the AWS health dashboard")
        }

        "ExpiredToken" | "ExpiredTokenException" => {
            credentials("our credentials expired: see why they were not renewed")
        }
        "UnrecognizedClient"
        | "UnrecognizedClientException"
        | "InvalidClientTokenId"
        | "MissingAuthenticationToken"
        | "MissingAuthenticationTokenException" => {
            credentials("AWS does not know our credentials: check the role or access key")
        }
        "IncompleteSignature" | "IncompleteSignatureException" | "InvalidSignature" => {
            credentials("our signature is wrong: check the secret key and the clock")
        }
        code if is_signature_error(code) => {
            credentials("our signature is wrong: check this machine's clock, then the secret key")
        }

        "InvalidCiphertextException" => mismatch(
            "the wrapped key or its context is not what KMS made: restore the volume's header from \
             a backup",
        ),
        "IncorrectKeyException" => mismatch(
            "the wrapped key belongs to another KMS key than the header says: restore the volume's \
             header from a backup",
        ),
        "InvalidKeyUsageException" => mismatch(
            "the key is not a symmetric ENCRYPT_DECRYPT key: use one whose key spec is \
             SYMMETRIC_DEFAULT",
        ),

        _ => Judgement {
            known: false,
            ..unavailable("KMS gave an error that byokd does not know: report it, with its message")
        },
    }
}

/// `KMSInvalidStateException` alone decides nothing: for external and CloudHSM key stores it
/// covers every failure, a slow proxy included. A key state that decides comes first, then the
/// message.
fn judge_invalid_state(
    message: &str,
    key_state: Option<&str>,
    store: DisconnectedStore,
) -> Judgement {
    match key_state {
        Some("PendingDeletion" | "PendingReplicaDeletion") => {
            return denied(
                "the customer scheduled the key's deletion: they can cancel it and enable the key \
                 until the waiting period ends",
            );
        }
        Some("PendingImport") => {
            return denied(
                "the key's material was deleted or expired; the customer must import it",
            );
        }
        Some("Disabled") => {
            return denied("the customer disabled the key; only they can enable it");
        }
        Some("Unavailable") => {
            let remedy = "the custom key store that holds the key is disconnected: the customer \
                          must connect it";
            return match store {
                DisconnectedStore::Denied => denied(remedy),
                DisconnectedStore::Unavailable => unavailable(remedy),
            };
        }
        Some("Creating" | "Updating") => {
            return unavailable("KMS is still working on the key: wait");
        }
        // Enabled, a state that KMS got since, or no answer: the message is all there is.
        Some(_) | None => {}
    }
    let message = message.to_ascii_lowercase();
    let says = |phrases: &[&str]| phrases.iter().any(|phrase| message.contains(phrase));
    if says(&NO_ANSWER_FROM_STORE) {
        unavailable("the external key store does not answer in time: the customer must look at it")
    } else if says(&REFUSED_BY_STORE) {
        denied("the customer's external key manager refuses the key; only they can allow it")
    } else if says(&STATE_IN_WORDS) {
        denied("the customer took the key out of use; only they can bring it back")
    } else {
        Judgement {
            known: false,
            ..unavailable("the key's state is unclear: see what DescribeKey says of it")
        }
    }
}

/// Words of "Troubleshooting external key stores" for a store that could not be asked.
const NO_ANSWER_FROM_STORE: [&str; 5] =
    ["did not respond in time", "cannot communicate", "unhealthy", "tls", "timed out"];
/// Words of the same page for a store that said no.
const REFUSED_BY_STORE: [&str; 3] =
    ["external key is not enabled", "could not find the external key", "denied access"];
/// How KMS words a key state, for when `DescribeKey` may not be asked.
const STATE_IN_WORDS: [&str; 4] =
    ["pending deletion", "pending import", "pending replica deletion", "is disabled"];

fn judge_unproven(unproven: Unproven) -> Judgement {
    match unproven {
        Unproven::Replayed => unavailable(
            "an answer of KMS came a second time: look for a cache or a proxy on the way",
        ),
        Unproven::NoCode | Unproven::Garbled => unavailable(
            "something other than KMS answered: look for a proxy or load balancer on the way, and \
             at the endpoint setting",
        ),
        Unproven::Empty => unavailable(
            "the answer proves nothing: look for a proxy on the way, and at the endpoint setting",
        ),
        Unproven::OtherKey | Unproven::OtherPlaintext => mismatch(
            "KMS unwrapped another key than the header promises: restore the volume's header from \
             a backup, and check the endpoint setting",
        ),
    }
}

fn judge_transport(transport: Transport) -> Judgement {
    match transport {
        Transport::Timeout => unavailable("KMS did not answer in time: check the network to it"),
        Transport::Dns => unavailable("the name of the KMS endpoint has no address: check DNS"),
        Transport::Connect => {
            unavailable("no connection to KMS: check routes, firewall and the VPC endpoint")
        }
        Transport::Tls => unavailable(
            "no TLS with KMS: check the endpoint setting, the trusted certificates and proxies on \
             the way",
        ),
        Transport::Reset => {
            unavailable("the connection to KMS broke: check the network and proxies on the way")
        }
        Transport::NoCredentials => credentials(
            "no AWS credentials: check the pod's or instance's role, the profile, and, if a role \
             is assumed, its trust policy and external id",
        ),
        Transport::Configuration => credentials(
            "the KMS client's settings do not fit together: check region, endpoint and FIPS",
        ),
    }
}

const fn denied(remedy: &'static str) -> Judgement {
    Judgement { verdict: Verdict::Denied, remedy, known: true }
}

const fn unavailable(remedy: &'static str) -> Judgement {
    Judgement { verdict: Verdict::Unavailable, remedy, known: true }
}

const fn credentials(remedy: &'static str) -> Judgement {
    Judgement { verdict: Verdict::Credentials, remedy, known: true }
}

const fn mismatch(remedy: &'static str) -> Judgement {
    Judgement { verdict: Verdict::Mismatch, remedy, known: true }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn code(code: &str) -> Answer<'_> {
        Answer::Error { code, message: "", key_state: None }
    }

    fn invalid_state<'a>(key_state: Option<&'a str>, message: &'a str) -> Answer<'a> {
        Answer::Error { code: "KMSInvalidStateException", message, key_state }
    }

    /// The table, row by row: what says so, and what it means.
    #[test]
    fn every_row_of_the_table_has_its_verdict() {
        use Verdict::{Credentials, Denied, Mismatch, Unavailable};
        let rows: &[(Answer<'_>, Verdict)] = &[
            // The customer took the key away.
            (code("AccessDeniedException"), Denied),
            (code("DisabledException"), Denied),
            (code("NotFoundException"), Denied),
            (code("InvalidGrantTokenException"), Denied),
            (invalid_state(Some("PendingDeletion"), ""), Denied),
            (invalid_state(Some("PendingImport"), ""), Denied),
            (invalid_state(Some("PendingReplicaDeletion"), ""), Denied),
            (invalid_state(Some("Disabled"), ""), Denied),
            (invalid_state(None, "arn:aws:kms:x is pending deletion."), Denied),
            (invalid_state(None, "arn:aws:kms:x is pending import."), Denied),
            // No answer.
            (Answer::Transport(Transport::Timeout), Unavailable),
            (Answer::Transport(Transport::Dns), Unavailable),
            (Answer::Transport(Transport::Connect), Unavailable),
            (Answer::Transport(Transport::Tls), Unavailable),
            (Answer::Transport(Transport::Reset), Unavailable),
            // KMS cannot answer.
            (code("ThrottlingException"), Unavailable),
            (code("RequestLimitExceeded"), Unavailable),
            (code("DependencyTimeoutException"), Unavailable),
            (code("KMSInternalException"), Unavailable),
            (code("KeyUnavailableException"), Unavailable),
            (code("InternalFailure"), Unavailable),
            (code("ServiceUnavailable"), Unavailable),
            (invalid_state(Some("Creating"), ""), Unavailable),
            (invalid_state(Some("Updating"), ""), Unavailable),
            (invalid_state(None, ""), Unavailable),
            (invalid_state(Some("Enabled"), "something new"), Unavailable),
            // Ours.
            (code("ExpiredToken"), Credentials),
            (code("ExpiredTokenException"), Credentials),
            (code("UnrecognizedClientException"), Credentials),
            (code("InvalidClientTokenId"), Credentials),
            (code("InvalidSignatureException"), Credentials),
            (code("SignatureDoesNotMatch"), Credentials),
            (code("RequestTimeTooSkewed"), Credentials),
            (code("MissingAuthenticationTokenException"), Credentials),
            (Answer::Transport(Transport::NoCredentials), Credentials),
            (Answer::Transport(Transport::Configuration), Credentials),
            // Header damaged or swapped.
            (code("InvalidCiphertextException"), Mismatch),
            (code("IncorrectKeyException"), Mismatch),
            (code("InvalidKeyUsageException"), Mismatch),
            (Answer::Unproven(Unproven::OtherKey), Mismatch),
            (Answer::Unproven(Unproven::OtherPlaintext), Mismatch),
            // HTTP 200 is no proof, and neither is HTTP 403.
            (Answer::Unproven(Unproven::Empty), Unavailable),
            (Answer::Unproven(Unproven::Garbled), Unavailable),
            (Answer::Unproven(Unproven::NoCode), Unavailable),
        ];
        for (answer, verdict) in rows {
            let judgement = judge(*answer, DisconnectedStore::default());
            assert_eq!(judgement.verdict, *verdict, "{answer:?}");
            assert!(!judgement.remedy.is_empty(), "{answer:?}");
        }
    }

    #[test]
    fn an_external_key_store_is_judged_by_its_message() {
        for (message, verdict) in [
            ("KMS rejected the request because the external key is not enabled.", Verdict::Denied),
            ("The external key store proxy could not find the external key.", Verdict::Denied),
            ("The external key store proxy denied access to the operation.", Verdict::Denied),
            ("The external key store proxy did not respond in time.", Verdict::Unavailable),
            ("KMS cannot communicate with the external key store proxy.", Verdict::Unavailable),
            ("The external key store proxy is unhealthy.", Verdict::Unavailable),
            ("The TLS connection to the proxy failed.", Verdict::Unavailable),
        ] {
            for state in [Some("Enabled"), None] {
                let judgement = judge(invalid_state(state, message), DisconnectedStore::default());
                assert_eq!(judgement.verdict, verdict, "{message}");
            }
        }
    }

    #[test]
    fn a_disconnected_key_store_is_judged_by_the_setting() {
        let answer = invalid_state(Some("Unavailable"), "");
        assert_eq!(judge(answer, DisconnectedStore::default()).verdict, Verdict::Denied);
        assert_eq!(judge(answer, DisconnectedStore::Unavailable).verdict, Verdict::Unavailable);
    }

    #[test]
    fn an_unknown_code_is_no_verdict_and_says_that_it_is_unknown() {
        for unknown in ["", "Teapot", "ValidationException", "disabledexception", "Denied"] {
            let judgement = judge(code(unknown), DisconnectedStore::default());
            assert_eq!((judgement.verdict, judgement.known), (Verdict::Unavailable, false));
        }
    }
}
