//! The HTTP client under the KMS client: bounded answers, wiped answers, and connections that are
//! new when they must be.
//!
//! A Decrypt answer holds the volume key in base64. The SDK keeps the body of an answer in
//! reference-counted buffers that it drops without wiping; here each body is read into a buffer of
//! our own, which is wiped when the SDK drops it, and the frames it came in are wiped as soon as
//! nobody else holds them.
//!
//! What is out of reach: rustls decrypts records in a buffer of its own and hands them on by copy.
//! Both are freed, unwiped, when the connection ends. So calls that carry a volume key use
//! [`Reuse::Never`]: their connection, and with it those buffers, ends with the call.

use std::sync::LazyLock;
use std::time::Duration;

use aws_smithy_http_client::{Builder, tls};
use aws_smithy_runtime_api::client::http::{
    HttpClient, HttpConnector, HttpConnectorFuture, HttpConnectorSettings, SharedHttpClient,
    SharedHttpConnector,
};
use aws_smithy_runtime_api::client::orchestrator::{HttpRequest, HttpResponse};
use aws_smithy_runtime_api::client::result::ConnectorError;
use aws_smithy_runtime_api::client::runtime_components::RuntimeComponents;
use aws_smithy_types::body::SdkBody;
use bytes::Bytes;
use http_body_util::BodyExt;
use zeroize::{Zeroize, Zeroizing};

/// Whether connections are kept for the next call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Reuse {
    /// They are pooled.
    Pooled,
    /// Each call opens its own, which ends with the call.
    Never,
}

/// The longest answer that is read. KMS's own are under 16 KiB; whatever is longer is not KMS.
const LONGEST_ANSWER: usize = 256 << 10;

/// An HTTP client for KMS.
pub(super) fn client(reuse: Reuse) -> SharedHttpClient {
    let builder = match reuse {
        Reuse::Pooled => Builder::new(),
        Reuse::Never => Builder::new().pool_max_idle_per_host(0),
    };
    let provider = tls::Provider::Rustls(tls::rustls_provider::CryptoMode::AwsLc);
    // Without any, asking for the machine's certificates panics in some builds, also for `http:`.
    let trusted = tls::TrustStore::empty().with_native_roots(has_roots());
    let context = tls::TlsContext::builder().with_trust_store(trusted).build();
    let context = context.expect("no certificate was given that could be wrong");
    let inner = builder.tls_provider(provider).tls_context(context).build_https();
    SharedHttpClient::new(Wiping { inner, reuse })
}

/// Whether this machine has certificates to know an HTTPS server by.
pub(super) fn has_roots() -> bool {
    static HAS: LazyLock<bool> =
        LazyLock::new(|| !rustls_native_certs::load_native_certs().certs.is_empty());
    *HAS
}

#[derive(Debug)]
struct Wiping {
    inner: SharedHttpClient,
    reuse: Reuse,
}

impl HttpClient for Wiping {
    fn http_connector(
        &self,
        settings: &HttpConnectorSettings,
        components: &RuntimeComponents,
    ) -> SharedHttpConnector {
        let inner = self.inner.http_connector(settings, components);
        SharedHttpConnector::new(WipingConnector { inner, reuse: self.reuse })
    }
}

#[derive(Debug)]
struct WipingConnector {
    inner: SharedHttpConnector,
    reuse: Reuse,
}

impl HttpConnector for WipingConnector {
    fn call(&self, request: HttpRequest) -> HttpConnectorFuture {
        let answer = self.inner.call(request);
        let reuse = self.reuse;
        HttpConnectorFuture::new(async move {
            let mut response = answer.await?;
            let body = response.take_body();
            let (body, frames) = read(body).await?;
            let own = with_own_head(&response, body);
            drop(response);
            let held = wipe(frames, reuse).await;
            if held > 0 && reuse == Reuse::Never {
                tracing::debug!(held, "frames of a KMS answer are held by its connection");
            }
            Ok::<HttpResponse, ConnectorError>(own)
        })
    }
}

/// The body in a buffer that wipes itself, and the frames it came in.
async fn read(mut body: SdkBody) -> Result<(SdkBody, Vec<Bytes>), ConnectorError> {
    let mut frames = Vec::new();
    let mut len = 0usize;
    while let Some(frame) = body.frame().await {
        // Trailers are not of interest.
        if let Ok(data) = frame.map_err(ConnectorError::io)?.into_data() {
            len = len.saturating_add(data.len());
            frames.push(data);
        }
        if len > LONGEST_ANSWER {
            return Err(ConnectorError::io(
                format!("the answer is longer than {LONGEST_ANSWER} bytes").into(),
            ));
        }
    }
    // Its full size from the start: growing would leave unwiped copies behind.
    let mut whole = Zeroizing::new(Vec::with_capacity(len));
    for frame in &frames {
        whole.extend_from_slice(frame);
    }
    Ok((SdkBody::from(Bytes::from_owner(whole)), frames))
}

/// The response with `body`, its head in memory of its own: the values of hyper's headers are
/// slices of the buffer that the body came in as well, and would keep it from being wiped.
fn with_own_head(response: &HttpResponse, body: SdkBody) -> HttpResponse {
    let mut own = HttpResponse::new(response.status(), body);
    for (name, value) in response.headers() {
        // What was a header before is one still.
        let _is_header = own.headers_mut().try_append(name.to_owned(), value.to_owned());
    }
    own
}

/// Wipes the frames that nobody else holds. A connection that is not reused lets go of them a
/// moment after its last frame, so that is waited for, briefly.
///
/// Returns how many of them are still held.
async fn wipe(frames: Vec<Bytes>, reuse: Reuse) -> usize {
    let mut shared = frames;
    for turn in 0..WIPE_TURNS {
        shared = shared
            .into_iter()
            .filter_map(|frame| match frame.try_into_mut() {
                Ok(mut ours) => {
                    ours.zeroize();
                    None
                }
                Err(shared) => Some(shared),
            })
            .collect();
        if shared.is_empty() || reuse == Reuse::Pooled {
            return shared.len();
        }
        match turn {
            0..16 => tokio::task::yield_now().await,
            _ => tokio::time::sleep(Duration::from_millis(1)).await,
        }
    }
    shared.len()
}

/// How often it is tried: sixteen turns of the scheduler, which is enough in practice, then 20 ms.
const WIPE_TURNS: u32 = 36;

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_body_is_bounded() {
        let fits = SdkBody::from(vec![1; LONGEST_ANSWER]);
        let (body, _) = read(fits).await.expect("it fits");
        assert_eq!(body.bytes().map(<[u8]>::len), Some(LONGEST_ANSWER));
        read(SdkBody::from(vec![1; LONGEST_ANSWER + 1])).await.expect_err("too long");
    }

    #[tokio::test]
    async fn the_head_of_an_answer_does_not_keep_its_frames_from_being_wiped() {
        let buffer = Bytes::from(b"7a1f{}".to_vec());
        let id = hyper::http::HeaderValue::from_maybe_shared(buffer.slice(..4)).unwrap();
        let answer = hyper::http::Response::builder().header("x-amzn-requestid", id);
        let answer = answer.body(SdkBody::taken()).unwrap();
        let answer = HttpResponse::try_from(answer).unwrap();
        let own = with_own_head(&answer, SdkBody::empty());
        drop(answer);
        let frame = buffer.slice(4..);
        drop(buffer);
        assert_eq!(wipe(vec![frame], Reuse::Never).await, 0);
        assert_eq!(own.headers().get("x-amzn-requestid"), Some("7a1f"));
    }

    #[tokio::test]
    async fn frames_are_wiped_once_nobody_else_holds_them() {
        let ours = Bytes::from(vec![7; 100]);
        assert_eq!(wipe(vec![ours], Reuse::Never).await, 0);
        let shared = Bytes::from(vec![7; 100]);
        let other = shared.clone();
        assert_eq!(wipe(vec![shared], Reuse::Pooled).await, 1);
        // Let go of a little later, as a closing connection does.
        let held = tokio::spawn(async move {
            tokio::time::sleep(Duration::from_millis(3)).await;
            drop(other);
        });
        let again = Bytes::from(vec![7; 100]);
        let late = again.clone();
        let letting_go = tokio::spawn(async move {
            tokio::time::sleep(Duration::from_millis(3)).await;
            drop(late);
        });
        assert_eq!(wipe(vec![again], Reuse::Never).await, 0);
        letting_go.await.unwrap();
        held.await.unwrap();
    }
}
