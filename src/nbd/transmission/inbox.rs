//! Bytes received and not yet used: a client's plaintext among them, so they lie where all plaintext
//! does, locked and left out of core dumps.

use std::io;

use zeroize::Zeroize;

use super::INBOX;
use crate::buffer::{Buffer, Plaintext};

/// Bytes received and not yet used.
#[derive(Default)]
pub(super) struct Inbox {
    /// Of [`INBOX`] bytes, once something was received.
    memory: Option<Plaintext>,
    start: usize,
    end: usize,
    /// How far plaintext may reach since the last wipe.
    touched: usize,
}

impl Inbox {
    pub(super) fn bytes(&self) -> &[u8] {
        self.memory.as_ref().map_or(&[], |memory| &memory.bytes()[self.start..self.end])
    }

    pub(super) fn consume(&mut self, n: usize) {
        self.start += n;
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
        }
    }

    /// Uses up to `len` bytes up; says how many there were.
    pub(super) fn skip(&mut self, len: u64) -> u64 {
        let n = usize::try_from(len).unwrap_or(usize::MAX).min(self.end - self.start);
        self.consume(n);
        n as u64
    }

    pub(super) fn take(&mut self, to: &mut [u8]) -> usize {
        let n = to.len().min(self.end - self.start);
        to[..n].copy_from_slice(&self.bytes()[..n]);
        self.consume(n);
        n
    }

    pub(super) fn fill(
        &mut self,
        read: impl FnOnce(&mut [u8]) -> io::Result<usize>,
    ) -> io::Result<usize> {
        let memory = match &mut self.memory {
            Some(memory) => memory,
            none => none.insert(Plaintext::new(Buffer::zeroed(INBOX)?)),
        };
        let bytes = memory.bytes_mut();
        if self.start > 0 {
            bytes.copy_within(self.start..self.end, 0);
            self.end -= self.start;
            self.start = 0;
        }
        if self.end == bytes.len() {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        let n = read(&mut bytes[self.end..])?;
        self.end += n;
        self.touched = self.touched.max(self.end);
        Ok(n)
    }

    /// Wipes what has been used.
    pub(super) fn wipe(&mut self) {
        let Some(memory) = &mut self.memory else { return };
        let bytes = memory.bytes_mut();
        if self.touched > self.end {
            bytes[self.end..self.touched].zeroize();
        }
        if self.start > 0 {
            bytes[..self.start].zeroize();
        }
        self.touched = self.end;
    }

    /// Gives its memory back while it is empty.
    pub(super) fn shrink(&mut self) {
        if self.start == self.end {
            self.wipe();
            *self = Self::default();
        }
    }
}
