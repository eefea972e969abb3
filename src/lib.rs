//! byokd: AES-256-XTS encrypted NBD volumes under the customer's own AWS KMS key.
//!
//! # The map
//!
//! Two ways lead through the program, and they meet in [`fence`].
//!
//! ```text
//! the data's way   client socket -> NBD frame -> export -> device -> fence (crypt) -> store
//! the key's way    volume header -> KMS -> key custody -> lease -> fence
//! ```
//!
//! | module | what it is |
//! |---|---|
//! | [`units`] | offsets, sectors, geometry: every range and overflow check |
//! | [`visible`] | text from elsewhere, as it may be shown to people |
//! | [`exit`] | the exit codes of both programs |
//! | [`log`] | what the programs say of themselves, to the journal or as text, and to a collector |
//! | [`harden`] | a process that gives its memory to nobody |
//! | [`clock`] | the clock that leases are kept by |
//! | [`buffer`] | aligned buffers: plaintext and ciphertext as two types |
//! | [`key`] | key custody: secret memory, the volume key, the lease; public words of wrapping |
//! | [`registers`] | what a waiting thread would keep of what it had in hand |
//! | [`turns`] | how soon a thread gets a processor that others want, how long it keeps it, and its weight |
//! | [`crypt`] | AES-256-XTS, two implementations and the start-up self-test |
//! | [`fence`] | the one meeting point: who may use the key, and its destruction |
//! | [`store`] | where ciphertext lies: a file or block device, or memory in tests |
//! | [`device`] | the encrypted device: sectors, read-modify-write, zeroes, trim, flush |
//! | [`nbd`] | the protocol: wire, handshake, transmission |
//! | [`export`] | what is served: one volume with its limits and its clients |
//! | [`kernel`] | the kernel's NBD client: what it is asked, and the helper that may ask |
//! | [`attachment`] | a volume's kernel device, over fences and restarts |
//! | [`listener`] | sockets, who may connect, a thread for each connection |
//! | [`luks2`] | the volume's header |
//! | [`volume`] | create, open, unlock: crash-safe header updates |
//! | [`kms`] | the customer's key service, its errors as verdicts, the development KMS |
//! | [`keeper`] | probes, and what follows from them |
//! | [`progress`] | whether the parts of the daemon go on |
//! | [`systemd`] | what the service manager is told, and the descriptors it keeps |
//! | [`audit`] | the audit trail: hash-chained records of every key event |
//! | [`metrics`] | every metric, and what is counted between two scrapes |
//! | [`http`] | metrics and health over HTTP |
//! | [`config`] | byokd.toml and volumes.d |
//! | [`control`] | the control API: types, server, client |
//! | [`daemon`] | puts the parts together |
//! | [`cli`] | `byokctl`: arguments, what it prints, the demonstration |

pub mod attachment;
pub mod audit;
pub mod buffer;
pub mod cli;
pub mod clock;
pub mod config;
pub mod control;
pub mod crypt;
pub mod daemon;
pub mod device;
pub mod exit;
pub mod export;
pub mod fence;
pub mod harden;
pub mod http;
pub mod keeper;
pub mod kernel;
pub mod key;
pub mod kms;
pub mod listener;
pub mod log;
pub mod luks2;
pub mod metrics;
pub mod nbd;
pub mod progress;
pub mod registers;
pub mod store;
pub mod systemd;
pub mod turns;
pub mod units;
pub mod visible;
pub mod volume;
