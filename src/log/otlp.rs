//! Lines as OpenTelemetry's log records: their text as the body, their fields as attributes, sent to a
//! collector as protobuf over HTTP.
//!
//! Whoever says something never waits for the collector: records wait in a queue with a bound, and
//! a thread of the SDK's sends them. What does not fit, or is not taken in time, is lost here, and
//! counted in the log, which has all of it. What the exporter itself and the libraries below it say
//! is said on that thread, and is not exported. (The bridge of opentelemetry-appender-tracing knows
//! no bound on a record, and so none on the memory.)

use std::fmt::Debug;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, SystemTime};

use http_body_util::{BodyExt, Full, Limited};
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use opentelemetry::logs::{AnyValue, LogRecord, Logger, LoggerProvider, Severity};
use opentelemetry::{Context as Telemetry, KeyValue};
use opentelemetry_http::{Bytes, HttpClient, HttpError, Request, Response};
use opentelemetry_otlp::{LogExporter, RetryPolicy, WithExportConfig, WithHttpConfig};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::error::OTelSdkResult;
use opentelemetry_sdk::logs::{
    BatchConfigBuilder, BatchLogProcessor, LogBatch, LogExporter as Exports, SdkLogRecord,
    SdkLogger, SdkLoggerProvider,
};
use rustls::crypto::aws_lc_rs::default_provider;
use rustls::{ClientConfig, RootCertStore};
use tokio::runtime::{Builder, Runtime};
use tokio::time::timeout;
use tracing::field::{Field, Visit};
use tracing::{Event, Level, Subscriber, warn};
use tracing_subscriber::Layer;
use tracing_subscriber::layer::Context;

use crate::log::export::ExportError;
use crate::log::limit::Limit;

/// Records that may wait: with [`LONGEST`] each, under 10 MiB, and some hundred kilobytes usually.
const WAITING: usize = 512;

/// The longest record, in bytes of its text and its values.
const LONGEST: usize = 16 << 10;

/// Records that are sent together.
const BATCH: usize = 128;

/// How long a record waits for others at most: a denial is to be seen within seconds.
const DELAY: Duration = Duration::from_secs(1);

/// How long a collector may take for an answer.
const ATTEMPT: Duration = Duration::from_secs(3);

/// How long a batch is sent again: what a collector takes to be started anew.
const PATIENCE: Duration = Duration::from_secs(10);

/// The longest answer that is read: it says at most what the collector did not like.
const ANSWER: usize = 64 << 10;

/// Lines on their way to a collector, once there is one; clones are the same.
#[derive(Clone, Default)]
pub(super) struct Records(Arc<OnceLock<Export>>);

struct Export {
    provider: SdkLoggerProvider,
    logger: SdkLogger,
    limit: Limit,
    counts: Arc<Counts>,
}

/// What waits, and what the collector did not get.
#[derive(Debug, Default)]
struct Counts {
    waiting: AtomicUsize,
    lost: AtomicU64,
}

impl Records {
    /// Exports from now on, to where the collector takes logs.
    pub(super) fn start(&self, url: &str) -> Result<(), ExportError> {
        let failed = |error: &dyn ToString| ExportError::Start(error.to_string());
        let client = Arc::new(Http::new().map_err(|e| failed(&e))?);
        let exporter = LogExporter::builder()
            .with_http()
            .with_shared_http_client(Arc::clone(&client) as Arc<dyn HttpClient>)
            .with_retry_policy(
                RetryPolicy::recommended()
                    .with_max_retries(8)
                    .with_initial_delay(Duration::from_millis(250))
                    .with_max_delay(Duration::from_secs(2)),
            )
            .with_timeout(PATIENCE)
            .with_endpoint(url)
            .build()
            .map_err(|e| failed(&e))?;
        let counts = Arc::new(Counts::default());
        let exporter = Telling {
            exporter,
            client,
            counts: Arc::clone(&counts),
            collector: shown(url),
            failing: AtomicBool::new(false),
        };
        let batches = BatchConfigBuilder::default()
            .with_max_queue_size(WAITING)
            .with_max_export_batch_size(BATCH)
            .with_scheduled_delay(DELAY)
            .build();
        let batches = BatchLogProcessor::builder(exporter).with_batch_config(batches).build();
        let provider = SdkLoggerProvider::builder()
            .with_resource(resource())
            .with_log_processor(batches)
            .build();
        let logger = provider.logger("byokd");
        let export = Export { provider, logger, limit: Limit::default(), counts };
        self.0.set(export).map_err(|_| failed(&"it is done already"))
    }

    /// Has what waits sent, for so long at most.
    pub(super) fn stop(&self, within: Duration) {
        if let Some(export) = self.0.get() {
            // What is not taken in time is lost, and the log has it.
            let _lost = export.provider.shutdown_with_timeout(within);
        }
    }
}

/// A URL without what might be secret in it.
fn shown(url: &str) -> String {
    url.split('?').next().unwrap_or_default().to_owned()
}

/// What the records are of. `OTEL_SERVICE_NAME` and `OTEL_RESOURCE_ATTRIBUTES` say more.
fn resource() -> Resource {
    let host = nix::sys::utsname::uname().ok();
    let host = host.and_then(|name| name.nodename().to_str().map(str::to_owned));
    let mut resource = Resource::builder();
    if std::env::var_os("OTEL_SERVICE_NAME").is_none() {
        resource = resource.with_service_name(env!("CARGO_PKG_NAME"));
    }
    resource
        .with_attribute(KeyValue::new("service.version", env!("CARGO_PKG_VERSION")))
        .with_attributes(host.map(|host| KeyValue::new("host.name", host)))
        .build()
}

impl<S: Subscriber> Layer<S> for Records {
    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        let Some(export) = self.0.get() else { return };
        // Of the thread that exports.
        if Telemetry::is_current_telemetry_suppressed() {
            return;
        }
        let passage = export.limit.pass(event);
        for left_out in passage.left_out {
            export.emit(left_out.level, |record| {
                record.set_body(AnyValue::from(left_out.to_string()));
            });
        }
        if passage.written {
            let meta = event.metadata();
            export.emit(*meta.level(), |record| {
                record.set_target(meta.target());
                if let (Some(file), Some(line)) = (meta.file(), meta.line()) {
                    record.add_attribute("code.file.path", file);
                    record.add_attribute("code.line.number", i64::from(line));
                }
                event.record(&mut Fields { record, left: LONGEST });
            });
        }
    }
}

impl Export {
    /// Queues a record; waits for nobody.
    fn emit(&self, level: Level, fill: impl FnOnce(&mut SdkLogRecord)) {
        if self.counts.waiting.fetch_add(1, Ordering::Relaxed) >= WAITING {
            self.counts.waiting.fetch_sub(1, Ordering::Relaxed);
            self.counts.lost.fetch_add(1, Ordering::Relaxed);
            return;
        }
        let mut record = self.logger.create_log_record();
        record.set_timestamp(SystemTime::now());
        record.set_severity_number(severity(level));
        record.set_severity_text(level.as_str());
        fill(&mut record);
        self.logger.emit(record);
    }
}

fn severity(level: Level) -> Severity {
    match level {
        Level::ERROR => Severity::Error,
        Level::WARN => Severity::Warn,
        Level::INFO => Severity::Info,
        Level::DEBUG => Severity::Debug,
        Level::TRACE => Severity::Trace,
    }
}

/// Puts an event's text and fields into a record, as long as there is room.
struct Fields<'a> {
    record: &'a mut SdkLogRecord,
    left: usize,
}

impl Fields<'_> {
    fn put(&mut self, field: &Field, value: AnyValue) {
        if field.name() == "message" {
            self.record.set_body(value);
        } else if !field.name().starts_with("log.") {
            self.record.add_attribute(field.name(), value);
        }
    }

    fn put_text(&mut self, field: &Field, text: &str) {
        let text = &text[..text.floor_char_boundary(self.left)];
        self.left -= text.len();
        self.put(field, AnyValue::from(text.to_owned()));
    }
}

impl Visit for Fields<'_> {
    fn record_i64(&mut self, field: &Field, value: i64) {
        self.put(field, AnyValue::from(value));
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        match i64::try_from(value) {
            Ok(value) => self.record_i64(field, value),
            Err(_) => self.put_text(field, &value.to_string()),
        }
    }

    fn record_f64(&mut self, field: &Field, value: f64) {
        self.put(field, AnyValue::from(value));
    }

    fn record_bool(&mut self, field: &Field, value: bool) {
        self.put(field, AnyValue::from(value));
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.put_text(field, value);
    }

    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        self.put_text(field, &format!("{value:?}"));
    }
}

/// Says in the log when the collector takes no records, and when it does again.
#[derive(Debug)]
struct Telling {
    exporter: LogExporter,
    client: Arc<Http>,
    counts: Arc<Counts>,
    collector: String,
    /// Said once, until a batch is taken.
    failing: AtomicBool,
}

impl Exports for Telling {
    async fn export(&self, batch: LogBatch<'_>) -> OTelSdkResult {
        let count = batch.iter().count();
        self.counts.waiting.fetch_sub(count, Ordering::Relaxed);
        let taken = self.exporter.export(batch).await;
        let trouble = self.client.trouble.lock().unwrap_or_else(PoisonError::into_inner).take();
        let lost = &self.counts.lost;
        match &taken {
            Ok(()) => {
                self.failing.store(false, Ordering::Relaxed);
                let lost = lost.swap(0, Ordering::Relaxed);
                if lost > 0 {
                    let collector = &self.collector;
                    warn!(
                        collector,
                        lost, "log lines that a collector did not take stand here alone"
                    );
                }
            }
            Err(error) => {
                lost.fetch_add(u64::try_from(count).unwrap_or(u64::MAX), Ordering::Relaxed);
                if !self.failing.swap(true, Ordering::Relaxed) {
                    let why = trouble.unwrap_or_else(|| error.to_string());
                    warn!(collector = self.collector, why, "the collector takes no log lines");
                }
            }
        }
        taken
    }

    fn shutdown_with_timeout(&self, within: Duration) -> OTelSdkResult {
        self.exporter.shutdown_with_timeout(within)
    }

    fn set_resource(&mut self, resource: &Resource) {
        self.exporter.set_resource(resource);
    }
}

/// Asks on the thread that asks, and waits there.
#[derive(Debug)]
struct Http {
    client: Client<HttpsConnector<HttpConnector>, Full<Bytes>>,
    /// Until the end.
    runtime: Option<Runtime>,
    /// Why the last attempt had no answer, which the exporter does not say.
    trouble: Mutex<Option<String>>,
}

impl Http {
    fn new() -> Result<Self, Box<dyn std::error::Error>> {
        let mut roots = RootCertStore::empty();
        roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
        let tls = ClientConfig::builder_with_provider(Arc::new(default_provider()))
            .with_safe_default_protocol_versions()?
            .with_root_certificates(roots)
            .with_no_client_auth();
        let connector = HttpsConnectorBuilder::new()
            .with_tls_config(tls)
            .https_or_http()
            .enable_http1()
            .build();
        // A connection for each batch: between two, nobody would notice that it is gone.
        let client =
            Client::builder(TokioExecutor::new()).pool_max_idle_per_host(0).build(connector);
        let runtime = Builder::new_current_thread().enable_all().build()?;
        Ok(Self { client, runtime: Some(runtime), trouble: Mutex::new(None) })
    }

    async fn ask(&self, request: Request<Bytes>) -> Result<Response<Bytes>, HttpError> {
        let answer = self.client.request(request.map(Full::new)).await?;
        let (head, body) = answer.into_parts();
        let body = Limited::new(body, ANSWER).collect().await?.to_bytes();
        Ok(Response::from_parts(head, body))
    }
}

impl HttpClient for Http {
    fn send_bytes<'this, 'answer>(
        &'this self,
        request: Request<Bytes>,
    ) -> Pin<Box<dyn Future<Output = Result<Response<Bytes>, HttpError>> + Send + 'answer>>
    where
        'this: 'answer,
        Self: 'answer,
    {
        let answer = match &self.runtime {
            Some(runtime) => runtime.block_on(async {
                let late = || format!("no answer within {} s", ATTEMPT.as_secs()).into();
                timeout(ATTEMPT, self.ask(request)).await.unwrap_or_else(|_| Err(late()))
            }),
            None => Err("it is over".into()),
        };
        let why = answer.as_ref().err().map(|error| words(&**error));
        *self.trouble.lock().unwrap_or_else(PoisonError::into_inner) = why;
        Box::pin(std::future::ready(answer))
    }
}

impl Drop for Http {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            // A name server may keep a thread of it waiting.
            runtime.shutdown_background();
        }
    }
}

/// An error and what led to it: hyper's own words are "client error (Connect)".
fn words(error: &(dyn std::error::Error + 'static)) -> String {
    let chain = std::iter::successors(Some(error), |error| error.source());
    chain.map(ToString::to_string).collect::<Vec<_>>().join(": ")
}
