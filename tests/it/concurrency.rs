//! Several connections write into the same sectors at the same time, and no byte of any of them is
//! lost.

use std::path::{Path, PathBuf};

use crate::raw::{FLUSH, Raw, TRIM, WRITE_ZEROES};
use crate::support::Daemon;

const SIZE: usize = 2 << 20;
const CONNECTIONS: usize = 4;
/// Connections own the bytes by turns, this many at a time: several owners in each sector, and
/// hardly any edge at a sector's.
const STRIPE: usize = 300;
const ROUNDS: usize = 2000;

/// Numbers that a failed run can be repeated with (xorshift64*).
struct Numbers(u64);

impl Numbers {
    fn byte(&mut self) -> u8 {
        self.below(256).to_le_bytes()[0]
    }

    fn below(&mut self, most: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        let number = self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33;
        usize::try_from(number).unwrap() % most
    }
}

/// Writes and zeroes pieces of its own bytes, and reads them back now and then.
fn work(socket: &Path, own: usize) -> Vec<(usize, Vec<u8>)> {
    let mut raw = Raw::connected(socket, "v");
    let mut numbers = Numbers(0x9e37_79b9 + own as u64);
    let stripes = SIZE / STRIPE / CONNECTIONS;
    let mut model: Vec<_> = (0..stripes)
        .map(|stripe| ((stripe * CONNECTIONS + own) * STRIPE, vec![0; STRIPE]))
        .collect();
    for round in 0..ROUNDS {
        // Few stripes, so that the connections meet.
        let (offset, bytes) = &mut model[numbers.below(stripes.min(8))];
        let start = numbers.below(STRIPE);
        let end = start + 1 + numbers.below(STRIPE - start);
        let at = (*offset + start) as u64;
        match numbers.below(4) {
            0 => {
                let len = u32::try_from(end - start).unwrap();
                assert_eq!(raw.command(0, WRITE_ZEROES, at, len), 0);
                bytes[start..end].fill(0);
            }
            1 => {
                let read = raw.read(at, u32::try_from(end - start).unwrap());
                assert!(read == bytes[start..end], "connection {own}, round {round}");
            }
            _ => {
                let data: Vec<_> = (start..end).map(|_| numbers.byte()).collect();
                assert_eq!(raw.write(at, &data), 0);
                bytes[start..end].copy_from_slice(&data);
            }
        }
    }
    model
}

/// Trims and overwrites whole sectors beside them, again and again.
fn disturb(socket: &Path, from: u64) -> Vec<u8> {
    let mut raw = Raw::connected(socket, "v");
    let mut last = Vec::new();
    for round in 0..60u8 {
        assert_eq!(raw.command(0, TRIM, from, 1 << 20), 0);
        last = vec![round; 1 << 20];
        assert_eq!(raw.write(from, &last), 0);
        assert_eq!(raw.command(0, FLUSH, 0, 0), 0);
    }
    last
}

fn nothing_is_lost(daemon: &Daemon, sector_size: &str) {
    let backing = daemon.backing("v");
    let size = BYTES.to_string();
    let key = daemon.key();
    daemon.ok(&[
        "volume",
        "create",
        "v",
        "--backing",
        backing.to_str().unwrap(),
        "--size",
        &size,
        "--key",
        &key,
        "--purpose",
        "zeebe",
        "--sector-size",
        sector_size,
    ]);
    daemon.ok(&["attach", "v"]);
    let socket: PathBuf = daemon.dir.path().join("nbd/v.sock");
    let wanted = everybody_works(&socket);
    daemon.ok(&["detach", "v"]);
    daemon.ok(&["attach", "v"]);
    assert!(all_of(&socket) == wanted, "and so it is after detaching and attaching");
}

/// What they need of a volume.
pub(crate) const BYTES: u64 = SIZE as u64 + (1 << 20);

fn all_of(socket: &Path) -> Vec<u8> {
    Raw::connected(socket, "v").read(0, u32::try_from(BYTES).unwrap())
}

/// All of them at work at once; gives back what the volume has to hold then, and does.
pub(crate) fn everybody_works(socket: &Path) -> Vec<u8> {
    let mut wanted = vec![0; SIZE];
    Raw::connected(socket, "v").write(0, &wanted);
    std::thread::scope(|scope| {
        let workers: Vec<_> =
            (0..CONNECTIONS).map(|own| scope.spawn(move || work(socket, own))).collect();
        let disturber = scope.spawn(|| disturb(socket, SIZE as u64));
        for worker in workers {
            for (offset, bytes) in worker.join().unwrap() {
                wanted[offset..offset + STRIPE].copy_from_slice(&bytes);
            }
        }
        wanted.extend(disturber.join().unwrap());
    });
    assert!(all_of(socket) == wanted, "another connection reads what all of them wrote");
    wanted
}

#[test]
fn connections_in_the_same_sectors_lose_no_byte_in_memory() {
    nothing_is_lost(&Daemon::start(), "4096");
}

#[test]
fn connections_in_the_same_sectors_lose_no_byte_on_a_disk() {
    nothing_is_lost(&Daemon::start_on_disk(), "4096");
}

#[test]
fn connections_in_the_same_small_sectors_lose_no_byte() {
    nothing_is_lost(&Daemon::start_on_disk(), "512");
}

/// `NBD_FLAG_CAN_MULTI_CONN`: a flush covers what any connection has been told is written.
#[test]
fn a_flush_covers_the_writes_of_other_connections() {
    let mut daemon = Daemon::start_on_disk();
    daemon.volume("v", "8M", &daemon.key());
    let socket = daemon.dir.path().join("nbd/v.sock");
    let mut writer = Raw::connected(&socket, "v");
    let mut flusher = Raw::connected(&socket, "v");
    for at in 0..32u64 {
        assert_eq!(writer.write(at * 5000, &at.to_le_bytes()), 0);
    }
    assert_eq!(flusher.command(0, FLUSH, 0, 0), 0);
    daemon.crash_and_restart();
    daemon.ok(&["attach", "v"]);
    let mut reader = Raw::connected(&socket, "v");
    for at in 0..32u64 {
        assert_eq!(reader.read(at * 5000, 8), at.to_le_bytes());
    }
}
