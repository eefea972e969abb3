//! A volume's device in the kernel, from its attach to its detach, over fences and restarts.
//!
//! One task per device owns our ends of its socketpairs. What answers on them changes: a connection
//! of the volume's export while there is one, a stand-in without a key while there is not. A
//! connection that dies is replaced, as long as the device is ours.
//!
//! ```text
//!   connect ──> serving ──hand over──> (descriptors in systemd's store) ──resume──┐
//!                 ^  └──────────────── crash: the kernel sees the end ───resume──┤
//!                 └───────── key ───────── standing in: waiting, or refusing <────┘
//! ```
//!
//! | file | what it is |
//! |---|---|
//! | `link.rs` | one connection: made, replaced, and what becomes of it |
//! | `purge.rs` | what is done about cached plaintext after a fence |

mod link;
pub mod purge;

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::{JoinHandle, JoinSet, spawn_blocking};
use tokio::time::{Instant, sleep_until, timeout_at};
use tracing::{error, info, warn};

use crate::attachment::link::{Link, Repaired, pair, repair};
use crate::attachment::purge::{PurgePlan, Purging, carry_out};
use crate::audit::Audit;
use crate::audit::record::{Event, Kind};
use crate::clock::now;
use crate::exit::ExitCode;
use crate::export::{Export, ExportTable};
use crate::keeper::KeyReport;
use crate::kernel::client::KernelClient;
use crate::kernel::noted::Mark;
use crate::kernel::sysfs::{self, Device};
use crate::kernel::{Ask, Connect, Holder, KernelError, KernelErrorClass, NAMING, Told};
use crate::nbd::stand_in::StandIn;
use crate::nbd::transmission::Ending;

/// How long the kernel may take for a new device; it reads from it meanwhile.
const CONNECT: Duration = Duration::from_secs(20);

/// How long it may take to let go of a device before our ends are closed, which frees it.
const DISCONNECT: Duration = Duration::from_secs(5);
const _: () = assert!(DISCONNECT.as_secs() > NAMING.as_secs(), "udev is waited for in it");

/// How long it may take after that.
const LET_GO: Duration = Duration::from_secs(5);

/// How long all connections together may take to a place between two requests while these wait for
/// the key: time for those that have nothing to wait for.
const HELD: Duration = Duration::from_millis(500);

/// How long after that their device may take to give them away.
const ANSWER: Duration = Duration::from_millis(100);

/// How often file systems that saw errors are looked at, until they are well.
const LOOK_AGAIN: Duration = Duration::from_secs(5);

/// How long the helper may take to say who holds a device: udev is waited for.
const LOOK: Duration = Duration::from_secs(10);

/// How long the helper may take to say whether a device is still connected.
const PROBE: Duration = Duration::from_secs(3);

/// Whom a device belongs to and who looks after it.
#[derive(Clone)]
pub struct Owner {
    /// The volume's name.
    pub name: String,
    /// The way to the helper.
    pub client: KernelClient,
    /// Whose memory budget its connections share.
    pub table: ExportTable,
    /// Where it is recorded.
    pub audit: Arc<Audit>,
    /// What is done after a fence.
    pub plan: PurgePlan,
    /// Where the next daemon finds what is noted of devices.
    pub notes: PathBuf,
    /// Hears the volume's name when its device has gone by itself.
    pub gone: mpsc::UnboundedSender<String>,
}

impl Owner {
    fn record(&self, kind: Kind, device: Device, why: Option<&str>) {
        let path = format!("/dev/nbd{}", device.index);
        let mut event = Event::new(kind).volume(&self.name).detail("device", &path);
        event.uuid = Some(device.volume);
        event.why = why.map(str::to_owned);
        self.audit.record(event);
    }
}

/// How a device is.
#[derive(Clone, Debug, Default)]
pub struct State {
    /// Connections that work.
    pub connections: usize,
    /// What is done with requests.
    pub requests: Requests,
    /// Why the device is gone, if it is.
    pub gone: Option<String>,
    /// What the last purge did.
    pub purge: Vec<purge::Done>,
    /// File systems on it that do not work any more: device and mount point of each.
    pub damaged: Vec<String>,
}

/// What is done with requests.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Requests {
    /// They wait for the key.
    #[default]
    Wait,
    /// They are answered with errors, as the key may not be had.
    Refused,
    /// The export answers.
    Served,
}

/// A device's handle. Dropped, it leaves the device to the kernel, where requests wait.
pub struct Attachment {
    device: Device,
    commands: mpsc::Sender<Command>,
    state: watch::Receiver<State>,
    client: KernelClient,
    task: JoinHandle<()>,
}

impl Drop for Attachment {
    fn drop(&mut self) {
        self.task.abort();
    }
}

enum Command {
    Serve(Arc<Export>, watch::Receiver<KeyReport>, PurgePlan, oneshot::Sender<()>),
    Refuse { purge: bool },
    HandOver(oneshot::Sender<Vec<OwnedFd>>, Instant),
    Disconnect(oneshot::Sender<Result<(), KernelError>>),
    Abandon(oneshot::Sender<()>),
}

impl Attachment {
    /// Makes a device of `export`.
    ///
    /// # Errors
    /// Why there is none.
    pub async fn connect(
        owner: Owner,
        connect: Connect,
        connections: usize,
        export: Arc<Export>,
        reports: watch::Receiver<KeyReport>,
    ) -> Result<Self, KernelError> {
        let (events, ended) = mpsc::unbounded_channel();
        let (mut links, mut theirs) = (Vec::new(), Vec::new());
        for at in 0..connections {
            let (link, their) = pair().map_err(|e| no_socket(&e))?;
            links.push(link);
            theirs.push(OwnedFd::from(their));
            // The kernel reads from the device as soon as it is there.
            let started = links[at].serve(at, &export, &owner.table, &events);
            started.map_err(|e| no_socket(&e))?;
        }
        let client = owner.client.clone();
        let volume = connect.volume;
        let told = ask(&client, Ask::Connect(connect), theirs, CONNECT).await?;
        let Told::Device { index } = told else { return Err(unexpected()) };
        let device = Device { index, volume };
        let mode = Mode::Serving { export, reports };
        Ok(Self::start(owner, device, links, mode, events, ended))
    }

    /// Goes on with a device that is there: with the sockets that were handed over, or with
    /// `connections` new ones. Requests wait.
    ///
    /// # Errors
    /// There is no thread or socket to be had.
    pub fn resume(
        owner: Owner,
        device: Device,
        sockets: Vec<OwnedFd>,
        connections: usize,
    ) -> io::Result<Self> {
        let (events, ended) = mpsc::unbounded_channel();
        let mut links: Vec<_> =
            sockets.into_iter().map(|fd| Link::of(UnixStream::from(fd))).collect();
        while links.len() < connections.max(1) {
            links.push(Link::dead());
        }
        for (at, link) in links.iter_mut().enumerate() {
            link.stand_in(at, false, &events)?;
        }
        Ok(Self::start(owner, device, links, Mode::Standing { refuse: false }, events, ended))
    }

    fn start(
        owner: Owner,
        device: Device,
        links: Vec<Link>,
        mode: Mode,
        events: mpsc::UnboundedSender<link::Ended>,
        ended: mpsc::UnboundedReceiver<link::Ended>,
    ) -> Self {
        let (commands, inbox) = mpsc::channel(8);
        let (tell, state) = watch::channel(State::default());
        let (purged, steps) = mpsc::unbounded_channel();
        let client = owner.client.clone();
        owner.record(Kind::DeviceAttach, device, None);
        let mut attending = Attending {
            owner,
            device,
            alive: Arc::new(AtomicUsize::new(0)),
            links,
            mode,
            events,
            ended,
            inbox,
            tell,
            state: State::default(),
            fenced: false,
            leaving: None,
            ending: false,
            repairs: JoinSet::new(),
            purging: JoinSet::new(),
            purged,
            steps,
            looking: JoinSet::new(),
        };
        // Whoever asks at once hears how it is.
        attending.publish();
        Self { device, commands, state, client, task: tokio::spawn(attending.run()) }
    }

    /// Which device.
    #[must_use]
    pub fn device(&self) -> Device {
        self.device
    }

    /// How it is.
    #[must_use]
    pub fn state(&self) -> State {
        self.state.borrow().clone()
    }

    /// Has `export` answer from now on.
    pub async fn serve(
        &self,
        export: Arc<Export>,
        reports: watch::Receiver<KeyReport>,
        plan: PurgePlan,
    ) {
        let (reply, served) = oneshot::channel();
        self.tell(Command::Serve(export, reports, plan, reply)).await;
        // Nobody serves a device that has gone.
        let _gone = served.await;
    }

    /// Answers requests with errors until there is an export; with `purge`, what the node has cached
    /// goes as after a fence.
    pub async fn refuse(&self, purge: bool) {
        self.tell(Command::Refuse { purge }).await;
    }

    /// Stops between two requests, everything answered: our ends, for the next daemon. Those that
    /// do not get there `within` the time are closed.
    pub async fn hand_over(&self, within: Duration) -> Vec<OwnedFd> {
        let (reply, wait) = oneshot::channel();
        let deadline = Instant::now() + within;
        let ends = async {
            self.tell(Command::HandOver(reply, deadline)).await;
            wait.await.unwrap_or_default()
        };
        // It may be busy with a kernel that does not let go of the device.
        timeout_at(deadline + ANSWER, ends).await.unwrap_or_default()
    }

    /// Takes the device away, in bounded time.
    ///
    /// # Errors
    /// The kernel or the helper did not; then all is as before.
    pub async fn disconnect(&self) -> Result<(), KernelError> {
        let (reply, wait) = oneshot::channel();
        self.tell(Command::Disconnect(reply)).await;
        wait.await.unwrap_or(Ok(()))
    }

    /// Closes our ends. If the device is still there, what waits for it fails after its dead timeout.
    pub async fn abandon(&self) {
        let (reply, wait) = oneshot::channel();
        self.tell(Command::Abandon(reply)).await;
        // It has ended already, then.
        let _done = wait.await;
    }

    /// Gives the device a new size.
    ///
    /// # Errors
    /// The kernel or the helper did not.
    pub async fn resize(&self, size: u64) -> Result<(), KernelError> {
        let Device { index, volume } = self.device;
        let reconfigure = Ask::Reconfigure { index, volume, size: Some(size) };
        ask(&self.client, reconfigure, Vec::new(), DISCONNECT).await.map(drop)
    }

    /// Who has the device mounted or open.
    ///
    /// # Errors
    /// The helper does not say.
    pub async fn holders(&self) -> Result<Vec<Holder>, KernelError> {
        holders(&self.client, self.device).await
    }

    async fn tell(&self, command: Command) {
        // The task ends with the device; then there is nothing to be told.
        let _told = self.commands.send(command).await;
    }
}

/// Who has a device mounted or open.
///
/// # Errors
/// The helper does not say.
pub async fn holders(client: &KernelClient, device: Device) -> Result<Vec<Holder>, KernelError> {
    let Device { index, volume } = device;
    let look = Ask::Holders { index, volume, mapped: false };
    match ask(client, look, Vec::new(), LOOK).await? {
        Told::Holders { holders } => Ok(holders),
        Told::Done | Told::Device { .. } | Told::Purged { .. } | Told::Failed(_) => {
            Err(unexpected())
        }
    }
}

/// That a device that is there is connected, and not just held by who has it mounted or open.
///
/// # Errors
/// It is not, or the helper does not say.
pub async fn probe(client: &KernelClient, device: Device) -> Result<(), KernelError> {
    let Device { index, volume } = device;
    // It changes nothing.
    let reconfigure = Ask::Reconfigure { index, volume, size: None };
    ask(client, reconfigure, Vec::new(), PROBE).await.map(drop)
}

/// Has the kernel let go of what is left of a device, for good: nothing connects it again.
///
/// # Errors
/// The kernel or the helper did not.
pub async fn let_go(client: &KernelClient, device: Device) -> Result<(), KernelError> {
    let Device { index, volume } = device;
    match ask(client, Ask::Disconnect { index, volume }, Vec::new(), DISCONNECT).await {
        Err(error) if error.class == KernelErrorClass::NotOurs => Ok(()),
        asked => asked.map(drop),
    }
}

async fn ask(
    client: &KernelClient,
    what: Ask,
    sockets: Vec<OwnedFd>,
    within: Duration,
) -> Result<Told, KernelError> {
    let client = client.clone();
    let asked = spawn_blocking(move || client.ask(&what, sockets, within)).await;
    asked.unwrap_or_else(|_| Err(unexpected()))
}

fn unexpected() -> KernelError {
    KernelError::new(
        ExitCode::Failed,
        "byokd-kernel gave an answer to another question",
        "Use byokd and byokd-kernel of one version.",
    )
}

fn no_socket(error: &io::Error) -> KernelError {
    KernelError::new(
        ExitCode::Failed,
        format!("there is no connection to be had: {error}"),
        "Free memory, or raise the limits of threads and open files.",
    )
}

enum Mode {
    Standing { refuse: bool },
    Serving { export: Arc<Export>, reports: watch::Receiver<KeyReport> },
}

/// The task.
struct Attending {
    owner: Owner,
    device: Device,
    links: Vec<Link>,
    /// How many of them work.
    alive: Arc<AtomicUsize>,
    mode: Mode,
    events: mpsc::UnboundedSender<link::Ended>,
    ended: mpsc::UnboundedReceiver<link::Ended>,
    inbox: mpsc::Receiver<Command>,
    tell: watch::Sender<State>,
    state: State,
    /// The key may not be had: what the node has cached is purged, or was.
    fenced: bool,
    /// Who waits for all connections to stop between two requests, and until when.
    leaving: Option<(oneshot::Sender<Vec<OwnedFd>>, Instant)>,
    /// The device is being taken away: what ends now is not replaced.
    ending: bool,
    repairs: JoinSet<(usize, Repaired)>,
    purging: JoinSet<()>,
    /// A purge's steps as they are done.
    purged: mpsc::UnboundedSender<purge::Done>,
    steps: mpsc::UnboundedReceiver<purge::Done>,
    looking: JoinSet<Option<Vec<String>>>,
}

enum Wake {
    Told(Option<Command>),
    Ended(link::Ended),
    Repaired(usize, Repaired),
    Report,
    Purged(purge::Done),
    Looked(Option<Vec<String>>),
    Time,
}

impl Attending {
    async fn run(mut self) {
        for at in 0..self.links.len() {
            if !self.links[at].is_open() {
                self.repair(at);
            }
        }
        self.publish();
        loop {
            match self.next().await {
                Wake::Told(None) => return,
                Wake::Told(Some(command)) => {
                    if self.told(command).await {
                        return;
                    }
                }
                Wake::Ended(ended) => self.link_ended(ended),
                Wake::Repaired(at, repaired) => self.repaired(at, repaired),
                Wake::Report => self.reported(),
                Wake::Purged(done) => self.state.purge.push(done),
                Wake::Looked(found) => self.looked(found),
                Wake::Time => self.look(),
            }
            if self.all_left() && self.leave() {
                return;
            }
            self.publish();
        }
    }

    async fn next(&mut self) -> Wake {
        let deadline = self.leaving.as_ref().map(|(_, deadline)| *deadline);
        let look = Instant::now() + LOOK_AGAIN;
        let reports = match &mut self.mode {
            Mode::Serving { reports, .. } => Some(reports),
            Mode::Standing { .. } => None,
        };
        let has_reports = reports.is_some();
        let report = async {
            match reports {
                // The keeper is gone when the volume is being detached; nothing more is heard.
                Some(reports) => match reports.changed().await {
                    Ok(()) => {}
                    Err(_) => std::future::pending().await,
                },
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            command = self.inbox.recv() => Wake::Told(command),
            Some(ended) = self.ended.recv() => Wake::Ended(ended),
            Some(done) = self.repairs.join_next(), if !self.repairs.is_empty() => match done {
                Ok((at, repaired)) => Wake::Repaired(at, repaired),
                Err(_) => Wake::Time,
            },
            Some(looked) = self.looking.join_next(), if !self.looking.is_empty() => {
                Wake::Looked(looked.unwrap_or_default())
            }
            Some(done) = self.steps.recv() => Wake::Purged(done),
            () = report, if has_reports => Wake::Report,
            () = sleep_until(deadline.unwrap_or(look)), if deadline.is_some() => Wake::Time,
            () = sleep_until(look), if !self.state.damaged.is_empty() => Wake::Time,
        }
    }

    /// Does what it is told; `true` when this ends.
    async fn told(&mut self, command: Command) -> bool {
        match command {
            Command::Serve(export, reports, plan, reply) => {
                self.owner.plan = plan;
                let serves = reports.borrow().serves;
                self.mode = Mode::Serving { export, reports };
                self.links.iter().for_each(Link::leave);
                self.fence(!serves);
                // They may have seen errors before this daemon, or before its key.
                self.look();
                self.publish();
                // Who asked may have gone.
                let _heard = reply.send(());
            }
            Command::Refuse { purge } => {
                if let Mode::Standing { refuse } = &mut self.mode {
                    *refuse = true;
                    self.links.iter().for_each(Link::refuse);
                    if purge {
                        self.fence(true);
                    }
                }
            }
            Command::HandOver(reply, deadline) => {
                let held = match &self.mode {
                    Mode::Serving { export, .. } => export.is_held(),
                    Mode::Standing { .. } => false,
                };
                // What has been taken and waits for the key cannot be answered: the kernel sends
                // it again.
                let deadline = if held { deadline.min(Instant::now() + HELD) } else { deadline };
                self.leaving = Some((reply, deadline));
                self.repairs.abort_all();
                self.purging.abort_all();
                match &self.mode {
                    Mode::Serving { export, .. } => export.hand_over(),
                    Mode::Standing { .. } => {}
                }
                self.links.iter().for_each(Link::leave);
            }
            Command::Disconnect(reply) => {
                let done = self.disconnect().await;
                let ends = done.is_ok();
                // Who asked may have gone.
                let _heard = reply.send(done);
                return ends;
            }
            Command::Abandon(reply) => {
                self.ending = true;
                self.links.iter().for_each(Link::shut);
                let _heard = reply.send(());
                return true;
            }
        }
        false
    }

    fn link_ended(&mut self, ended: link::Ended) {
        let link::Ended { at, epoch, ending } = ended;
        let Some(link) = self.links.get_mut(at).filter(|link| link.epoch() == epoch) else {
            return;
        };
        link.thread_ended(ending);
        match ending {
            Some(Ending::HandedOver) if self.leaving.is_some() => {}
            Some(Ending::HandedOver) => self.start(at),
            Some(Ending::Disconnected) => {
                link.close();
                if !self.ending {
                    let purged = self.owner.plan.disconnect && self.fenced;
                    self.gone(if purged {
                        "its device was disconnected after the fence, as configured"
                    } else {
                        "its device was disconnected by someone else (nbd-client -d?)"
                    });
                }
            }
            Some(Ending::Closed) | None => {
                link.close();
                if !self.ending && self.leaving.is_none() && self.state.gone.is_none() {
                    warn!(
                        volume = self.owner.name,
                        device = self.path(),
                        "a connection to the kernel ended; making another"
                    );
                    self.repair(at);
                }
            }
        }
    }

    /// Starts what answers on an open link.
    fn start(&mut self, at: usize) {
        let (events, table) = (self.events.clone(), self.owner.table.clone());
        let started = match &self.mode {
            Mode::Serving { export, .. } => self.links[at].serve(at, export, &table, &events),
            Mode::Standing { refuse } => self.links[at].stand_in(at, *refuse, &events),
        };
        if let Err(error) = started {
            error!(volume = self.owner.name, %error, "no thread for a connection to the kernel");
            self.links[at].close();
            self.repair(at);
        }
    }

    fn repair(&mut self, at: usize) {
        let (client, device) = (self.owner.client.clone(), self.device);
        let (alive, name) = (Arc::clone(&self.alive), self.owner.name.clone());
        let (known, from) = (self.links[at].is_known(), self.links[at].renewable());
        self.repairs.spawn(async move {
            sleep_until(from).await;
            (at, repair(client, device, alive, known, &name).await)
        });
    }

    fn repaired(&mut self, at: usize, repaired: Repaired) {
        match repaired {
            Repaired::Link(stream) if self.leaving.is_none() && !self.ending => {
                self.links[at].renew(stream);
                info!(
                    volume = self.owner.name,
                    device = self.path(),
                    "the kernel took a new connection"
                );
                self.start(at);
            }
            Repaired::Link(_) => {}
            Repaired::Superfluous => {
                info!(
                    volume = self.owner.name,
                    device = self.path(),
                    "the device has fewer connections"
                );
            }
            Repaired::Gone => self.gone("its device was disconnected while byokd was not there"),
        }
    }

    /// The device is not ours any more.
    fn gone(&mut self, why: &str) {
        if self.state.gone.is_some() {
            return;
        }
        warn!(volume = self.owner.name, device = self.path(), why, "the device is gone");
        self.owner.record(Kind::DeviceDetach, self.device, Some(why));
        self.state.gone = Some(why.to_owned());
        self.repairs.abort_all();
        self.purging.abort_all();
        // Whoever hears it looks why.
        self.publish();
        // It is gone with the daemon.
        let _told = self.owner.gone.send(self.owner.name.clone());
    }

    /// Takes the device away. What hangs in the kernel is freed by closing our ends.
    async fn disconnect(&mut self) -> Result<(), KernelError> {
        let Device { index, volume } = self.device;
        if self.state.gone.is_some() {
            return Ok(());
        }
        self.ending = true;
        self.repairs.abort_all();
        let tell = Ask::Disconnect { index, volume };
        match ask(&self.owner.client, tell, Vec::new(), DISCONNECT).await {
            Ok(_) => {}
            Err(error) if error.class == KernelErrorClass::Slow => {
                warn!(
                    volume = self.owner.name,
                    device = self.path(),
                    "the kernel does not let go of the device; closing its connections"
                );
                self.links.iter().for_each(Link::shut);
                let again = Ask::Disconnect { index, volume };
                if let Err(error) = ask(&self.owner.client, again, Vec::new(), LET_GO).await {
                    warn!(volume = self.owner.name, device = self.path(), %error, "the device may be left without connections");
                }
            }
            Err(error)
                if error.class == KernelErrorClass::NotOurs
                    && sysfs::backend(index) != Some(volume) => {}
            Err(error) => {
                self.ending = false;
                for at in 0..self.links.len() {
                    if !self.links[at].is_open() {
                        self.repair(at);
                    }
                }
                return Err(error);
            }
        }
        info!(volume = self.owner.name, device = self.path(), "device disconnected");
        self.owner.record(Kind::DeviceDetach, self.device, None);
        Ok(())
    }

    /// Whether all connections have stopped that were to, or had the time to.
    fn all_left(&self) -> bool {
        self.leaving.as_ref().is_some_and(|(_, deadline)| {
            Instant::now() >= *deadline || self.links.iter().all(|link| !link.is_running())
        })
    }

    /// Gives away the ends that are between two requests.
    fn leave(&mut self) -> bool {
        let Some((reply, _)) = self.leaving.take() else { return false };
        let links = std::mem::take(&mut self.links);
        let total = links.len();
        let ends: Vec<_> = links.into_iter().filter_map(Link::handed_over).collect();
        if ends.len() < total {
            warn!(
                volume = self.owner.name,
                device = self.path(),
                connections = total - ends.len(),
                "closed connections that did not get to a place between two requests; what was sent on them is sent again after the request timeout"
            );
        }
        let _heard = reply.send(ends);
        true
    }

    fn reported(&mut self) {
        let Mode::Serving { reports, .. } = &mut self.mode else { return };
        let serves = reports.borrow_and_update().serves;
        if serves == self.fenced {
            self.fence(!serves);
            self.look();
        }
    }

    /// Purges what the node has cached when the key may not be had any more, and not when it may.
    fn fence(&mut self, fenced: bool) {
        self.note(fenced);
        if std::mem::replace(&mut self.fenced, fenced) == fenced {
            return;
        }
        self.purging.abort_all();
        if !fenced {
            return;
        }
        self.state.purge.clear();
        let purging = Purging {
            name: self.owner.name.clone(),
            audit: Arc::clone(&self.owner.audit),
            client: self.owner.client.clone(),
            device: self.device,
            export: match &self.mode {
                Mode::Serving { export, .. } => Some(Arc::clone(export)),
                Mode::Standing { .. } => None,
            },
            done: self.purged.clone(),
        };
        self.purging.spawn(carry_out(self.owner.plan.clone(), purging));
    }

    /// Notes it for the next daemon, which may not be able to ask KMS.
    fn note(&self, fenced: bool) {
        let (notes, uuid) = (&self.owner.notes, self.device.volume);
        if !fenced {
            Mark::Fenced.clear(notes, uuid);
        } else if let Err(error) = Mark::Fenced.set(notes, uuid, now().0) {
            warn!(volume = self.owner.name, device = self.path(), %error, "the next daemon will not know of the fence");
        }
    }

    /// Looks for file systems that do not work any more.
    fn look(&mut self) {
        if self.leaving.is_some() || !self.looking.is_empty() || self.fenced {
            return;
        }
        let (client, Device { index, volume }) = (self.owner.client.clone(), self.device);
        self.looking.spawn(async move {
            match ask(&client, Ask::Damaged { index, volume }, Vec::new(), LOOK).await {
                Ok(Told::Purged { failed, .. }) => Some(failed),
                Ok(_) | Err(_) => None,
            }
        });
    }

    fn looked(&mut self, found: Option<Vec<String>>) {
        let Some(damaged) = found else { return };
        if damaged != self.state.damaged && !damaged.is_empty() {
            warn!(volume = self.owner.name, mounts = ?damaged, "file systems that saw errors are still mounted; they have to be mounted anew");
        }
        self.state.damaged = damaged;
    }

    fn path(&self) -> String {
        format!("/dev/nbd{}", self.device.index)
    }

    fn publish(&mut self) {
        let alive = self.links.iter().filter(|link| link.is_open()).count();
        self.alive.store(alive, Ordering::SeqCst);
        self.state.connections = alive;
        self.state.requests = match self.mode {
            Mode::Serving { .. } => Requests::Served,
            Mode::Standing { refuse: true } => Requests::Refused,
            Mode::Standing { refuse: false } => Requests::Wait,
        };
        self.tell.send_replace(self.state.clone());
    }
}
