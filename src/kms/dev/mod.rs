//! The development KMS: a small KMS of our own for trials and tests, never for customers' data.
//!
//! It speaks the AWS KMS wire protocol on a loopback port, so that the real SDK path is always the
//! one exercised: `byokd --dev` runs it, and tests drive every verdict and fault through it. The
//! operator plays the customer: keys are made, disabled, denied and deleted by the operations of
//! KMS itself; what no KMS offers, faults on demand, lies under `/_dev` (see `docs/dev-kms.md`).
//!
//! What stays true here: it listens on loopback only; a key outlives a restart; no input makes it
//! panic. What it is not: it does not check signatures, knows no principals, grants or accounts,
//! and keeps key material in clear in its state directory.
//!
//! | file | what it is |
//! |---|---|
//! | `server.rs` | HTTP, `/_dev`, and how faults look from outside |
//! | `line.rs` | connections that reset, break off and drip |
//! | `api.rs` | the operations and the order of their checks |
//! | `cloudtrail.rs` | what of it a customer would find in CloudTrail |
//! | `wire.rs` | requests, answers, exceptions |
//! | `policy.rs` | key policies: allow, deny, conditions on the encryption context |
//! | `keys.rs` | the keys, their files and their blobs |
//! | `faults.rs` | faults: their kinds, scope and turn |

mod api;
mod cloudtrail;
mod faults;
mod keys;
mod line;
mod policy;
mod server;
mod wire;

use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use thiserror::Error;
use tokio::net::TcpListener;
use tokio::task::JoinHandle;
use tracing::warn;

pub use faults::{Fault, FaultKind};
pub use keys::KeyState;
pub use policy::{allow_all_document, deny_all_document, deny_context_document};
pub use server::Seen;

use keys::KeyStore;
use server::Server;

/// The region it is in, unless it is told another.
pub const DEV_REGION: &str = "eu-central-1";

/// The development KMS, running. Dropping it ends it and every connection to it.
pub struct DevKms {
    address: SocketAddr,
    endpoint: String,
    server: Arc<Server>,
    task: JoinHandle<()>,
}

/// Why the development KMS did not start.
#[derive(Debug, Error)]
pub enum DevKmsError {
    /// It is for this machine only.
    #[error("the development KMS listens on loopback only, not on {0}: its keys lie in clear")]
    NotLoopback(SocketAddr),
    /// It could not listen.
    #[error("the development KMS cannot listen on {address}")]
    Listen {
        /// Where.
        address: SocketAddr,
        /// Why not.
        source: io::Error,
    },
    /// Its state directory could not be used.
    #[error("the development KMS cannot {step} {}", path.display())]
    State {
        /// What was tried.
        step: &'static str,
        /// On what.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// Another one runs on the same keys.
    #[error("another development KMS uses the keys in {}", path.display())]
    InUse {
        /// Where they lie.
        path: PathBuf,
    },
}

impl DevKms {
    /// Starts it on a free loopback port. Its keys lie in `state_dir/keys`; new ones get ARNs in
    /// `region`.
    ///
    /// # Errors
    /// The state directory cannot be used, or no port is free.
    pub async fn start(state_dir: &Path, region: &str) -> Result<Self, DevKmsError> {
        Self::start_at(SocketAddr::from((Ipv4Addr::LOCALHOST, 0)), state_dir, region).await
    }

    /// Starts it at `address`, which must be a loopback address; port 0 takes a free one.
    ///
    /// # Errors
    /// As [`DevKms::start`]; or the address is not loopback, or taken.
    pub async fn start_at(
        address: SocketAddr,
        state_dir: &Path,
        region: &str,
    ) -> Result<Self, DevKmsError> {
        if !address.ip().is_loopback() {
            return Err(DevKmsError::NotLoopback(address));
        }
        let failed = |source| DevKmsError::Listen { address, source };
        let store = KeyStore::open(state_dir, region)?;
        let listener = TcpListener::bind(address).await.map_err(failed)?;
        let address = listener.local_addr().map_err(failed)?;
        let endpoint = format!("http://{address}");
        warn!(
            endpoint,
            state_dir = %state_dir.display(),
            "the DEVELOPMENT KMS is running: for trials and tests only. It checks no signatures \
             and keeps its keys in clear on disk. Never use it for data that matters."
        );
        let server = Arc::new(Server::new(store));
        let task = tokio::spawn(Arc::clone(&server).serve(listener));
        Ok(Self { address, endpoint, server, task })
    }

    /// Its URL: `http://127.0.0.1:PORT`.
    #[must_use]
    pub fn endpoint(&self) -> &str {
        &self.endpoint
    }

    /// The address it listens on.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Sets a fault, as `POST /_dev/faults` does.
    pub fn inject(&self, fault: Fault) {
        self.server.faults.add(fault);
    }

    /// Clears all faults.
    pub fn clear_faults(&self) {
        self.server.faults.clear();
    }

    /// The latest requests it got, oldest first.
    #[must_use]
    pub fn requests(&self) -> Vec<Seen> {
        self.server.requests()
    }

    /// Ends it: no new connections, and those there are are dropped. Keys are kept on disk.
    pub async fn shutdown(mut self) {
        self.task.abort();
        // The only way it ends is the abort just asked for.
        drop((&mut self.task).await);
    }
}

impl Drop for DevKms {
    fn drop(&mut self) {
        self.task.abort();
    }
}
