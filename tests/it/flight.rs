//! Requests in flight when the fence closes, at an export without a daemon around it: nothing else
//! decides what comes first.

use std::collections::BTreeSet;
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use byokd::export::{Export, ExportError, ExportTable};
use byokd::key::lease::FenceReason;
use byokd::nbd::kernel;
use byokd::nbd::transmission::Ending;
use byokd::store::DirectIo;
use tempfile::TempDir;

use crate::backing::HangingDisk;
use crate::hold::{export, key, make, open, serve_in};
use crate::mounts::can_mount;
use crate::raw::{DISC, FLUSH, READ, Raw, WRITE, WRITE_ZEROES, request};
use crate::support::{PATIENCE, in_memory, on_disk, until};

const SECTOR: u64 = 4096;
const PERM: u32 = 1;
const IO: u32 = 5;
const SHUTDOWN: u32 = 108;

/// The store as it is when nothing changes in it any more.
fn at_rest(backing: &Path) -> Vec<u8> {
    let mut before = Vec::new();
    let mut since = Instant::now();
    until("the store is at rest", || {
        let now = std::fs::read(backing).unwrap();
        if now != before {
            (before, since) = (now, Instant::now());
        }
        since.elapsed() > Duration::from_millis(200)
    });
    before
}

/// Replies that their client does not take: more than fits into its socket.
const READS: u64 = 5;
/// More than the store is given at a time.
const WRITES: u64 = 760;

fn more_than_the_store_takes(client: &mut Raw) {
    let read = (1..=READS).map(|n| request(0, READ, WRITES + n, 0, 1 << 20));
    let write = |n| request(0, WRITE_ZEROES, n, n * SECTOR, u32::try_from(SECTOR).unwrap());
    client.send(&read.chain((1..=WRITES).map(write)).collect::<Vec<_>>().concat());
}

#[test]
fn what_was_refused_before_the_store_had_it_never_gets_there() {
    let dir = on_disk();
    let export = export(dir.path(), None);
    let socket = serve_in(dir.path(), &export);
    let mut client = Raw::connected(&socket, "v");
    assert_eq!(client.write(0, &vec![b'o'; 3 << 20]), 0);
    more_than_the_store_takes(&mut client);
    let backing = dir.path().join("v.img");
    let before = at_rest(&backing);
    assert!(export.in_flight() > 125, "there are more than it was given: {}", export.in_flight());
    let _destroyed = export.close(FenceReason::Suspended);
    let mut refused = BTreeSet::new();
    for _ in 0..WRITES + READS {
        match client.any_reply() {
            (cookie, 0) if cookie > WRITES => drop(client.take_vec(1 << 20)),
            (_, 0) => {}
            (cookie, PERM) => drop(refused.insert(cookie)),
            (cookie, error) => panic!("{cookie}: {error}"),
        }
    }
    assert!(refused.contains(&WRITES), "the last one was not begun");
    let after = at_rest(&backing);
    assert!(after == before, "what was not begun when the fence closed is not done after it");
    until("nothing is left in the store", || export.stalled() == 0);
    export.restore(key()).unwrap();
    assert_eq!(client.command(0, READ, 0, 0), 0);
}

#[test]
fn a_fence_that_was_closed_for_good_is_opened_by_no_key() {
    let dir = on_disk();
    let export = export(dir.path(), Some(Duration::from_secs(60)));
    let socket = serve_in(dir.path(), &export);
    let mut client = Raw::connected(&socket, "v");
    until("the client is there", || export.connections() == 1);
    let _destroyed = export.close(FenceReason::Denied);
    assert!(export.is_held(), "requests wait for the key");
    let _destroyed = export.close_for_good(FenceReason::Stopping);
    assert!(!export.is_held(), "and in vain from here on");
    assert!(matches!(export.restore(key()), Err(ExportError::Stopping)));
    assert!(export.gatekeeper().is_closed());
    assert_eq!(client.command(0, READ, 0, 4096), SHUTDOWN);
}

/// A connection of the kernel's client.
fn of_the_kernel(export: &Arc<Export>, table: &ExportTable) -> Raw {
    let (kernel, ours) = UnixStream::pair().unwrap();
    export.open_for_kernel().unwrap();
    kernel::serve(ours, Arc::clone(export), table, drop).unwrap();
    Raw::over(kernel)
}

/// A volume whose store hangs when it is told to, where such can be mounted.
fn on_a_disk_that_hangs(
    hold: Option<Duration>,
    direct: DirectIo,
) -> Option<(TempDir, HangingDisk, Arc<Export>)> {
    if !can_mount(&["nbdkit"]) {
        return None;
    }
    let dir = in_memory();
    let made = dir.path().join("v.img");
    make(&made);
    let disk = HangingDisk::new();
    disk.put(&made);
    let export = open(&disk.path(), hold, direct);
    Some((dir, disk, export))
}

/// The kernel sends what a connection that it gave up had been sent on its others, at once. What is
/// done of it after that could undo what is written after its copy.
#[test]
fn no_connection_of_the_kernel_goes_on_while_one_that_it_gave_up_has_requests_in_the_store() {
    while_the_kernel_gives_one_up_with(1);
}

/// The same where not even all of them are in the store: more than a connection holds, so that it
/// waits for room, with more in its socket.
#[test]
fn no_connection_of_the_kernel_goes_on_while_one_that_it_gave_up_has_requests_unread() {
    while_the_kernel_gives_one_up_with(40);
}

fn while_the_kernel_gives_one_up_with(writes: u64) {
    const LEN: u32 = 1 << 20;
    let Some((_dir, disk, export)) = on_a_disk_that_hangs(None, DirectIo::Auto) else { return };
    let table = ExportTable::new();
    let mut given_up = of_the_kernel(&export, &table);
    let mut other = of_the_kernel(&export, &table);
    assert_eq!(given_up.write(0, &[b'o'; 4096]), 0);
    assert_eq!(other.write(8192, &[b'o'; 4096]), 0);
    disk.signal("-STOP");
    let write =
        |n, byte, len: u32| [request(0, WRITE, n, 0, len), vec![byte; len as usize]].concat();
    let mut sender = given_up.duplicate();
    let sends = std::thread::spawn(move || {
        // It ends early when the connection is given up.
        (1..=writes).for_each(|n| drop(sender.try_send(&write(n, b'a', LEN))));
    });
    let most = 16;
    until("the store has what it is given", || export.in_flight() >= writes.min(most));
    if writes < most {
        // All of it is on its way then.
        until("it is sent", || sends.is_finished());
    }
    given_up.shut();
    sends.join().unwrap();
    other.send(&write(2, b'b', 4096));
    assert!(other.is_closed(), "it has to connect again, and to wait");
    let mut next = of_the_kernel(&export, &table);
    next.send(&write(2, b'b', 4096));
    disk.signal("-CONT");
    assert_eq!(next.simple_reply(2), 0);
    until("what was given up has gone", || export.connections() == 1);
    assert!(next.read(0, 4096) == [b'b'; 4096]);
    drop(next);
    until("nobody is connected", || export.connections() == 0);
}

/// What it had sent is sent again; nothing of it is done twice. That the device was disconnected is
/// heard all the same.
#[test]
fn a_connection_that_the_kernel_gave_up_begins_nothing_and_hears_of_a_disconnect() {
    let dir = tempfile::tempdir().unwrap();
    let export = export(dir.path(), None);
    let mut client = Raw::connected(&serve_in(dir.path(), &export), "v");
    assert_eq!(client.write(0, &[b'o'; 4096]), 0);
    let write = [request(0, WRITE, 1, 0, 128 << 10), vec![b'a'; 128 << 10]].concat();
    let disconnect = request(0, DISC, 2, 0, 0);
    for (sent, heard) in
        [(write.clone(), Ending::Closed), ([write, disconnect].concat(), Ending::Disconnected)]
    {
        let (mut kernel, ours) = UnixStream::pair().unwrap();
        kernel.write_all(&sent).unwrap();
        kernel.shutdown(std::net::Shutdown::Both).unwrap();
        let (tell, ended) = mpsc::channel();
        let ends = move |ending| tell.send(ending).unwrap();
        kernel::serve(ours, Arc::clone(&export), &ExportTable::new(), ends).unwrap();
        assert_eq!(ended.recv_timeout(PATIENCE).unwrap(), Some(heard));
    }
    assert!(client.read(0, 4096) == [b'o'; 4096]);
}

/// They are answered with errors however long the store hangs; what it has is waited for before the
/// key comes back.
#[test]
fn the_kernels_connections_are_refused_while_the_store_hangs_with_what_it_gave_up() {
    let Some((_dir, disk, export)) = on_a_disk_that_hangs(None, DirectIo::Auto) else { return };
    let table = ExportTable::new();
    let mut given_up = of_the_kernel(&export, &table);
    let mut other = of_the_kernel(&export, &table);
    assert_eq!(given_up.write(0, &[b'o'; 4096]), 0);
    disk.signal("-STOP");
    given_up.send(&[request(0, WRITE, 1, 0, 4096), vec![b'a'; 4096]].concat());
    until("it is in the store", || export.in_flight() == 1);
    let _destroyed = export.close(FenceReason::Suspended);
    assert_eq!(given_up.simple_reply(1), PERM);
    given_up.shut();
    let mut next = of_the_kernel(&export, &table);
    assert_eq!(other.write(4096, &[b'x'; 4096]), PERM);
    assert_eq!(next.write(4096, &[b'x'; 4096]), PERM);
    assert!(export.restore(key()).is_err(), "the store still has a write from before");
    disk.signal("-CONT");
    until("the store is done with it", || export.restore(key()).is_ok());
    assert_eq!(next.write(4096, &[b'n'; 4096]), 0);
    assert!(other.read(4096, 4096) == [b'n'; 4096]);
}

/// Whoever waits for a restore may have what another one waits for: it does not wait for a connection
/// that the kernel gave up meanwhile.
#[test]
fn a_key_that_is_back_does_not_wait_for_a_connection_that_waits_for_it() {
    let hold = Some(Duration::from_secs(600));
    let Some((dir, disk, export)) = on_a_disk_that_hangs(hold, DirectIo::Auto) else { return };
    let mut holds = Raw::connected(&serve_in(dir.path(), &export), "v");
    let mut kernel = of_the_kernel(&export, &ExportTable::new());
    assert_eq!(holds.write(0, &[b'o'; 4096]), 0);
    assert_eq!(kernel.write(8192, &[b'o'; 4096]), 0);
    disk.signal("-STOP");
    holds.send(&[request(0, WRITE, 1, 0, 512), vec![b'p'; 512]].concat());
    until("it is being read for a part of a sector", || export.in_flight() == 1);
    kernel.send(&[request(0, WRITE, 2, 0, 4096), vec![b'a'; 4096]].concat());
    until("another one waits for its turn", || export.in_flight() == 2);
    let _destroyed = export.close(FenceReason::Denied);
    disk.signal("-CONT");
    kernel.shut();
    until("the key is back", || export.restore(key()).is_ok());
    assert_eq!(holds.simple_reply(1), 0);
    assert!(holds.read(0, 512) == [b'p'; 512]);
}

/// The store told the daemon before this one, and tells it once.
#[test]
fn the_kernels_first_flush_after_a_failed_last_one_fails_and_no_other() {
    let dir = on_disk();
    let export = export(dir.path(), None);
    let (tell, told) = mpsc::channel();
    export.unflushed().since_before(move || tell.send(()).unwrap());
    let mut kernel = of_the_kernel(&export, &ExportTable::new());
    kernel.send(&[request(0, WRITE, 1, 0, 4096), vec![b'a'; 4096]].concat());
    assert_eq!(kernel.simple_reply(1), 0);
    for (id, said) in [(2, IO), (3, 0)] {
        kernel.send(&request(0, FLUSH, id, 0, 0));
        assert_eq!(kernel.simple_reply(id), said);
    }
    assert!(told.try_recv().is_ok() && !export.unflushed().is_so());
}

/// A connection of the kernel's client, and how it ends.
fn joins(export: &Arc<Export>) -> (UnixStream, mpsc::Receiver<Option<Ending>>) {
    let (kernel, ours) = UnixStream::pair().unwrap();
    let (tell, ended) = mpsc::channel();
    let ends = move |ending| tell.send(ending).unwrap();
    kernel::serve(ours, Arc::clone(export), &ExportTable::new(), ends).unwrap();
    (kernel, ended)
}

/// An attach may be that late, or whoever stood in for the volume until its key came.
#[test]
fn a_connection_of_the_kernel_that_joins_after_the_hand_over_has_begun_is_handed_over() {
    let made = on_a_disk_that_hangs(None, DirectIo::Auto);
    let Some((_dir, _disk, export)) = made else { return };
    export.open_for_kernel().unwrap();
    export.hand_over();
    let (kernel, ended) = joins(&export);
    assert_eq!(ended.recv_timeout(PATIENCE).unwrap(), Some(Ending::HandedOver));
    drop(kernel);
}

/// Else the next daemon would not get it, and what the kernel sent on it would be lost.
#[test]
fn a_connection_of_the_kernel_that_begins_while_the_store_hangs_can_be_handed_over() {
    // Through the page cache, it is opened again for the kernel.
    let made = on_a_disk_that_hangs(None, DirectIo::Off);
    let Some((_dir, disk, export)) = made else { return };
    export.open_for_kernel().unwrap();
    disk.signal_file("-STOP");
    let (kernel, ended) = joins(&export);
    until("it is there", || export.connections() == 1);
    export.hand_over();
    let ended = ended.recv_timeout(PATIENCE);
    disk.signal_file("-CONT");
    assert_eq!(ended.unwrap(), Some(Ending::HandedOver));
    drop(kernel);
}
