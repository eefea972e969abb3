//! Bytes received and not yet used.

use std::io;

use zeroize::Zeroize;

use super::INBOX;

/// Bytes received and not yet used.
#[derive(Default)]
pub(super) struct Inbox {
    bytes: Vec<u8>,
    start: usize,
    end: usize,
    /// How far plaintext may reach since the last wipe.
    touched: usize,
}

impl Inbox {
    pub(super) fn bytes(&self) -> &[u8] {
        &self.bytes[self.start..self.end]
    }

    pub(super) fn consume(&mut self, n: usize) {
        self.start += n;
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
        }
    }

    pub(super) fn take(&mut self, to: &mut [u8]) -> usize {
        let n = to.len().min(self.end - self.start);
        to[..n].copy_from_slice(&self.bytes[self.start..self.start + n]);
        self.consume(n);
        n
    }

    pub(super) fn fill(
        &mut self,
        read: impl FnOnce(&mut [u8]) -> io::Result<usize>,
    ) -> io::Result<usize> {
        if self.bytes.is_empty() {
            self.bytes = vec![0; INBOX];
        }
        if self.start > 0 {
            self.bytes.copy_within(self.start..self.end, 0);
            self.end -= self.start;
            self.start = 0;
        }
        if self.end == self.bytes.len() {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        let n = read(&mut self.bytes[self.end..])?;
        self.end += n;
        self.touched = self.touched.max(self.end);
        Ok(n)
    }

    /// Wipes what has been used.
    pub(super) fn wipe(&mut self) {
        if self.touched > self.end {
            self.bytes[self.end..self.touched].zeroize();
        }
        if self.start > 0 {
            self.bytes[..self.start].zeroize();
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
