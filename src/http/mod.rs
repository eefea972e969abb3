//! Metrics, health, the JSON API and the console over HTTP/1.1, to look at and nothing else: on an
//! address, with TLS if it is not for this machine alone, a unix socket, or both, with a token where
//! the settings say so.
//!
//! Who can reach a loopback address can be any user of this machine, and a page in somebody's
//! browser: `admission` says who may see what. Whatever a client does, it takes bounded memory,
//! and answers are made from memory alone, so nobody waits for KMS or a disk.

mod admission;
mod api;
mod console;
mod tls;

use std::future::{Future, ready};
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::header::{
    ALLOW, CACHE_CONTROL, CONTENT_TYPE, HeaderValue, WWW_AUTHENTICATE, X_CONTENT_TYPE_OPTIONS,
};
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, UnixListener};
use tokio::sync::Semaphore;
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tracing::{debug, info, warn};

use crate::config::HttpConfig;
use crate::daemon::Daemon;
use crate::http::admission::{Admission, Refusal, TokenError};
use crate::http::tls::{Tls, TlsError};
use crate::listener::{BoundSocket, Peers, bind};
use crate::metrics;

/// Connections served at a time; more wait. A few Prometheus servers and some people.
const CONNECTIONS: usize = 64;

/// How long a client may take to send a request's head, and to ask for more.
const HEAD_LIMIT: Duration = Duration::from_secs(90);

/// How long a TLS handshake may take; as long as a client may keep others waiting elsewhere.
const HANDSHAKE_LIMIT: Duration = Duration::from_secs(10);

/// How long a connection lasts: a client that takes no answer keeps its place no longer.
const CONNECTION_LIMIT: Duration = Duration::from_secs(3600);

/// The longest head; browsers send less than 4 KiB.
const LONGEST_HEAD: usize = 16 << 10;

/// Why metrics and health cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum HttpError {
    /// The token's file.
    #[error("cannot take the token from {}: {source}", path.display())]
    Token {
        /// The file.
        path: PathBuf,
        /// Why.
        source: TokenError,
    },
    /// The certificate or its key.
    #[error("cannot serve TLS: {0}")]
    Tls(#[from] TlsError),
    /// The address or socket.
    #[error("cannot serve HTTP on {at}: {source}")]
    Listen {
        /// Where.
        at: String,
        /// Why.
        source: io::Error,
    },
}

/// The tasks that serve it; dropping it ends them and removes the socket.
pub struct Http {
    tasks: Vec<JoinHandle<()>>,
    address: Option<SocketAddr>,
    _socket: Option<BoundSocket>,
}

impl Drop for Http {
    fn drop(&mut self) {
        self.tasks.iter().for_each(JoinHandle::abort);
    }
}

impl Http {
    /// Serves what `settings` ask for; nothing if they ask for nothing.
    ///
    /// # Errors
    /// The token or the certificate cannot be read, or the address or socket cannot be had.
    pub async fn start(settings: &HttpConfig, daemon: &Arc<Daemon>) -> Result<Self, HttpError> {
        let mut http = Self { tasks: Vec::new(), address: None, _socket: None };
        let admission = Admission::of(settings.token_file.as_deref()).map_err(|source| {
            let path = settings.token_file.clone().unwrap_or_default();
            HttpError::Token { path, source }
        })?;
        let tls = match (&settings.certificate, &settings.certificate_key) {
            (Some(certificate), Some(key)) => Some(Arc::new(Tls::of(certificate, key)?)),
            // The settings have both or neither.
            (Some(_) | None, _) => None,
        };
        let site = Arc::new(Site {
            daemon: Arc::clone(daemon),
            admission,
            tls,
            room: Arc::new(Semaphore::new(CONNECTIONS)),
        });
        if let Some(address) = settings.listen {
            let failed = |source| HttpError::Listen { at: address.to_string(), source };
            let listener = TcpListener::bind(address).await.map_err(failed)?;
            let bound = listener.local_addr().map_err(failed)?;
            info!(%bound, tls = site.tls.is_some(), "serving metrics and health");
            http.address = Some(bound);
            http.tasks.push(tokio::spawn(accept_tcp(listener, Arc::clone(&site))));
            if let Some(tls) = &site.tls {
                http.tasks.push(tokio::spawn(Arc::clone(tls).keep_current()));
            }
        }
        if let Some(path) = &settings.socket {
            let (listener, peers, socket) = listen_unix(path, settings.group.as_deref())
                .map_err(|source| HttpError::Listen { at: path.display().to_string(), source })?;
            http._socket = Some(socket);
            http.tasks.push(tokio::spawn(accept_unix(listener, peers, site)));
        }
        Ok(http)
    }

    /// Where it is served, if on TCP.
    #[must_use]
    pub fn address(&self) -> Option<SocketAddr> {
        self.address
    }
}

fn listen_unix(path: &Path, group: Option<&str>) -> io::Result<(UnixListener, Peers, BoundSocket)> {
    let peers = Peers::of(None, group)?;
    let (listener, socket) = bind(path, &peers)?;
    Ok((listener, peers, socket))
}

/// What every connection shares.
struct Site {
    daemon: Arc<Daemon>,
    admission: Admission,
    /// For connections by TCP, if they have TLS.
    tls: Option<Arc<Tls>>,
    room: Arc<Semaphore>,
}

async fn accept_tcp(listener: TcpListener, site: Arc<Site>) {
    loop {
        match listener.accept().await {
            Ok((stream, _)) => match &site.tls {
                Some(tls) => converse(tls.acceptor().accept(stream), &site).await,
                None => converse(ready(Ok(stream)), &site).await,
            },
            Err(error) => pause(&error).await,
        }
    }
}

async fn accept_unix(listener: UnixListener, peers: Peers, site: Arc<Site>) {
    loop {
        match listener.accept().await {
            Ok((stream, _)) if stream.peer_cred().is_ok_and(|peer| peers.may(&peer)) => {
                converse(ready(Ok(stream)), &site).await;
            }
            Ok(_) => warn!("HTTP connection refused: its user is not in the socket's group"),
            Err(error) => pause(&error).await,
        }
    }
}

/// So that a lack of descriptors is not answered by spinning.
async fn pause(error: &io::Error) {
    warn!(%error, "cannot accept an HTTP connection");
    tokio::time::sleep(Duration::from_millis(100)).await;
}

/// Serves one connection, which may have to be secured first, in a task of its own, once there is
/// room.
async fn converse<S>(
    secured: impl Future<Output = io::Result<S>> + Send + 'static,
    site: &Arc<Site>,
) where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let Ok(room) = Arc::clone(&site.room).acquire_owned().await else { return };
    let site = Arc::clone(site);
    tokio::spawn(async move {
        let stream = match timeout(HANDSHAKE_LIMIT, secured).await {
            Ok(Ok(stream)) => stream,
            Ok(Err(error)) => return debug!(%error, "no TLS with a client"),
            Err(_) => return debug!("a client did not end its TLS handshake in time"),
        };
        let service = service_fn(move |request| {
            let site = Arc::clone(&site);
            async move { Ok::<_, std::convert::Infallible>(site.answer(&request).await) }
        });
        let mut server = hyper::server::conn::http1::Builder::new();
        server.timer(TokioTimer::new()).header_read_timeout(HEAD_LIMIT).max_buf_size(LONGEST_HEAD);
        let served = server.serve_connection(TokioIo::new(stream), service);
        match timeout(CONNECTION_LIMIT, served).await {
            Ok(Ok(())) | Err(_) => {}
            Ok(Err(error)) => debug!(%error, "HTTP connection ended"),
        }
        drop(room);
    });
}

impl Site {
    async fn answer(&self, request: &Request<Incoming>) -> Response<Full<Bytes>> {
        let path = request.uri().path();
        let mut answer = match self.refuses(request, path) {
            Some(refusal) => refuse(&refusal),
            None if !matches!(*request.method(), Method::GET | Method::HEAD) => {
                let why = "This only answers GET and HEAD.\n";
                let mut page = plain(StatusCode::METHOD_NOT_ALLOWED, why.to_owned());
                page.headers_mut().insert(ALLOW, HeaderValue::from_static("GET, HEAD"));
                page
            }
            None => self.page(path, request.uri().query().unwrap_or_default()).await,
        };
        let headers = answer.headers_mut();
        headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
        headers.insert(X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
        answer
    }

    fn refuses(&self, request: &Request<Incoming>, path: &str) -> Option<Refusal> {
        // Whoever watches over the process has no token, and learns only whether all is well.
        if matches!(path, "/livez" | "/readyz") {
            return None;
        }
        let refusal = self.admission.refuses(request.headers())?;
        // The page that asks for the token, and what says how to ask, tell of nothing.
        let no_data = path == api::OPENAPI_PATH || console::file(path).is_some();
        (refusal != Refusal::Token || !no_data).then_some(refusal)
    }

    async fn page(&self, path: &str, query: &str) -> Response<Full<Bytes>> {
        if let Some(file) = console::file(path) {
            return file;
        }
        if path == api::OPENAPI_PATH {
            return typed(StatusCode::OK, api::OPENAPI.to_owned(), "application/json");
        }
        if let Some(path) = path.strip_prefix("/api/v1/") {
            let (status, text) = api::answer(&self.daemon, path, query).await;
            return typed(status, text, "application/json");
        }
        match path {
            "/metrics" => {
                let expires = self.tls.as_ref().map_or(0, |tls| tls.expires());
                typed(StatusCode::OK, self.daemon.metrics(expires), metrics::CONTENT_TYPE)
            }
            "/livez" => health_of(&self.daemon.not_alive()),
            "/readyz" => health_of(&self.daemon.not_ready()),
            _ => {
                let what = "There are /, /api/v1/openapi.json, /metrics, /livez and /readyz.\n";
                plain(StatusCode::NOT_FOUND, what.to_owned())
            }
        }
    }
}

fn plain(status: StatusCode, text: String) -> Response<Full<Bytes>> {
    typed(status, text, "text/plain; charset=utf-8")
}

fn typed(status: StatusCode, text: String, kind: &'static str) -> Response<Full<Bytes>> {
    let mut answer = Response::new(Full::new(Bytes::from(text)));
    *answer.status_mut() = status;
    answer.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(kind));
    answer
}

/// 200 if there is nothing against it, else 503 and a line for each thing.
fn health_of(against: &[String]) -> Response<Full<Bytes>> {
    if against.is_empty() {
        return plain(StatusCode::OK, "ok\n".to_owned());
    }
    plain(StatusCode::SERVICE_UNAVAILABLE, against.join("\n") + "\n")
}

fn refuse(refusal: &Refusal) -> Response<Full<Bytes>> {
    match refusal {
        Refusal::Token => {
            let why = "Send the token of http.token_file: `Authorization: Bearer TOKEN`.\n";
            let mut answer = plain(StatusCode::UNAUTHORIZED, why.to_owned());
            answer.headers_mut().insert(WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
            answer
        }
        Refusal::Host => {
            let why = "Ask for it by its address or as localhost, or set http.token_file: without \
                       a token any other name may be a web page's trick.\n";
            plain(StatusCode::MISDIRECTED_REQUEST, why.to_owned())
        }
    }
}
