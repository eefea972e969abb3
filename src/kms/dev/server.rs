//! The development KMS on the wire: HTTP/1.1, the AWS operations, `/_dev`, and faults as they
//! look from outside.

use std::collections::VecDeque;
use std::net::IpAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Limited};
use hyper::body::Incoming;
use hyper::header::{AUTHORIZATION, CONTENT_TYPE, DATE, HOST, HeaderValue};
use hyper::service::service_fn;
use hyper::{HeaderMap, Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use uuid::Uuid;

use super::api::{self, Call};
use super::cloudtrail;
use super::faults::{Fault, FaultKind, Faults};
use super::keys::{self, KeyState, KeyStore};
use super::line::{Cut, CutHere, Line, Out};
use super::wire::{self, Exception, Reply};

/// What every connection shares.
pub(super) struct Server {
    pub(super) store: KeyStore,
    pub(super) faults: Faults,
    seen: Mutex<VecDeque<Seen>>,
    connections: AtomicU64,
}

/// One request as the development KMS saw it: what a customer finds in CloudTrail, and a little
/// more.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Seen {
    /// When it came, milliseconds since 1970.
    pub at_ms: i64,
    /// The operation.
    pub operation: String,
    /// The request id it was answered with.
    pub request_id: String,
    /// The id of the key it was about, if it named one.
    pub key: Option<String>,
    /// The encryption context that came with it.
    pub context: Option<Value>,
    /// Which connection it came on, counted from 1.
    pub connection: u64,
    /// The access key id it was signed with.
    pub access_key: Option<String>,
    /// The exception it was answered with, or the fault it met; absent after a success.
    pub error: Option<String>,
}

/// How many requests are remembered: more than any test makes between two looks.
const REMEMBERED: usize = 4096;
/// The longest request: AWS's largest here is a policy of 32 KiB in JSON.
const LONGEST_REQUEST: usize = 256 << 10;
/// Connections served at a time; more wait. Enough for a thousand volumes' probes by turns.
const CONNECTIONS: usize = 256;
/// How long a client may take to send a request's head.
const HEAD_LIMIT: Duration = Duration::from_secs(30);
/// How long a client may take to send a request's body.
const BODY_LIMIT: Duration = Duration::from_secs(30);
/// What AWS allows a signature's date to be off.
const SIGNATURE_AGE: u64 = 5 * 60;

impl Server {
    pub(super) fn new(store: KeyStore) -> Self {
        Self {
            store,
            faults: Faults::default(),
            seen: Mutex::default(),
            connections: AtomicU64::new(0),
        }
    }

    /// Accepts and serves until it is dropped, and every connection with it.
    pub(super) async fn serve(self: Arc<Self>, listener: TcpListener) {
        let places = Arc::new(Semaphore::new(CONNECTIONS));
        let mut connections = JoinSet::new();
        loop {
            while connections.try_join_next().is_some() {}
            let Ok(place) = Arc::clone(&places).acquire_owned().await else {
                return;
            };
            match listener.accept().await {
                Ok((stream, _)) => {
                    let server = Arc::clone(&self);
                    connections.spawn(async move {
                        server.connection(stream).await;
                        drop(place);
                    });
                }
                Err(error) => {
                    // Out of descriptors, most likely: they come back as connections end.
                    tracing::warn!(%error, "the development KMS could not accept a connection");
                    tokio::time::sleep(Duration::from_millis(50)).await;
                }
            }
        }
    }

    async fn connection(self: Arc<Self>, stream: TcpStream) {
        let number = self.connections.fetch_add(1, Ordering::Relaxed) + 1;
        let cut = Cut::default();
        let line = Line::new(stream, cut.clone());
        let service = service_fn(|request| {
            let (server, cut) = (Arc::clone(&self), cut.clone());
            async move { server.request(request, number, &cut).await }
        });
        let served = hyper::server::conn::http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(HEAD_LIMIT)
            // Bodies are written from where they lie, so that a plaintext is not copied.
            .writev(true)
            .serve_connection(TokioIo::new(line), service)
            .await;
        if let Err(error) = served {
            tracing::debug!(%error, "a connection to the development KMS ended early");
        }
    }

    async fn request(
        self: Arc<Self>,
        request: Request<Incoming>,
        connection: u64,
        cut: &Cut,
    ) -> Result<Response<Out>, CutHere> {
        let (head, body) = request.into_parts();
        let body = Limited::new(body, LONGEST_REQUEST).collect();
        let Ok(Ok(body)) = tokio::time::timeout(BODY_LIMIT, body).await else {
            let error = Exception::new("SerializationException", "The body cannot be read.");
            return Ok(exception(&error, &Uuid::new_v4().to_string()));
        };
        let body = body.to_bytes();
        if head.uri.path().starts_with("/_dev") {
            return Ok(self.admin(&head.method, head.uri.path(), &head.headers, &body));
        }
        self.operation(&head.method, &head.headers, body, connection, cut).await
    }

    /// An AWS operation, with whatever fault it is to meet.
    async fn operation(
        self: Arc<Self>,
        method: &Method,
        headers: &HeaderMap,
        body: Bytes,
        connection: u64,
        cut: &Cut,
    ) -> Result<Response<Out>, CutHere> {
        let request_id = Uuid::new_v4().to_string();
        let operation = match check_request(method, headers) {
            Ok(operation) => operation.to_owned(),
            Err(error) => return Ok(exception(&error, &request_id)),
        };
        let key = api::key_id_of(&body);
        let met = self.faults.meet(&operation, key.as_deref());
        let seen = Seen {
            at_ms: jiff::Timestamp::now().as_millisecond(),
            operation: operation.clone(),
            request_id: request_id.clone(),
            key,
            context: context_of(&body),
            connection,
            access_key: access_key(headers),
            error: None,
        };
        tokio::time::sleep(met.delay).await;
        let answered = match (check_clock(headers, met.clock_ahead), &met.fault) {
            (Err(error), _) => Err(error),
            (Ok(()), Some(fault)) if !alters_the_answer(fault.fault) => {
                self.remember(Seen { error: Some(format!("fault {:?}", fault.fault)), ..seen });
                return instead_of_an_answer(fault, &operation, &request_id, cut).await;
            }
            (Ok(()), _) => Arc::clone(&self).run(operation, body, met.key_state).await,
        };
        let error = answered.as_ref().err().map(|error| error.code.clone());
        self.remember(Seen { error, ..seen });
        let mut response = match answered {
            Ok(reply) => success(reply, met.fault.as_ref(), &request_id, cut),
            Err(error) => exception(&error, &request_id),
        };
        if let Some(date) = met.clock_ahead.and_then(http_date) {
            response.headers_mut().insert(DATE, date);
        }
        Ok(response)
    }

    /// Runs an operation where syncing a file holds nobody up.
    async fn run(
        self: Arc<Self>,
        operation: String,
        body: Bytes,
        key_state: Option<KeyState>,
    ) -> Result<Reply, Exception> {
        tokio::task::spawn_blocking(move || {
            Call { store: &self.store, operation: &operation, body: &body, key_state }.run()
        })
        .await
        .unwrap_or_else(|_| Err(Exception::internal("the operation was cancelled")))
    }

    /// What no KMS has: faults on demand, and a look behind.
    fn admin(
        &self,
        method: &Method,
        path: &str,
        headers: &HeaderMap,
        body: &[u8],
    ) -> Response<Out> {
        let plain = |status, value: &Value| {
            answer(status, "application/json", "", Out::whole(value.to_string().into_bytes()))
        };
        // A web page that a browser here shows must not get to set faults.
        if !headers.get(HOST).is_some_and(is_loopback_host) {
            let error = json!({"error": "the Host header does not name a loopback address"});
            return plain(StatusCode::FORBIDDEN, &error);
        }
        match (method, path) {
            (&Method::POST, "/_dev/faults") => match serde_json::from_slice::<Fault>(body) {
                Ok(fault) => match fault.complaint() {
                    None => {
                        self.faults.add(fault);
                        plain(StatusCode::OK, &json!({"faults": self.faults.list()}))
                    }
                    Some(why) => plain(StatusCode::BAD_REQUEST, &json!({"error": why})),
                },
                Err(error) => plain(StatusCode::BAD_REQUEST, &json!({"error": error.to_string()})),
            },
            (&Method::GET, "/_dev/faults") => {
                plain(StatusCode::OK, &json!({"faults": self.faults.list()}))
            }
            (&Method::DELETE, "/_dev/faults") => {
                self.faults.clear();
                plain(StatusCode::OK, &json!({"faults": []}))
            }
            (&Method::GET, "/_dev/keys") => {
                let keys: Vec<Value> = self
                    .store
                    .list()
                    .iter()
                    .map(|key| {
                        json!({
                            "key": key.metadata(key.state),
                            "policy": key.policy.document(),
                            "material_versions": key.versions(),
                        })
                    })
                    .collect();
                plain(StatusCode::OK, &json!({"keys": keys}))
            }
            (&Method::GET, "/_dev/requests") => {
                plain(StatusCode::OK, &json!({"requests": self.requests()}))
            }
            (&Method::GET, "/_dev/cloudtrail") => {
                let seen = self.requests();
                plain(StatusCode::OK, &cloudtrail::records(&seen, &self.store))
            }
            _ => plain(StatusCode::NOT_FOUND, &json!({"error": "no such thing under /_dev"})),
        }
    }

    /// The latest requests, oldest first.
    pub(super) fn requests(&self) -> Vec<Seen> {
        self.seen().iter().cloned().collect()
    }

    fn remember(&self, seen: Seen) {
        let mut list = self.seen();
        if list.len() == REMEMBERED {
            list.pop_front();
        }
        list.push_back(seen);
    }

    fn seen(&self) -> MutexGuard<'_, VecDeque<Seen>> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The operation of a request, if it is one of KMS at all.
fn check_request<'a>(method: &Method, headers: &'a HeaderMap) -> Result<&'a str, Exception> {
    if method != Method::POST {
        return Err(Exception::new("UnknownOperationException", "Only POST is known here."));
    }
    let target = headers.get("x-amz-target").and_then(|target| target.to_str().ok());
    let Some(operation) = target.and_then(|target| target.strip_prefix("TrentService.")) else {
        return Err(Exception::silent("UnknownOperationException"));
    };
    // The signature is not checked, its presence is: a client without credentials must notice.
    if !headers.contains_key(AUTHORIZATION) {
        return Err(Exception::new(
            "MissingAuthenticationTokenException",
            "Missing Authentication Token",
        ));
    }
    Ok(operation)
}

/// Refuses a signature whose date is off, if the clock is `ahead` by that many seconds.
fn check_clock(headers: &HeaderMap, ahead: Option<i64>) -> Result<(), Exception> {
    let Some(ahead) = ahead else {
        return Ok(());
    };
    let there = keys::now().saturating_add(ahead);
    let signed = headers
        .get("x-amz-date")
        .and_then(|date| date.to_str().ok())
        .and_then(|date| jiff::civil::DateTime::strptime("%Y%m%dT%H%M%SZ", date).ok())
        .and_then(|date| date.to_zoned(jiff::tz::TimeZone::UTC).ok())
        .map(|date| date.timestamp().as_second());
    match signed {
        Some(signed) if signed.abs_diff(there) <= SIGNATURE_AGE => Ok(()),
        Some(_) | None => Err(Exception::new(
            "InvalidSignatureException",
            "Signature expired or not yet current: the request's date is too far from the \
             service's.",
        )),
    }
}

/// The `Date` of a clock that is ahead.
fn http_date(ahead: i64) -> Option<HeaderValue> {
    let there = jiff::Timestamp::from_second(keys::now().checked_add(ahead)?).ok()?;
    HeaderValue::from_str(&there.strftime("%a, %d %b %Y %H:%M:%S GMT").to_string()).ok()
}

fn context_of(body: &[u8]) -> Option<Value> {
    #[derive(Deserialize)]
    struct About {
        #[serde(rename = "EncryptionContext")]
        context: Option<Value>,
        #[serde(rename = "DestinationEncryptionContext")]
        destination: Option<Value>,
    }
    let about = wire::parse::<About>(body).ok()?;
    about.context.or(about.destination)
}

fn access_key(headers: &HeaderMap) -> Option<String> {
    let authorization = headers.get(AUTHORIZATION)?.to_str().ok()?;
    let (_, credential) = authorization.split_once("Credential=")?;
    credential.split_once('/').map(|(id, _)| id.to_owned())
}

fn is_loopback_host(host: &HeaderValue) -> bool {
    let Ok(host) = host.to_str() else {
        return false;
    };
    let name = match host.rsplit_once(':') {
        Some((name, port)) if port.bytes().all(|b| b.is_ascii_digit()) => name,
        Some(_) | None => host,
    };
    let address = name.trim_start_matches('[').trim_end_matches(']');
    name.eq_ignore_ascii_case("localhost")
        || address.parse::<IpAddr>().is_ok_and(|address| address.is_loopback())
}

/// Whether a fault lets the operation happen and spoils only its answer.
fn alters_the_answer(fault: FaultKind) -> bool {
    matches!(
        fault,
        FaultKind::ResetMidBody
            | FaultKind::Drip
            | FaultKind::WrongPlaintext
            | FaultKind::WrongKeyArn
    )
}

/// What comes instead of an answer of KMS.
async fn instead_of_an_answer(
    fault: &Fault,
    operation: &str,
    request_id: &str,
    cut: &Cut,
) -> Result<Response<Out>, CutHere> {
    let message = fault.message.clone();
    Ok(match fault.fault {
        FaultKind::Timeout => {
            tokio::time::sleep(fault.ms_or(60_000)).await;
            return Err(CutHere);
        }
        FaultKind::Reset => {
            cut.set();
            return Err(CutHere);
        }
        FaultKind::Throttle => {
            let message = message.unwrap_or_else(|| "Rate exceeded".to_owned());
            exception(&Exception::new("ThrottlingException", message), request_id)
        }
        FaultKind::Http => {
            let status = fault.status.unwrap_or(500);
            match &fault.code {
                Some(code) => {
                    exception(&Exception { status, code: code.clone(), message }, request_id)
                }
                None => {
                    let body = message.unwrap_or_default().into_bytes();
                    answer(status_code(status), "text/plain", request_id, Out::whole(body))
                }
            }
        }
        FaultKind::Garbage => {
            let body = b"\x16\x03{\"Plaintext\": \xff\xfe not json".to_vec();
            answer(StatusCode::OK, JSON, request_id, Out::whole(body))
        }
        FaultKind::Html => {
            let status = status_code(fault.status.unwrap_or(403));
            let page = format!("<html><head><title>{status}</title></head></html>\n");
            // No request id: KMS never saw the request.
            answer(status, "text/html", "", Out::whole(page.into_bytes()))
        }
        FaultKind::Empty200 => answer(StatusCode::OK, JSON, request_id, Out::whole(Vec::new())),
        FaultKind::Alternate => {
            let message = format!(
                "User is not authorized to perform: kms:{operation} (a change of policy that has \
                 not reached every endpoint)"
            );
            exception(&Exception::new("AccessDeniedException", message), request_id)
        }
        // These do not come instead of an answer.
        FaultKind::Latency
        | FaultKind::KeyState
        | FaultKind::ClockSkew
        | FaultKind::ResetMidBody
        | FaultKind::Drip
        | FaultKind::WrongPlaintext
        | FaultKind::WrongKeyArn => {
            exception(&Exception::internal("a fault that is none"), request_id)
        }
    })
}

/// The answer of an operation that succeeded, spoiled if a fault says so.
fn success(mut reply: Reply, fault: Option<&Fault>, request_id: &str, cut: &Cut) -> Response<Out> {
    let kind = fault.map(|fault| fault.fault);
    if kind == Some(FaultKind::WrongPlaintext)
        && let Some(plaintext) = &mut reply.plaintext
    {
        plaintext.iter_mut().for_each(|byte| *byte = !*byte);
    }
    if kind == Some(FaultKind::WrongKeyArn) {
        let arn = format!("arn:aws:kms:xx-fault-1:{}:key/{}", keys::ACCOUNT, Uuid::new_v4());
        reply.members.insert("KeyId".to_owned(), json!(arn));
    }
    let body = reply.body();
    let out = match kind {
        Some(FaultKind::ResetMidBody) => {
            cut.set();
            Out::Broken { body, wait: None }
        }
        Some(FaultKind::Drip) => {
            let pause = fault.map_or(Duration::ZERO, |fault| fault.ms_or(100));
            Out::Drip { body, at: 0, pause, wait: None }
        }
        Some(_) | None => Out::whole(body),
    };
    answer(StatusCode::OK, JSON, request_id, out)
}

const JSON: &str = "application/x-amz-json-1.1";

fn exception(error: &Exception, request_id: &str) -> Response<Out> {
    answer(status_code(error.status), JSON, request_id, Out::whole(error.body()))
}

fn status_code(status: u16) -> StatusCode {
    StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR)
}

fn answer(
    status: StatusCode,
    content_type: &'static str,
    request_id: &str,
    body: Out,
) -> Response<Out> {
    let mut response = Response::new(body);
    *response.status_mut() = status;
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
    if let Ok(id) = HeaderValue::from_str(request_id)
        && !id.is_empty()
    {
        headers.insert("x-amzn-requestid", id);
    }
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_loopback_host_may_set_faults() {
        for (host, loopback) in [
            ("127.0.0.1:4566", true),
            ("localhost", true),
            ("[::1]:80", true),
            ("[::1]", true),
            ("127.9.9.9", true),
            ("example.com", false),
            ("127.0.0.1.example.com:80", false),
            ("localhost.example.com", false),
            ("", false),
        ] {
            assert_eq!(is_loopback_host(&HeaderValue::from_static(host)), loopback, "{host}");
        }
    }
}
