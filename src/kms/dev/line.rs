//! A connection that can misbehave: reset instead of closed, broken off, dripping.

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use hyper::body::{Body, Frame, SizeHint};
use nix::libc;
use nix::sys::socket::{setsockopt, sockopt};
use thiserror::Error;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::time::Sleep;
use zeroize::Zeroizing;

/// Says that a connection is to end with a reset.
#[derive(Clone, Default)]
pub(super) struct Cut(Arc<AtomicBool>);

impl Cut {
    pub(super) fn set(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    fn is_set(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

/// The connection ends here, by a fault on demand.
#[derive(Debug, Error)]
#[error("cut by a fault on demand")]
pub(super) struct CutHere;

/// A TCP connection that its [`Cut`] resets.
pub(super) struct Line {
    stream: TcpStream,
    cut: Cut,
}

impl Line {
    pub(super) fn new(stream: TcpStream, cut: Cut) -> Self {
        Self { stream, cut }
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        if self.cut.is_set() {
            // Closing with a linger time of zero sends a reset.
            let now = libc::linger { l_onoff: 1, l_linger: 0 };
            if let Err(error) = setsockopt(&self.stream, sockopt::Linger, &now) {
                tracing::debug!(%error, "a connection will be closed instead of reset");
            }
        }
    }
}

impl AsyncRead for Line {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl AsyncWrite for Line {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.cut.is_set() {
            return Poll::Ready(Ok(()));
        }
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

/// The body of an answer, sent as it should be or not.
pub(super) enum Out {
    /// All of it.
    Whole(Option<Zeroizing<Vec<u8>>>),
    /// The first half, then nothing but an error.
    Broken {
        /// All of it.
        body: Zeroizing<Vec<u8>>,
        /// Set once the half was handed on: gives it time to leave.
        wait: Option<Pin<Box<Sleep>>>,
    },
    /// One byte after the other.
    Drip {
        /// All of it.
        body: Zeroizing<Vec<u8>>,
        /// The next byte.
        at: usize,
        /// The time between two bytes.
        pause: Duration,
        /// Set while it waits.
        wait: Option<Pin<Box<Sleep>>>,
    },
}

/// How long the first half of a broken body gets to leave before the reset, which would overtake
/// it.
const LEAD: Duration = Duration::from_millis(30);

impl Out {
    pub(super) fn whole(body: impl Into<Zeroizing<Vec<u8>>>) -> Self {
        Self::Whole(Some(body.into()))
    }

    fn len(&self) -> usize {
        match self {
            Self::Whole(body) => body.as_ref().map_or(0, |body| body.len()),
            Self::Broken { body, .. } => body.len(),
            Self::Drip { body, at, .. } => body.len().saturating_sub(*at),
        }
    }
}

impl Body for Out {
    type Data = Bytes;
    type Error = CutHere;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, CutHere>>> {
        match &mut *self {
            // Handed on as it lies; it is wiped once it was sent.
            Self::Whole(body) => Poll::Ready(
                body.take()
                    .filter(|body| !body.is_empty())
                    .map(|body| Ok(Frame::data(Bytes::from_owner(body)))),
            ),
            Self::Broken { body, wait } => {
                if let Some(sleep) = wait {
                    ready!(sleep.as_mut().poll(cx));
                    return Poll::Ready(Some(Err(CutHere)));
                }
                *wait = Some(Box::pin(tokio::time::sleep(LEAD)));
                let half = body.get(..body.len() / 2).unwrap_or_default();
                Poll::Ready(Some(Ok(Frame::data(Bytes::copy_from_slice(half)))))
            }
            Self::Drip { body, at, pause, wait } => {
                let Some(byte) = body.get(*at).copied() else {
                    return Poll::Ready(None);
                };
                let sleep = wait.get_or_insert_with(|| Box::pin(tokio::time::sleep(*pause)));
                ready!(sleep.as_mut().poll(cx));
                *wait = None;
                *at += 1;
                Poll::Ready(Some(Ok(Frame::data(Bytes::copy_from_slice(&[byte])))))
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        self.len() == 0
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(u64::try_from(self.len()).unwrap_or(u64::MAX))
    }
}
