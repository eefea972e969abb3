//! Tests of the built programs, with the clients people use.
#![expect(
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stdout,
    reason = "what a test leans on may fail it and say why, in helpers too"
)]

mod credentials;
mod customer;
mod support;

mod api;
mod audit;
mod backing;
mod clients;
mod concurrency;
mod console;
mod documents;
mod filesystem;
mod flight;
mod hold;
mod hostile;
mod journal;
mod keeper;
mod kms;
mod large;
mod layering;
mod luks2;
mod matrix;
mod memory;
mod metrics;
mod monitoring;
mod mounts;
mod other_kms;
#[cfg(feature = "otel")]
mod otlp;
mod promises;
mod raw;
mod readme;
mod reload;
mod resize;
mod revocation;
mod rewrap;
mod seeds;
mod stuck;
mod systemd;
mod terminal;
mod tls;
mod units;
mod volumes;
