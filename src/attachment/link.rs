//! One connection to the kernel: our end of a socketpair, and what answers on it.

use std::io;
use std::net::Shutdown;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep};
use tracing::warn;

use super::{StandIn, ask};
use crate::export::{Export, ExportTable};
use crate::kernel::client::KernelClient;
use crate::kernel::sysfs::{self, Device};
use crate::kernel::{Ask, KernelError, KernelErrorClass};
use crate::nbd::kernel;
use crate::nbd::transmission::Ending;

/// How long the kernel may take for a new connection.
const RECONFIGURE: Duration = Duration::from_secs(5);

/// The first pause after the kernel took no connection: it has not noticed yet that one died.
const FIRST_PAUSE: Duration = Duration::from_millis(10);

/// The longest pause between two tries.
const LONGEST_PAUSE: Duration = Duration::from_secs(1);

/// A connection that ends sooner than this after it was made is not made again at once: what ended
/// it may end the next one too.
const SHORT_LIVED: Duration = Duration::from_millis(200);

/// A device that takes no more connections for so long, while others of it work, was made with
/// fewer.
const FEWER: Duration = Duration::from_secs(5);

/// What answered on a link has ended.
#[derive(Clone, Copy, Debug)]
pub(super) struct Ended {
    pub(super) at: usize,
    pub(super) epoch: u64,
    pub(super) ending: Option<Ending>,
}

/// See the module's text.
pub(super) struct Link {
    /// Ours, as long as the connection may work; what answers has a duplicate.
    ours: Option<UnixStream>,
    made: Instant,
    /// Counts what answered on it.
    epoch: u64,
    running: bool,
    /// What answered stopped between two requests.
    between_requests: bool,
    stand_in: Option<StandIn>,
}

/// A link, and the end for the kernel.
pub(super) fn pair() -> io::Result<(Link, UnixStream)> {
    let (ours, theirs) = UnixStream::pair()?;
    Ok((Link::of(ours), theirs))
}

impl Link {
    pub(super) fn of(ours: UnixStream) -> Self {
        Self { ours: Some(ours), ..Self::dead() }
    }

    /// One that has to be made.
    pub(super) fn dead() -> Self {
        Self {
            ours: None,
            made: Instant::now(),
            epoch: 0,
            running: false,
            between_requests: true,
            stand_in: None,
        }
    }

    pub(super) fn epoch(&self) -> u64 {
        self.epoch
    }

    pub(super) fn is_open(&self) -> bool {
        self.ours.is_some()
    }

    /// Whether the kernel is known to have, or to have had, this one.
    pub(super) fn is_known(&self) -> bool {
        self.epoch > 0
    }

    pub(super) fn is_running(&self) -> bool {
        self.running
    }

    /// Has the export answer.
    pub(super) fn serve(
        &mut self,
        at: usize,
        export: &Arc<Export>,
        table: &ExportTable,
        events: &mpsc::UnboundedSender<Ended>,
    ) -> io::Result<()> {
        let Some(stream) = self.begin()? else { return Ok(()) };
        kernel::serve(stream, Arc::clone(export), table, self.ended(at, events))?;
        self.running = true;
        Ok(())
    }

    /// Has a stand-in wait, or refuse.
    pub(super) fn stand_in(
        &mut self,
        at: usize,
        refuse: bool,
        events: &mpsc::UnboundedSender<Ended>,
    ) -> io::Result<()> {
        let Some(stream) = self.begin()? else { return Ok(()) };
        let stand_in = StandIn::start(stream, self.ended(at, events))?;
        self.running = true;
        if refuse {
            stand_in.refuse();
        }
        self.stand_in = Some(stand_in);
        Ok(())
    }

    fn begin(&mut self) -> io::Result<Option<UnixStream>> {
        let Some(ours) = &self.ours else { return Ok(None) };
        let stream = ours.try_clone()?;
        self.epoch += 1;
        self.between_requests = false;
        Ok(Some(stream))
    }

    fn ended(
        &self,
        at: usize,
        events: &mpsc::UnboundedSender<Ended>,
    ) -> impl FnOnce(Option<Ending>) + Send + 'static {
        let (events, epoch) = (events.clone(), self.epoch);
        move |ending| {
            // Nobody listens any more once the device is taken away.
            let _heard = events.send(Ended { at, epoch, ending });
        }
    }

    pub(super) fn thread_ended(&mut self, ending: Option<Ending>) {
        self.running = false;
        self.stand_in = None;
        self.between_requests = ending == Some(Ending::HandedOver);
    }

    /// Has a stand-in make room.
    pub(super) fn leave(&self) {
        if let Some(stand_in) = &self.stand_in {
            stand_in.leave();
        }
    }

    pub(super) fn refuse(&self) {
        if let Some(stand_in) = &self.stand_in {
            stand_in.refuse();
        }
    }

    /// The kernel sees its end; what waits there is freed.
    pub(super) fn shut(&self) {
        if let Some(ours) = &self.ours {
            // It may have ended already.
            let _shut = ours.shutdown(Shutdown::Both);
        }
    }

    pub(super) fn close(&mut self) {
        self.shut();
        self.ours = None;
    }

    pub(super) fn renew(&mut self, stream: UnixStream) {
        self.ours = Some(stream);
        self.made = Instant::now();
    }

    /// When it may be made anew.
    pub(super) fn renewable(&self) -> Instant {
        if self.is_known() { self.made + SHORT_LIVED } else { self.made }
    }

    /// Our end, if it is between two requests.
    pub(super) fn handed_over(self) -> Option<OwnedFd> {
        if self.between_requests && !self.running {
            return self.ours.map(OwnedFd::from);
        }
        self.shut();
        None
    }
}

/// How a try to replace a connection ended.
pub(super) enum Repaired {
    /// The kernel took this one's other end.
    Link(UnixStream),
    /// It has enough.
    Superfluous,
    /// There is no such device of ours any more.
    Gone,
}

/// Gives the device a new connection, however long that takes: meanwhile requests wait in the
/// kernel, until its dead timeout. One that it is `known` to have had is not given up, however late
/// the kernel notices that it ended.
pub(super) async fn repair(
    client: KernelClient,
    device: Device,
    alive: Arc<AtomicUsize>,
    known: bool,
    name: &str,
) -> Repaired {
    let Device { index, volume } = device;
    let began = Instant::now();
    let mut pause = FIRST_PAUSE;
    let mut said = false;
    loop {
        if sysfs::backend(index) != Some(volume) {
            return Repaired::Gone;
        }
        let why = match UnixStream::pair() {
            Err(error) => error.to_string(),
            Ok((ours, theirs)) => {
                let reconfigure = Ask::Reconfigure { index, volume, size: None };
                match ask(&client, reconfigure, vec![theirs.into()], RECONFIGURE).await {
                    Ok(_) if !is_hung_up(&ours) => return Repaired::Link(ours),
                    Ok(_)
                        if !known
                            && alive.load(Ordering::SeqCst) > 0
                            && began.elapsed() > FEWER =>
                    {
                        return Repaired::Superfluous;
                    }
                    // The kernel says yes also when it has no place for it.
                    Ok(_) => "the kernel has not noticed yet that the old one ended".to_owned(),
                    Err(KernelError {
                        class: KernelErrorClass::NotOurs | KernelErrorClass::Disconnected,
                        ..
                    }) => return Repaired::Gone,
                    Err(error) => {
                        pause = LONGEST_PAUSE;
                        format!("{error}. {}", error.remedy)
                    }
                }
            }
        };
        if !said && began.elapsed() > LONGEST_PAUSE / 2 {
            said = true;
            warn!(
                volume = name,
                device = format!("/dev/nbd{index}"),
                why,
                "no new connection to the kernel yet; requests wait"
            );
        }
        sleep(pause).await;
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
}

/// Whether the other end is closed.
pub(super) fn is_hung_up(stream: &UnixStream) -> bool {
    let mut fds = [PollFd::new(stream.as_fd(), PollFlags::empty())];
    let polled = poll(&mut fds, PollTimeout::ZERO);
    polled.is_ok_and(|n| n > 0) && fds[0].revents().is_some_and(|r| r.contains(PollFlags::POLLHUP))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_end_that_was_not_taken_is_noticed() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        assert!(!is_hung_up(&ours));
        drop(theirs);
        assert!(is_hung_up(&ours));
    }

    #[test]
    fn only_an_end_between_two_requests_is_handed_over() {
        let (link, _kernel) = pair().unwrap();
        assert!(link.handed_over().is_some(), "nothing has answered on it yet");
        let (mut link, kernel) = pair().unwrap();
        let _stream = link.begin().unwrap().unwrap();
        link.running = true;
        assert!(link.handed_over().is_none(), "what answers on it goes on");
        assert!(is_hung_up(&kernel));
        let (mut link, kernel) = pair().unwrap();
        let _stream = link.begin().unwrap().unwrap();
        link.thread_ended(Some(Ending::HandedOver));
        let kept = link.handed_over();
        assert!(kept.is_some() && !is_hung_up(&kernel));
        let (mut link, kernel) = pair().unwrap();
        let _stream = link.begin().unwrap().unwrap();
        link.thread_ended(None);
        assert!(link.handed_over().is_none());
        assert!(is_hung_up(&kernel));
    }
}
