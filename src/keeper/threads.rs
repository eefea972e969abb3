//! Threads for work that blocks and must not wait for other work that blocks.
//!
//! The runtime's threads for blocking work are limited in number and shared by everybody: as many
//! calls that hang, on a file system that is gone for example, and nothing more is begun. What
//! belongs to a fence never stands in that queue.

use std::io;

use tokio::sync::oneshot;

/// Does `work` on a thread of its own. Whoever no longer waits for it does not end it.
///
/// # Errors
/// No thread could be started; `work` was not begun.
pub(crate) async fn apart<T: Send + 'static>(
    name: &str,
    work: impl FnOnce() -> T + Send + 'static,
) -> io::Result<T> {
    let (done, wait) = oneshot::channel();
    std::thread::Builder::new().name(name.to_owned()).spawn(move || {
        // What nobody waits for any more is dropped here.
        let _sent = done.send(work());
    })?;
    wait.await.map_err(io::Error::other)
}
