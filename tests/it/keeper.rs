//! A keeper on a runtime of the test's own, with a key service that does as it is told.

use std::future::pending;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use byokd::audit::Audit;
use byokd::audit::record::Kind;
use byokd::clock;
use byokd::export::{Export, ExportTable};
use byokd::keeper::group::Groups;
use byokd::keeper::plan::PlanStep;
use byokd::keeper::{Keeper, Terms};
use byokd::key::VolumeKey;
use byokd::key::lease::{Connection, LeasePolicy, LeaseWord, ProbePlan, Verdict, Whose};
use byokd::key::wrapped::{Canary, EncryptionContext, KeyArn, WrappedKey};
use byokd::kms::{KeyDescription, KeyService, KmsError, NewKey, Operation, Proof, ServiceError};
use byokd::nbd::serve;
use byokd::nbd::stream::NbdStream;
use byokd::progress::Progress;
use tokio::runtime::{Builder, Runtime};

use crate::hold::{held_export, key};
use crate::raw::{Raw, request};
use crate::support::{in_memory, until};

/// A customer's decisions, without a KMS.
#[derive(Default)]
struct Will {
    denies: AtomicBool,
    /// By a fault of our own.
    fails: AtomicBool,
    stalls: AtomicBool,
    asked_for_key: AtomicU32,
}

impl KeyService for Will {
    async fn unwrap_key(&self, _: &WrappedKey) -> Result<(VolumeKey, Proof), ServiceError> {
        self.asked_for_key.fetch_add(1, Ordering::SeqCst);
        if self.stalls.load(Ordering::SeqCst) {
            pending::<()>().await;
        }
        Ok((key(), Proof { request_id: None }))
    }

    async fn probe(&self, canary: &Canary, _: Connection) -> Result<Proof, KmsError> {
        let ours = self.fails.load(Ordering::SeqCst);
        if !ours && !self.denies.load(Ordering::SeqCst) {
            return Ok(Proof { request_id: None });
        }
        Err(KmsError {
            operation: Operation::Decrypt,
            key: canary.wrapped.key_arn.clone(),
            code: "DisabledException".to_owned(),
            message: String::new(),
            request_id: None,
            verdict: if ours { Verdict::Credentials } else { Verdict::Denied },
            remedy: String::new(),
            whose: Whose::Unknown,
            came: clock::now(),
        })
    }

    async fn make_key(&self, _: &KeyArn, _: &EncryptionContext) -> Result<NewKey, ServiceError> {
        panic!("a keeper makes no key")
    }

    async fn rewrap_key(&self, _: &WrappedKey, _: &KeyArn) -> Result<WrappedKey, KmsError> {
        panic!("a keeper rewraps no key")
    }

    async fn make_canary(&self, _: &KeyArn, _: &EncryptionContext) -> Result<Canary, ServiceError> {
        panic!("a keeper makes no canary")
    }

    async fn describe(&self, _: &KeyArn) -> Result<KeyDescription, KmsError> {
        panic!("a keeper describes no key")
    }
}

/// A volume that is kept.
struct Kept {
    will: Arc<Will>,
    export: Arc<Export>,
    audit: Arc<Audit>,
    keeper: Keeper,
    _progress: Progress,
}

impl Kept {
    fn start(runtime: &Runtime, dir: &Path, hold: Duration, on_fence: Vec<PlanStep>) -> Self {
        let _within = runtime.enter();
        let (will, export) = (Arc::new(Will::default()), held_export(dir, hold));
        let policy = LeasePolicy {
            interval: Duration::from_millis(50),
            confirm: Duration::from_millis(10),
            ..LeasePolicy::default()
        };
        let audit = Audit::in_memory();
        let terms = Terms { policy, asked: clock::now(), on_fence, audit: Arc::clone(&audit) };
        let progress = Progress::default();
        let keeper = Keeper::start(
            Arc::clone(&export),
            Arc::clone(&will),
            terms,
            &Groups::new(ProbePlan::default()),
            None,
            progress.part("the keeper", Duration::from_secs(60)),
            Arc::default(),
        );
        Self { will, export, audit, keeper, _progress: progress }
    }

    fn denies(&self, denies: bool) {
        self.will.denies.store(denies, Ordering::SeqCst);
    }

    fn state(&self) -> LeaseWord {
        self.keeper.report().state
    }
}

#[test]
fn a_fence_needs_no_thread_that_other_work_may_use_up() {
    let dir = in_memory();
    let runtime = Builder::new_multi_thread()
        .worker_threads(1)
        .max_blocking_threads(1)
        .enable_all()
        .build()
        .unwrap();
    // The only thread there is for what blocks, as if on a file system that is gone.
    let (release, hangs) = mpsc::channel::<()>();
    runtime.spawn_blocking(move || hangs.recv());
    let done = dir.path().join("on_fence-was-run");
    let run = vec!["/bin/touch".to_owned(), done.display().to_string()];
    let on_fence = vec![PlanStep { run, timeout: Duration::from_secs(10) }];
    let kept = Kept::start(&runtime, dir.path(), Duration::from_secs(600), on_fence);
    let began = Instant::now();
    kept.denies(true);
    until("the fence closes", || kept.export.gatekeeper().is_closed());
    let took = began.elapsed();
    assert!(took < Duration::from_secs(2), "{took:?} after the key was denied");
    until("what follows a fence is done", || done.exists());
    kept.denies(false);
    until("it serves again", || kept.export.is_serving());
    runtime.block_on(kept.keeper.teller().suspend());
    assert!(kept.export.gatekeeper().is_closed(), "an operator is not kept waiting either");
    drop(release);
}

#[test]
fn a_denial_is_recorded_that_follows_a_fault_of_our_own_with_the_same_words() {
    let dir = in_memory();
    let runtime = Runtime::new().unwrap();
    let kept = Kept::start(&runtime, dir.path(), Duration::from_secs(2), Vec::new());
    kept.will.fails.store(true, Ordering::SeqCst);
    until("the fault is heard", || kept.state() == LeaseWord::Unverified);
    kept.denies(true);
    kept.will.fails.store(false, Ordering::SeqCst);
    until("the fence closes", || kept.export.gatekeeper().is_closed());
    let kinds: Vec<_> =
        kept.audit.recent(Some("v"), 0, 100).iter().map(|record| record.event.event).collect();
    assert!(kinds.contains(&Kind::Denial), "{kinds:?}");
}

#[test]
fn a_restore_under_way_keeps_neither_an_operator_nor_requests_waiting() {
    let dir = in_memory();
    let runtime = Runtime::new().unwrap();
    let kept = Kept::start(&runtime, dir.path(), Duration::from_secs(2), Vec::new());
    let table = ExportTable::new();
    table.insert(Arc::clone(&kept.export));
    let socket = dir.path().join("socket");
    let listener = UnixListener::bind(&socket).unwrap();
    let mut client = std::thread::scope(|scope| {
        scope.spawn(|| serve(NbdStream::Unix(listener.accept().unwrap().0), table, ()).unwrap());
        Raw::connected(&socket, "v")
    });

    kept.denies(true);
    until("requests wait", || kept.export.is_held());
    client.send(&request(0, 0, 7, 0, 4096));
    kept.will.stalls.store(true, Ordering::SeqCst);
    kept.denies(false);
    until("the key is asked for", || kept.will.asked_for_key.load(Ordering::SeqCst) == 1);
    assert_eq!(client.simple_reply(7), 1, "EPERM, when the wait is over");
    assert_eq!(kept.will.asked_for_key.load(Ordering::SeqCst), 1, "the same restore is under way");

    runtime.block_on(kept.keeper.teller().suspend());
    assert_eq!(kept.state(), LeaseWord::Suspended);
    assert!(kept.export.gatekeeper().is_closed());
    kept.will.stalls.store(false, Ordering::SeqCst);
    runtime.block_on(kept.keeper.teller().resume());
    until("it serves again", || kept.export.is_serving());
    assert_eq!(kept.will.asked_for_key.load(Ordering::SeqCst), 2, "the first restore was ended");
}
