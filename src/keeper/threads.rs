//! Threads for work that blocks and must not wait for other work that blocks.
//!
//! The runtime's threads for blocking work are limited in number and shared by everybody: as many
//! calls that hang, on a file system that is gone for example, and nothing more is begun. What
//! belongs to a fence never stands in that queue.

use std::io;
use std::time::Duration;

use tokio::sync::oneshot;
use tokio::time::timeout;

/// How long the closing of something is waited for: a store that is well takes no time for it.
const CLOSE: Duration = Duration::from_secs(1);

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

/// Drops what belongs to a store, which may hang at that: on a thread of its own, waited for just so
/// long that whoever hears of the end finds it closed if the store is well.
pub(crate) async fn close<T: Send + 'static>(value: T) {
    // Without a thread it is dropped right here; what takes longer goes on.
    let _closed = timeout(CLOSE, apart("close", move || drop(value))).await;
}

/// What belongs to a store while others are waited for: dropped on a thread of its own, whoever drops
/// it.
pub(crate) struct Apart<T: Send + 'static>(Option<T>);

impl<T: Send + 'static> Apart<T> {
    pub(crate) fn new(value: T) -> Self {
        Self(Some(value))
    }

    pub(crate) fn into_inner(mut self) -> T {
        self.0.take().unwrap_or_else(|| unreachable!("nothing else takes it"))
    }
}

impl<T: Send + 'static> Drop for Apart<T> {
    fn drop(&mut self) {
        if let Some(value) = self.0.take() {
            // Without a thread it is dropped right here.
            let _spawned = std::thread::Builder::new().name("close".into()).spawn(|| drop(value));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{Receiver, Sender, channel};

    use super::*;

    /// A store that hangs when it is closed, until it is told to go on.
    struct Hanging(Receiver<()>, Sender<()>);

    impl Drop for Hanging {
        fn drop(&mut self) {
            self.0.recv().unwrap();
            self.1.send(()).unwrap();
        }
    }

    #[tokio::test]
    async fn what_hangs_when_it_is_closed_keeps_nobody() {
        let ((go, wait), (closed, hears)) = (channel(), channel());
        close(Hanging(wait, closed)).await;
        hears.try_recv().unwrap_err();
        go.send(()).unwrap();
        hears.recv_timeout(Duration::from_secs(30)).unwrap();
    }
}
