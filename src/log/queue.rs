//! Lines on their way out: a queue, and a thread that writes them. Whoever has something to say does
//! not wait for it: standard error may be a pipe that nobody reads, and a journal may stand still; a
//! keeper that says that KMS denied its key has to fence a volume then.

use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, TryLockError};
use std::time::{Duration, Instant};

/// Bytes that may wait: thousands of lines. What comes beyond is counted.
const WAITING: usize = 1 << 20;

/// How soon a lock is tried again that is held for moments.
const MOMENT: Duration = Duration::from_millis(1);

/// What the thread that writes is called.
pub(super) const THREAD: &str = "log";

/// Where lines go.
pub(super) trait Sink: Send + 'static {
    /// A line, as it was queued.
    type Line: AsRef<[u8]> + Send + 'static;

    /// Writes one. What cannot be written is lost.
    fn write(&mut self, line: Self::Line);

    /// Says that so many lines were lost.
    fn lost(&mut self, count: u64);
}

/// What is said of lines that were lost.
pub(super) fn lost(count: u64) -> String {
    format!("{count} lines were lost here: nobody took them in time")
}

/// The queue; clones are the same one.
pub(super) struct Queue<L>(Arc<Shared<L>>);

impl<L> Clone for Queue<L> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

struct Shared<L> {
    waiting: Mutex<Waiting<L>>,
    news: Condvar,
}

struct Waiting<L> {
    lines: VecDeque<L>,
    /// Of these and of what is being written.
    bytes: usize,
    lost: u64,
    writing: bool,
}

impl<L: AsRef<[u8]> + Send + 'static> Queue<L> {
    /// A queue whose lines go to `sink`.
    pub(super) fn start(sink: impl Sink<Line = L>) -> io::Result<Self> {
        let waiting = Waiting { lines: VecDeque::new(), bytes: 0, lost: 0, writing: false };
        let queue = Self(Arc::new(Shared { waiting: Mutex::new(waiting), news: Condvar::new() }));
        let writer = queue.clone();
        std::thread::Builder::new().name(THREAD.to_owned()).spawn(move || writer.run(sink))?;
        Ok(queue)
    }

    fn waiting(&self) -> MutexGuard<'_, Waiting<L>> {
        self.0.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Queues a line; waits for nobody.
    pub(super) fn put(&self, line: L) {
        let mut waiting = self.waiting();
        let len = line.as_ref().len();
        if waiting.bytes.saturating_add(len) > WAITING {
            waiting.lost += 1;
        } else {
            waiting.bytes += len;
            waiting.lines.push_back(line);
        }
        drop(waiting);
        self.0.news.notify_all();
    }

    /// Queues the line of a process that panics, however many wait, and waits until everything is
    /// written, or for so long. Whoever panics may hold the lock, and is not waited for.
    pub(super) fn last(&self, line: L, within: Duration) {
        let deadline = Instant::now() + within;
        let left = || deadline.saturating_duration_since(Instant::now());
        let mut waiting = loop {
            match self.0.waiting.try_lock() {
                Ok(waiting) => break waiting,
                Err(TryLockError::Poisoned(waiting)) => break waiting.into_inner(),
                Err(TryLockError::WouldBlock) if left().is_zero() => return,
                Err(TryLockError::WouldBlock) => std::thread::park_timeout(MOMENT),
            }
        };
        waiting.bytes += line.as_ref().len();
        waiting.lines.push_back(line);
        drop(waiting);
        self.0.news.notify_all();
        self.flush(left());
    }

    /// Waits until everything is written, or for so long.
    pub(super) fn flush(&self, within: Duration) {
        let deadline = Instant::now() + within;
        let mut waiting = self.waiting();
        while waiting.writing || !waiting.lines.is_empty() || waiting.lost > 0 {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            let waited = self.0.news.wait_timeout(waiting, left);
            waiting = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Writes for ever.
    fn run(&self, mut sink: impl Sink<Line = L>) {
        loop {
            let mut waiting = self.waiting();
            while waiting.lines.is_empty() && waiting.lost == 0 {
                waiting = self.0.news.wait(waiting).unwrap_or_else(PoisonError::into_inner);
            }
            waiting.writing = true;
            let line = waiting.lines.pop_front();
            // Lines are lost after all that wait.
            let lost = if line.is_none() { std::mem::take(&mut waiting.lost) } else { 0 };
            drop(waiting);
            let len = line.as_ref().map_or(0, |line| line.as_ref().len());
            match line {
                Some(line) => sink.write(line),
                None => sink.lost(lost),
            }
            let mut waiting = self.waiting();
            waiting.bytes -= len;
            waiting.writing = false;
            drop(waiting);
            self.0.news.notify_all();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{Receiver, Sender, channel};

    use super::*;

    /// Writes a line when it is told to.
    struct Slow(Receiver<()>, Sender<String>);

    impl Sink for Slow {
        type Line = Vec<u8>;

        fn write(&mut self, line: Vec<u8>) {
            self.0.recv().unwrap();
            self.1.send(format!("{} {}", line[0], line.len())).unwrap();
        }

        fn lost(&mut self, count: u64) {
            self.1.send(format!("lost {count}")).unwrap();
        }
    }

    #[test]
    fn whoever_says_something_waits_for_no_reader_and_what_is_lost_is_counted() {
        let (go, wait) = channel();
        let (written, read) = channel();
        let queue = Queue::start(Slow(wait, written)).unwrap();
        for n in 0..8 {
            queue.put(vec![n; WAITING / 4]);
        }
        queue.flush(Duration::from_millis(1));
        assert!(read.try_recv().is_err(), "nothing is written, and nobody waited");
        (0..4).for_each(|_| go.send(()).unwrap());
        queue.flush(Duration::from_secs(30));
        let lines: Vec<_> = read.try_iter().collect();
        let kept = (0..4).map(|n| format!("{n} {}", WAITING / 4));
        assert_eq!(lines, kept.chain(["lost 4".to_owned()]).collect::<Vec<_>>());
        queue.put(vec![9]);
        go.send(()).unwrap();
        assert_eq!(read.recv().unwrap(), "9 1", "and it goes on");
    }

    #[test]
    fn the_last_line_of_a_panic_is_written_after_all_that_wait_and_never_waits_for_long() {
        let (go, wait) = channel();
        let (written, read) = channel();
        let queue = Queue::start(Slow(wait, written)).unwrap();
        (0..4).for_each(|n| queue.put(vec![n; WAITING / 4]));
        queue.last(vec![8], Duration::from_millis(1));
        assert!(read.try_recv().is_err(), "nobody takes it");
        (0..6).for_each(|_| go.send(()).unwrap());
        queue.last(vec![9], Duration::from_secs(30));
        let lines: Vec<_> = read.try_iter().collect();
        assert_eq!(lines[4..], ["8 1", "9 1"]);
        let _held = queue.waiting();
        queue.last(vec![10], Duration::from_millis(1));
    }
}
