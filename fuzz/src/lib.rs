//! What has to be so for every parser of foreign bytes, whatever the bytes: one function for each
//! fuzz target, which `tests/it/seeds.rs` runs over the seeds as well.

use byokd::audit::chain::{Hash, check};
use byokd::audit::reconcile::{Writing, compare, read_export};
use byokd::audit::verify::{Expectations, Verifier};
use byokd::config;
use byokd::key::lease::{Connection, Verdict};
use byokd::key::wrapped::{Canary, EncryptionContext, Purpose, WrappedKey};
use byokd::kms::KeyService;
use byokd::kms::aws::{AwsKms, AwsSettings};
use byokd::luks2::binary::{COPY_SIZES, Copy, Which};
use byokd::luks2::metadata::Metadata;
use byokd::luks2::{Header, Recovery};
use byokd::nbd::handshake::{
    ExportFacts, Exports, Handshake, MAX_OPTION_DATA, MAX_OPTIONS, Next, OPTION_HEADER_LEN,
    OptionHeader, Refusal,
};
use byokd::nbd::wire::{
    Chunk, Command, EXTENDED_REQUEST_LEN, Errno, Head, MAX_REPLY_HEAD, REQUEST_LEN, ReplyStyle,
    Request, block_status,
};

/// The start of a device. Random bytes do not pass a checksum, so the input is also taken for the
/// JSON of a header whose checksums are right.
pub fn luks2_header(bytes: &[u8]) {
    area(bytes);
    let Some((first, json)) = bytes.split_first() else { return };
    let size = COPY_SIZES[usize::from(*first) % 3];
    let copy = |seqid| Copy {
        size,
        seqid,
        label: "fuzz".to_owned(),
        uuid: "5b6e0bd4-7d2c-4f2f-9d39-1d9d8a0f4a11".to_owned(),
        subsystem: String::new(),
        json: json.to_vec(),
    };
    // Also an update that was cut off between the copies.
    let second = u64::from(first >> 4);
    let mut whole = vec![0; 2 * size];
    for (copy, which, at) in [(copy(1), Which::Primary, 0), (copy(second), Which::Secondary, size)]
    {
        let Ok(encoded) = copy.encode(which, &[0; 64]) else { return };
        let read = Copy::parse(&[&vec![0; at][..], &encoded].concat(), at, which);
        // The text ends at the first NUL.
        if !json.contains(&0) && !json.is_empty() {
            assert_eq!(read.as_ref(), Ok(&copy), "what is written is read");
        }
        whole[at..at + size].copy_from_slice(&encoded);
    }
    area(&whole);
}

fn area(bytes: &[u8]) {
    let Ok((header, _)) = Header::parse(bytes) else { return };
    let mut whole = Vec::new();
    for (at, copy) in header.copies().expect("what was read can be written") {
        let at = usize::try_from(at).expect("a small number");
        whole.resize(whole.len().max(at + copy.len()), 0);
        whole[at..at + copy.len()].copy_from_slice(&copy);
    }
    let (again, recovery) = Header::parse(&whole).expect("what was written can be read");
    assert_eq!(recovery, Recovery::NotNeeded);
    assert_eq!(again.uuid(), header.uuid());
    assert_eq!(again.segment(), header.segment());
    assert_eq!(again.token(), header.token());
    assert_eq!(again.seqid(), header.seqid());
}

/// The JSON area.
pub fn luks2_metadata(bytes: &[u8]) {
    let Ok(metadata) = Metadata::parse(bytes) else { return };
    let text = metadata.encode();
    let again = Metadata::parse(&text).expect("what was written can be read");
    assert_eq!(again, metadata, "nothing of others is changed");
    assert_eq!(again.encode(), text);
    assert_eq!(again.segment(), metadata.segment());
    assert_eq!(again.digest(), metadata.digest());
}

/// Two exports, and one that is refused.
struct Table;

impl Exports for Table {
    fn names(&self) -> Vec<String> {
        vec!["fenced".to_owned(), "v".to_owned()]
    }

    fn find(&self, name: &str) -> Result<ExportFacts, Refusal> {
        match name {
            "" | "v" => Ok(ExportFacts {
                name: "v".to_owned(),
                description: "a volume".to_owned(),
                size: 1 << 30,
                read_only: name.is_empty(),
                trim: true,
                max_block: 64 << 20,
            }),
            "fenced" => Err(Refusal::Policy("the key is denied".to_owned())),
            _ => Err(Refusal::Unknown),
        }
    }
}

/// A client's side of the handshake: its flags, then options.
pub fn nbd_handshake(bytes: &[u8]) {
    let Some((flags, mut rest)) = bytes.split_first_chunk::<4>() else { return };
    let Ok(mut handshake) = Handshake::new(u32::from_be_bytes(*flags)) else { return };
    for count in 0.. {
        assert!(count <= MAX_OPTIONS, "a handshake ends");
        let Some((head, after)) = rest.split_first_chunk::<OPTION_HEADER_LEN>() else { return };
        let Ok(option) = OptionHeader::parse(head) else { return };
        let len = usize::try_from(option.len).expect("a 64-bit machine").min(after.len());
        let (data, next) = after.split_at(len);
        rest = next;
        let answer = if option.len > MAX_OPTION_DATA {
            handshake.oversized(option).map(|out| (out, Next::Option))
        } else {
            handshake.option(option, data, &Table)
        };
        let Ok((out, next)) = answer else { return };
        assert!(!out.is_empty(), "every option has an answer");
        assert!(out.len() < 16 << 10, "answers are bounded");
        match next {
            Next::Option => {}
            Next::Closed => return,
            Next::Transmission(agreed) => {
                assert_eq!(agreed.export, "v");
                let contexts = agreed.base_allocation.is_some();
                assert!(!contexts || agreed.style != ReplyStyle::Simple);
                return;
            }
        }
    }
}

/// Request headers, and the replies they can have.
pub fn nbd_request(bytes: &[u8]) {
    for extended in [false, true] {
        let Ok(Some((request, len))) = Request::parse(bytes, extended) else { continue };
        assert_eq!(len, if extended { EXTENDED_REQUEST_LEN } else { REQUEST_LEN });
        assert!(bytes.len() >= len);
        assert!(Request::parse(&bytes[..len - 1], extended).is_ok_and(|r| r.is_none()));
        let payload = request.payload(extended);
        assert!(payload == 0 || payload == request.len);
        assert!(payload != 0 || request.len == 0 || request.command != Command::Write);
        for style in [ReplyStyle::Simple, ReplyStyle::Structured, ReplyStyle::Extended] {
            let heads = [
                Head::done(style, &request),
                Head::error(style, &request, Errno::Inval),
                Head::data(style, Chunk::Done, &request, request.offset, request.len),
            ];
            let cookie = request.cookie.to_be_bytes();
            for head in heads {
                let head = head.bytes();
                assert!((16..=MAX_REPLY_HEAD).contains(&head.len()));
                assert!(head.windows(8).any(|at| at == cookie), "the cookie comes back");
            }
            if style != ReplyStyle::Simple {
                let out = block_status(style, &request, 1, &[(4096, true), (1 << 33, false)]);
                assert!(out.windows(8).any(|at| at == cookie), "the cookie comes back");
            }
        }
    }
}

/// An HTTP answer to a probe, byte for byte, through the real SDK. Only words that KMS uses for a
/// denial are one, and nothing that was not made with the key is a success.
pub fn kms_answer(bytes: &[u8]) {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.expect("a runtime");
    let verdict = runtime.block_on(async {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("an address");
        let settings = AwsSettings {
            region: Some("eu-central-1".to_owned()),
            endpoint: Some(format!("http://{address}")),
            attempt_timeout: std::time::Duration::from_secs(5),
            static_credentials: Some(("fuzz".to_owned(), "fuzz".to_owned())),
            ..AwsSettings::default()
        };
        let kms = AwsKms::connect(settings).await.expect("settings that fit");
        let server = async {
            loop {
                let Ok((mut stream, _)) = listener.accept().await else { return };
                let mut request = [0; 8192];
                // The request comes in one piece, or in two; the answer does not depend on it.
                let _got = stream.read(&mut request).await;
                let _sent = stream.write_all(bytes).await;
                let _ended = stream.shutdown().await;
            }
        };
        let canary = canary();
        let probe = kms.probe(&canary, Connection::Fresh);
        tokio::select! {
            result = probe => result.map_or_else(|error| error.verdict, |_| Verdict::Allowed),
            () = server => unreachable!("it serves for ever"),
        }
    });
    assert_ne!(verdict, Verdict::Allowed, "nobody knows the canary");
    let text = String::from_utf8_lossy(bytes);
    let denials = ["Denied", "Disabled", "NotFound", "GrantToken", "InvalidState"];
    // A code may be written with JSON's escapes.
    let said = denials.iter().any(|word| text.contains(word)) || text.contains("\\u");
    assert!(verdict != Verdict::Denied || said, "a denial that KMS did not say");
}

fn canary() -> Canary {
    let uuid = uuid::Uuid::from_u128(7);
    let context = EncryptionContext::for_volume(uuid, Purpose::Zeebe, []).expect("a context");
    let arn = "arn:aws:kms:eu-central-1:111122223333:key/5b6e0bd4-7d2c-4f2f-9d39-1d9d8a0f4a11";
    let key_arn = arn.parse().expect("an ARN");
    Canary { wrapped: WrappedKey { key_arn, blob: vec![1; 64], context }, sha256: [0x5a; 32] }
}

/// A file of an audit trail, and an export of CloudTrail: whatever is in them, checking ends, and
/// what is taken for a record is one whose hash fits.
pub fn audit(bytes: &[u8]) {
    let mut verifier = Verifier::new(Expectations::default());
    verifier.file("fuzz", bytes, true);
    let report = verifier.finish("fuzz", 1);
    let lines = || bytes.split(|byte| *byte == b'\n').filter(|line| !line.is_empty());
    let good = lines().filter(|line| check(line).is_ok()).count();
    assert!(report.records <= good as u64);
    assert!(good == lines().count() || !report.is_intact() || !report.notes.is_empty());
    for line in lines() {
        let Ok(link) = check(line) else { continue };
        let covered = &line[..line.len() - 75];
        assert_eq!(Hash::of(covered), link.hash);
    }
    if let Ok(events) = read_export(bytes) {
        // Nothing is joined with an empty trail.
        let found = compare(&[], &events, &[], Writing::Unknown);
        assert_eq!((found.matched, found.matched_by_context), (0, 0));
    }
}

/// byokd.toml, and a volume's definition.
pub fn config(bytes: &[u8]) {
    let dir = tempfile::tempdir_in("/dev/shm").expect("a directory in memory");
    let path = dir.path().join("v.toml");
    std::fs::write(&path, bytes).expect("a file in memory");
    let lines = bytes.iter().filter(|byte| **byte == b'\n').count() + 1;
    if let Err(errors) = config::load(&path) {
        assert!(!errors.0.is_empty());
        for error in errors.0 {
            assert!(error.line.is_none_or(|line| (1..=lines).contains(&line)), "{error}");
            assert!(!error.what.is_empty());
        }
    }
    match config::load_volume(&path) {
        Ok(Some(volume)) => assert!(volume.backing.is_absolute()),
        Ok(None) => unreachable!("the file is there"),
        Err(error) => {
            assert!(error.line.is_none_or(|line| (1..=lines).contains(&line)), "{error}");
        }
    }
}
