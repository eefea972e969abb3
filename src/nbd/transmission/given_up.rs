//! Connections that the kernel's client gave up: it sends what was in flight there on its others, or
//! on new ones, at once. What is still done of it could undo what is written after its copy. So a
//! connection that was given up begins nothing that it receives after that; and until it is done
//! with what it had received, the others begin nothing either.

use std::io;

use crate::nbd::transmission::{Ending, Outcome, Transmission};
use crate::nbd::wire::{Command, Request};

impl Transmission {
    /// Looks, before anything that was received is begun, whether the kernel has given this
    /// connection up, and ends it then; or another one that is not done yet, where this one ends
    /// as well and has what it received sent again.
    pub(super) fn heed_given_up(&mut self) -> Outcome<Option<Ending>> {
        if !self.client.is_kernel() || self.inbox.bytes().is_empty() {
            return Ok(None);
        }
        if self.client.has_hung_up() {
            return self.last_words().map(Some);
        }
        // It may be that the whole device was disconnected.
        let first = Request::parse(self.inbox.bytes(), false)?;
        if first.is_some_and(|(request, _)| request.command == Command::Disconnect) {
            return Ok(None);
        }
        // What is only refused undoes nothing, and before the next restore the other one is done.
        if !self.export.gives_up() && self.export.kernel_gave_up_another(&self.client) {
            return Err(io::Error::from(io::ErrorKind::ConnectionAborted).into());
        }
        Ok(None)
    }

    /// For who waits for others: they may wait for what is only done when this connection has ended.
    pub(super) fn is_still_there(&self) -> Outcome {
        if self.client.is_kernel() && self.client.has_hung_up() {
            return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
        }
        Ok(())
    }

    /// Looks through what was sent, and begins none of it: whether the device was disconnected.
    fn last_words(&mut self) -> Outcome<Ending> {
        let mut payload = 0;
        loop {
            payload -= self.inbox.skip(payload);
            if payload == 0
                && let Some((request, len)) = Request::parse(self.inbox.bytes(), false)?
            {
                if request.command == Command::Disconnect {
                    return Ok(Ending::Disconnected);
                }
                self.inbox.consume(len);
                payload = request.payload(false);
            } else if self.inbox.fill(|to| self.stream.try_read(to))? == 0 {
                return Ok(Ending::Closed);
            }
        }
    }
}
