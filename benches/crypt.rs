//! AES-256-XTS: both engines, both sector sizes, against copying memory.

use std::hint::black_box;
use std::sync::Arc;

use byokd::crypt::{Engine, awslc, reference};
use byokd::key::secret::SecretArena;
use byokd::units::SectorSize;
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};

#[path = "parts/key.rs"]
mod key;

use key::key;

fn crypt(c: &mut Criterion) {
    let arena = Arc::new(SecretArena::new());
    for size in [4096usize, 65536, 1 << 20] {
        let mut group = c.benchmark_group("crypt");
        group.throughput(Throughput::Bytes(size as u64));
        let mut data = vec![0u8; size];
        for sector in [SectorSize::B512, SectorSize::B4096] {
            let id = |name| BenchmarkId::new(format!("{name}/{}", sector.bytes()), size);
            let mut fast = awslc::Xts::new(&key(), &arena).expect("a good key");
            group.bench_function(id("awslc-encrypt"), |b| {
                b.iter(|| fast.encrypt(black_box(&mut data), 7, sector));
            });
            group.bench_function(id("awslc-decrypt"), |b| {
                b.iter(|| fast.decrypt(black_box(&mut data), 7, sector));
            });
            let mut slow = reference::Xts::new(&key());
            group.bench_function(id("reference-encrypt"), |b| {
                b.iter(|| slow.encrypt(black_box(&mut data), 7, sector));
            });
        }
        let from = vec![1u8; size];
        group.bench_function(BenchmarkId::new("memcpy", size), |b| {
            b.iter(|| black_box(&mut data).copy_from_slice(black_box(&from)));
        });
        group.finish();
    }
}

criterion_group!(benches, crypt);
criterion_main!(benches);
