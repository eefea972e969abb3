//! TLS for the HTTP listener: a certificate and its key from two files, read anew when they change,
//! so that whoever renews them has nothing to restart.
//!
//! What is served stays as it is until both files fit each other again: a half-written renewal ends
//! nothing.

use std::fs::{File, Metadata};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rustls::ServerConfig;
use rustls::crypto::aws_lc_rs::default_provider;
use rustls::pki_types::pem::{self, PemObject};
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio_rustls::TlsAcceptor;
use tracing::{info, warn};
use x509_cert::der::{self, Decode};

/// How often the files are looked at. A renewal has days.
const LOOK: Duration = Duration::from_secs(5);

/// Why a certificate cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// One of the files cannot be read.
    #[error("{}: {source}", path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// One of the files is no PEM of its kind.
    #[error("{}: {source}", path.display())]
    Pem {
        /// Which.
        path: PathBuf,
        /// Why.
        source: pem::Error,
    },
    /// Others can read the key.
    #[error("{}: everybody can read it (mode {mode:o}); use 0600 or 0640", path.display())]
    Mode {
        /// The key's file.
        path: PathBuf,
        /// Its mode.
        mode: u32,
    },
    /// The two do not belong together, or are of no use to TLS.
    #[error("the certificate and its key cannot be used: {0}")]
    Pair(#[from] rustls::Error),
    /// The certificate says nothing of its end that can be read.
    #[error("the certificate cannot be read: {0}")]
    Certificate(#[from] der::Error),
}

/// The certificate that is served.
pub(super) struct Tls {
    certificate: PathBuf,
    key: PathBuf,
    now: Mutex<Served>,
}

struct Served {
    config: Arc<ServerConfig>,
    /// Seconds since 1970.
    expires: u64,
    stamps: Option<[Stamp; 2]>,
}

enum Look {
    Same,
    Renewed,
}

/// What changes with a file.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Stamp {
    device: u64,
    inode: u64,
    size: u64,
    modified: (i64, i64),
}

impl Tls {
    /// With the certificate chain and the key in those files, in PEM.
    pub(super) fn of(certificate: &Path, key: &Path) -> Result<Self, TlsError> {
        let now = Mutex::new(read(certificate, key)?);
        Ok(Self { certificate: certificate.to_owned(), key: key.to_owned(), now })
    }

    fn served(&self) -> MutexGuard<'_, Served> {
        self.now.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Serves with what is current.
    pub(super) fn acceptor(&self) -> TlsAcceptor {
        TlsAcceptor::from(Arc::clone(&self.served().config))
    }

    /// When the certificate ends, in seconds since 1970.
    pub(super) fn expires(&self) -> u64 {
        self.served().expires
    }

    /// Reads the files when they have changed. Never ends.
    pub(super) async fn keep_current(self: Arc<Self>) {
        let mut ticks = tokio::time::interval(LOOK);
        let mut said = None;
        loop {
            ticks.tick().await;
            let tls = Arc::clone(&self);
            let looked = tokio::task::spawn_blocking(move || tls.look()).await;
            match looked {
                Ok(Ok(Look::Same)) => said = None,
                Ok(Ok(Look::Renewed)) => {
                    info!(path = %self.certificate.display(), "serving the renewed certificate");
                    said = None;
                }
                Ok(Err(error)) => {
                    let error = error.to_string();
                    if said.as_ref() != Some(&error) {
                        warn!(
                            error,
                            "the changed certificate is not taken; serving the one before"
                        );
                    }
                    said = Some(error);
                }
                Err(error) => warn!(%error, "looking at the certificate was cut off"),
            }
        }
    }

    /// Takes what is in the files, if that is new.
    fn look(&self) -> Result<Look, TlsError> {
        let stamps = stamps(&self.certificate, &self.key);
        if stamps.is_some() && stamps == self.served().stamps {
            return Ok(Look::Same);
        }
        let new = read(&self.certificate, &self.key)?;
        *self.served() = new;
        Ok(Look::Renewed)
    }
}

fn stamps(certificate: &Path, key: &Path) -> Option<[Stamp; 2]> {
    let stamp = |path: &Path| std::fs::metadata(path).ok().map(|of| Stamp::of(&of));
    Some([stamp(certificate)?, stamp(key)?])
}

impl Stamp {
    fn of(file: &Metadata) -> Self {
        Self {
            device: file.dev(),
            inode: file.ino(),
            size: file.size(),
            modified: (file.mtime(), file.mtime_nsec()),
        }
    }
}

fn read(certificate: &Path, key: &Path) -> Result<Served, TlsError> {
    // Before they are read: what changes meanwhile is read again.
    let stamps = stamps(certificate, key);
    let open = |path: &Path| {
        File::open(path).map_err(|source| TlsError::File { path: path.to_owned(), source })
    };
    let not_pem = |path: &Path| {
        let path = path.to_owned();
        move |source| TlsError::Pem { path, source }
    };
    let chain: Result<Vec<_>, _> = CertificateDer::pem_reader_iter(open(certificate)?).collect();
    let chain = chain.map_err(not_pem(certificate))?;
    let first = chain.first().ok_or(pem::Error::NoItemsFound).map_err(not_pem(certificate))?;
    let ends = x509_cert::Certificate::from_der(first.as_ref())?.tbs_certificate.validity.not_after;
    let file = open(key)?;
    let mode = file.metadata().map_or(0, |of| of.mode() & 0o7777);
    if mode & 0o007 != 0 {
        return Err(TlsError::Mode { path: key.to_owned(), mode });
    }
    let key = PrivateKeyDer::from_pem_reader(file).map_err(not_pem(key))?;
    let mut config = ServerConfig::builder_with_provider(Arc::new(default_provider()))
        .with_safe_default_protocol_versions()?
        .with_no_client_auth()
        .with_single_cert(chain, key)?;
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(Served { config: Arc::new(config), expires: ends.to_unix_duration().as_secs(), stamps })
}
