//! Replies: gathered, sent together, and the memory they give back.

use std::io::{self, IoSlice};
use std::time::Instant;

use crate::buffer::Buffer;
use crate::nbd::transmission::{
    Data, HOLD_LIMIT, OUTBOX_BYTES, OUTBOX_REPLIES, Outcome, Reply, Transmission, index,
};
use crate::registers;
use crate::store::Speed;
use crate::units::SectorRange;

impl Transmission {
    pub(super) fn reply(&mut self, reply: Reply) -> Outcome {
        self.outbox_bytes += match &reply {
            Reply::Head(_) => 0,
            Reply::Data(_, data) => data.wanted.len(),
            Reply::Body(body) => body.len(),
        };
        self.outbox.push(reply);
        if self.outbox_bytes >= OUTBOX_BYTES || self.outbox.len() >= OUTBOX_REPLIES {
            return self.send();
        }
        Ok(())
    }

    pub(super) fn send(&mut self) -> Outcome {
        if self.outbox.is_empty() {
            self.count_sent();
            return Ok(());
        }
        // What the ring has not seen yet starts before the peer is waited for.
        self.submit_queued()?;
        let mut parts = Vec::with_capacity(self.outbox.len() * 2);
        for reply in &self.outbox {
            match reply {
                Reply::Head(head) => parts.push(IoSlice::new(head.bytes())),
                Reply::Data(head, Data { plain, wanted, .. }) => {
                    parts.push(IoSlice::new(head.bytes()));
                    parts.push(IoSlice::new(&plain.bytes()[wanted.clone()]));
                }
                Reply::Body(body) => parts.push(IoSlice::new(body)),
            }
        }
        // The client may take its time.
        registers::wipe();
        let sent = self.stream.write_all_vectored(&mut parts);
        drop(parts);
        self.outbox_bytes = 0;
        let mut outbox = std::mem::take(&mut self.outbox);
        for reply in outbox.drain(..) {
            if let Reply::Data(_, data) = reply {
                self.pool.give_plaintext(data.plain);
                self.release(data.held);
            }
        }
        self.outbox = outbox;
        if sent.is_ok() {
            self.count_sent();
        }
        Ok(sent?)
    }

    /// Counts the requests whose answers have gone out.
    fn count_sent(&mut self) {
        if self.unsent.is_empty() {
            return;
        }
        let now = Instant::now();
        for (operation, came) in self.unsent.drain(..) {
            self.client.io().answered(operation, now.saturating_duration_since(came));
        }
    }

    /// A buffer for the sectors of `at`, when this connection may hold it.
    pub(super) fn take(&mut self, at: SectorRange) -> Outcome<Buffer> {
        let len = index(at.len());
        self.take_done()?;
        loop {
            if self.held == 0 || self.given_up {
                // Every connection may have one buffer, whatever the others hold; and one more
                // while the store does not give back what it has.
                break;
            }
            if self.held + len <= HOLD_LIMIT && self.budget.take(len) {
                self.from_budget += len;
                break;
            }
            self.send()?;
            if self.tasks_in_flight() {
                self.wait_for_ring()?;
            }
        }
        self.held += len;
        // A store that makes one wait gets no plaintext from before along with it.
        let buffer = match self.store.speed() {
            Speed::Immediate => self.pool.take(len),
            Speed::Queued => self.pool.take_clean(len),
        };
        Ok(buffer.map_err(io::Error::from)?)
    }

    pub(super) fn give_back(&mut self, buffer: Buffer, held: usize) {
        self.pool.give(buffer);
        self.release(held);
    }

    pub(super) fn release(&mut self, held: usize) {
        self.held -= held;
        let surplus = self.from_budget.saturating_sub(self.held);
        if surplus > 0 {
            self.from_budget -= surplus;
            self.budget.give(surplus);
        }
    }
}
