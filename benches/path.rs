//! The way of a request without sockets: the codec, the fence, and both with a store in memory.
//!
//! `fence/cipher` decrypts and encrypts with the cipher alone, `fence/through-the-fence` the same by
//! two passes of the fence, so that the difference is what asking the fence costs.
//!
//! `counters/N` is what counting N requests costs that were received together and are answered
//! together, as a connection counts them: two readings of the clock, and the cipher's calls timed.
//! `path/read/4096` is a 4 KiB read without its sockets, and without its counters.

use std::fs::File;
use std::hint::black_box;
use std::sync::Arc;
use std::time::Instant;

use byokd::buffer::{Buffer, Ciphertext, Pool};
use byokd::crypt::{Engine, awslc};
use byokd::fence::Fence;
use byokd::key::secret::SecretArena;
use byokd::metrics::io::{IoCounters, IoOperation};
use byokd::nbd::wire::{Chunk, Head, ReplyStyle, Request};
use byokd::store::{Backing, DirectIo, Durability};
use byokd::units::{Geometry, SectorSize};
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};

#[path = "parts/key.rs"]
mod key;

use key::key;

const CAPACITY: u64 = 64 << 20;
const SIZES: [usize; 3] = [4096, 65536, 1 << 20];

/// A request as it arrives.
fn request(command: u8, len: usize, extended: bool) -> Vec<u8> {
    let magic: u32 = if extended { 0x21e4_1c71 } else { 0x2560_9513 };
    let mut bytes = magic.to_be_bytes().to_vec();
    bytes.extend([0, 0, 0, command]);
    bytes.extend(7u64.to_be_bytes());
    bytes.extend((3u64 << 20).to_be_bytes());
    if extended {
        bytes.extend((len as u64).to_be_bytes());
    } else {
        bytes.extend(u32::try_from(len).expect("a small length").to_be_bytes());
    }
    bytes
}

fn codec(c: &mut Criterion) {
    let mut group = c.benchmark_group("codec");
    for (name, style, extended) in
        [("structured", ReplyStyle::Structured, false), ("extended", ReplyStyle::Extended, true)]
    {
        let bytes = request(0, 4096, extended);
        group.bench_function(BenchmarkId::new("parse", name), |b| {
            b.iter(|| Request::parse(black_box(&bytes), extended).expect("a good request"));
        });
        let (read, _) =
            Request::parse(&bytes, extended).expect("a good request").expect("a whole one");
        group.bench_function(BenchmarkId::new("reply", name), |b| {
            b.iter(|| Head::data(style, Chunk::Done, black_box(&read), read.offset, read.len));
        });
    }
    group.finish();
}

fn fence(c: &mut Criterion) {
    let geometry = Geometry::new(CAPACITY, SectorSize::B4096);
    let arena = Arc::new(SecretArena::new());
    let fence = Fence::open(key()).expect("a good key");
    let gate = fence.gate();
    let mut group = c.benchmark_group("fence");
    group.bench_function("check", |b| b.iter(|| black_box(&fence).check()));
    for size in SIZES {
        group.throughput(Throughput::Bytes(size as u64));
        let at = geometry.sectors(3 << 20, size as u64).expect("inside");
        let mut cipher = awslc::Xts::new(&key(), &arena).expect("a good key");
        let mut data = vec![0u8; size];
        group.bench_function(BenchmarkId::new("cipher", size), |b| {
            b.iter(|| {
                cipher.decrypt(black_box(&mut data), at.first_tweak(), at.sector_size());
                cipher.encrypt(black_box(&mut data), at.first_tweak(), at.sector_size());
            });
        });
        let mut buffer = Some(Buffer::zeroed(size).expect("memory"));
        group.bench_function(BenchmarkId::new("through-the-fence", size), |b| {
            b.iter(|| {
                let data = Ciphertext::new(buffer.take().expect("given back each time"));
                let pass = gate.enter().expect("an open fence");
                let plain = pass.unseal(data, at);
                let pass = gate.enter().expect("an open fence");
                buffer = Some(pass.seal(plain, at).into_buffer());
            });
        });
    }
    group.finish();
}

fn counters(c: &mut Criterion) {
    let counters = IoCounters::default();
    let mut group = c.benchmark_group("counters");
    for together in [1u64, 8, 32] {
        group.throughput(Throughput::Elements(together));
        group.bench_function(BenchmarkId::from_parameter(together), |b| {
            b.iter(|| {
                let counters = black_box(&counters);
                let came = Instant::now();
                for _ in 0..together {
                    counters.asked(IoOperation::Read, 4096);
                    counters.cipher_ended(counters.cipher_begins());
                }
                let took = came.elapsed();
                for _ in 0..together {
                    counters.answered(IoOperation::Read, black_box(took));
                }
            });
        });
    }
    group.finish();
}

fn path(c: &mut Criterion) {
    let geometry = Geometry::new(CAPACITY, SectorSize::B4096);
    let file = tempfile::tempfile_in("/dev/shm").expect("a file in memory");
    file.set_len(CAPACITY).expect("room for it");
    let probe = geometry.sectors(0, 4096).expect("inside");
    let locked: File = file;
    let store = Backing::open(&locked, 0, probe, false, DirectIo::Off).expect("a store");
    let fence = Fence::open(key()).expect("a good key");
    let gate = fence.gate();
    let mut pool = Pool::new();
    let mut group = c.benchmark_group("path");
    for size in SIZES {
        group.throughput(Throughput::Bytes(size as u64));
        let bytes = request(1, size, false);
        let payload = vec![7u8; size];
        group.bench_function(BenchmarkId::new("write", size), |b| {
            b.iter(|| {
                let (write, _) =
                    Request::parse(&bytes, false).expect("a good request").expect("a whole one");
                let at = geometry.sectors(write.offset, write.len).expect("inside");
                let buffer = pool.take(size).expect("memory");
                let sealed = gate.enter().expect("an open fence").seal_from(&payload, buffer, at);
                store.write(at, &sealed, Durability::Cached).expect("a good store");
                pool.give_ciphertext(sealed);
                Head::done(ReplyStyle::Structured, &write)
            });
        });
        let bytes = request(0, size, false);
        group.bench_function(BenchmarkId::new("read", size), |b| {
            b.iter(|| {
                let (read, _) =
                    Request::parse(&bytes, false).expect("a good request").expect("a whole one");
                let at = geometry.sectors(read.offset, read.len).expect("inside");
                let buffer = pool.take(size).expect("memory");
                let sealed =
                    store.read(at, buffer).map_err(|(error, _)| error).expect("a good store");
                let plain = gate.enter().expect("an open fence").unseal(sealed, at);
                pool.give_plaintext(plain);
                Head::data(ReplyStyle::Structured, Chunk::Done, &read, read.offset, read.len)
            });
        });
    }
    group.finish();
}

criterion_group!(benches, codec, fence, counters, path);
criterion_main!(benches);
