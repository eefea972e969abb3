//! What an error of the SDK says, taken out of its types: a code of KMS, an answer that proves
//! nothing, or why there was none.

use std::error::Error;

use aws_credential_types::provider::error::CredentialsError;
use aws_sdk_kms::error::{ProvideErrorMetadata, SdkError};
use aws_sdk_kms::operation::RequestId;
use aws_smithy_runtime_api::client::orchestrator::HttpResponse;
use aws_smithy_runtime_api::client::result::ConnectorError;
use tracing::warn;

use crate::clock::now;
use crate::key::lease::{DisconnectedStore, Moment, Whose};
use crate::key::wrapped::KeyArn;
use crate::kms::verdict::{self, Answer, Transport, Unproven};
use crate::kms::{KmsError, Operation};

/// What an SDK error says, taken out of its types.
pub(super) struct Words {
    pub(super) kind: Kind,
    pub(super) code: String,
    message: String,
    request_id: Option<String>,
    came: Moment,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Code,
    Unproven(Unproven),
    Transport(Transport),
}

impl Words {
    pub(super) fn of<E>(error: &SdkError<E, HttpResponse>) -> Self
    where
        E: ProvideErrorMetadata + Error + 'static,
    {
        let came = now();
        let request_id = error.request_id().map(ToOwned::to_owned);
        let transport = |transport| (Kind::Transport(transport), chain_text(error));
        let (kind, message) = match error {
            SdkError::ServiceError(answer) => match answer.err().code() {
                Some(code) if !code.is_empty() => {
                    let message = answer.err().message().unwrap_or_default().to_owned();
                    let code = code.to_owned();
                    return Self { kind: Kind::Code, code, message, request_id, came };
                }
                // The SDK's word for an answer it cannot parse is an error without a code.
                Some(_) | None if answer.raw().status().is_success() => {
                    (Kind::Unproven(Unproven::Garbled), excerpt(answer.raw()))
                }
                Some(_) | None => (Kind::Unproven(Unproven::NoCode), excerpt(answer.raw())),
            },
            SdkError::ResponseError(answer) => {
                (Kind::Unproven(Unproven::Garbled), excerpt(answer.raw()))
            }
            SdkError::TimeoutError(_) => transport(Transport::Timeout),
            SdkError::DispatchFailure(failure) => {
                let kind = failure
                    .as_connector_error()
                    .map_or(Kind::Transport(Transport::Connect), kind_of);
                (kind, chain_text(error))
            }
            // And what the SDK may add.
            SdkError::ConstructionFailure(_) | _ => transport(Transport::Configuration),
        };
        let code = match kind {
            Kind::Code => String::new(),
            Kind::Unproven(unproven) => unproven.code().to_owned(),
            Kind::Transport(transport) => transport.code().to_owned(),
        };
        Self { kind, code, message, request_id, came }
    }

    /// The answer's request id, if it has one.
    pub(super) fn request_id(&self) -> Option<String> {
        self.request_id.clone()
    }

    /// Whether the message is about another KMS key than `arn`.
    pub(super) fn names_another_key(&self, arn: &KeyArn) -> bool {
        let words =
            self.message.split(|c: char| !(c.is_ascii_alphanumeric() || ":/-_.".contains(c)));
        let mut keys = words
            .map(|word| word.trim_end_matches(['.', ':']))
            .filter(|word| {
                word.starts_with("arn:") && word.contains(":kms:") && word.contains(":key/")
            })
            .peekable();
        keys.peek().is_some() && keys.all(|key| key != arn.as_str())
    }

    pub(super) fn judged(
        self,
        operation: Operation,
        arn: &KeyArn,
        key_state: Option<&str>,
        store: DisconnectedStore,
    ) -> KmsError {
        let answer = match self.kind {
            Kind::Code => Answer::Error { code: &self.code, message: &self.message, key_state },
            Kind::Unproven(unproven) => Answer::Unproven(unproven),
            Kind::Transport(transport) => Answer::Transport(transport),
        };
        let judgement = verdict::judge(answer, store);
        if !judgement.known {
            warn!(%operation, key = %arn, code = self.code, kms_message = self.message,
                request_id = self.request_id, "KMS gave an answer that decides nothing");
        }
        KmsError {
            operation,
            key: arn.clone(),
            code: self.code,
            message: self.message,
            request_id: self.request_id,
            verdict: judgement.verdict,
            remedy: judgement.remedy.to_owned(),
            whose: Whose::Unknown,
            came: self.came,
        }
    }
}

/// What a failure below the KMS protocol was. Only [`Transport::NoCredentials`] and
/// [`Transport::Configuration`] differ in verdict from the rest.
fn kind_of(error: &ConnectorError) -> Kind {
    if chain(error).any(|cause| cause.is::<CredentialsError>()) {
        return Kind::Transport(Transport::NoCredentials);
    }
    if error.is_timeout() {
        return Kind::Transport(Transport::Timeout);
    }
    if let Some(kind) = chain(error).find_map(kind_of_cause) {
        return kind;
    }
    if error.is_io() {
        return Kind::Transport(Transport::Connect);
    }
    // No connection was tried: there were no credentials in time (a private type of the SDK, so
    // its text has to do), or there is no usable endpoint.
    if chain_text(error).contains("identity resolver timed out") {
        return Kind::Transport(Transport::NoCredentials);
    }
    Kind::Transport(Transport::Configuration)
}

fn kind_of_cause(cause: &(dyn Error + 'static)) -> Option<Kind> {
    use std::io::ErrorKind;
    if let Some(http) = cause.downcast_ref::<hyper::Error>() {
        if http.is_parse() {
            return Some(Kind::Unproven(Unproven::Garbled));
        }
        if http.is_incomplete_message() || http.is_closed() || http.is_canceled() {
            return Some(Kind::Transport(Transport::Reset));
        }
    }
    let io = cause.downcast_ref::<std::io::Error>()?;
    let broken = matches!(
        io.kind(),
        ErrorKind::ConnectionReset
            | ErrorKind::ConnectionAborted
            | ErrorKind::BrokenPipe
            | ErrorKind::UnexpectedEof
    );
    if broken {
        Some(Kind::Transport(Transport::Reset))
    } else if io.kind() == ErrorKind::InvalidData {
        // What tokio-rustls makes of every protocol error of rustls.
        Some(Kind::Transport(Transport::Tls))
    } else if io.to_string().contains("failed to lookup address") {
        Some(Kind::Transport(Transport::Dns))
    } else {
        None
    }
}

/// The error and its causes, those inside an [`std::io::Error`] included.
fn chain<'a>(error: &'a (dyn Error + 'static)) -> impl Iterator<Item = &'a (dyn Error + 'static)> {
    std::iter::successors(Some(error), |&error| match error.downcast_ref::<std::io::Error>() {
        Some(io) => io.get_ref().map(|inner| inner as &(dyn Error + 'static)),
        None => error.source(),
    })
}

/// The chain in words, outermost first, each said once.
fn chain_text(error: &(dyn Error + 'static)) -> String {
    let mut text = String::new();
    for cause in chain(error) {
        let words = cause.to_string();
        if !text.contains(&words) {
            if !text.is_empty() {
                text.push_str(": ");
            }
            text.push_str(&words);
        }
    }
    text
}

/// The status and the beginning of an answer that is not KMS's. It is an error or unreadable, so
/// it holds no plaintext that we asked for; only its printable characters are kept.
fn excerpt(answer: &HttpResponse) -> String {
    let status = answer.status().as_u16();
    if answer.status().is_success() {
        return format!("HTTP {status} with a body that is not an answer of KMS");
    }
    let body = answer.body().bytes().unwrap_or_default();
    let begin = body.get(..EXCERPT).unwrap_or(body);
    let text: String = String::from_utf8_lossy(begin)
        .chars()
        .map(|c| if c.is_control() || c == char::REPLACEMENT_CHARACTER { ' ' } else { c })
        .collect();
    format!("HTTP {status} without an error code: {}", text.trim())
}

/// Enough to recognise whose error page it is.
const EXCERPT: usize = 120;
