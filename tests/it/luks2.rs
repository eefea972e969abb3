//! The volume on disk: what others read of ours, what we read of others', and what is refused.

use std::io::Read as _;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use byokd::crypt::{Engine, awslc, reference};
use byokd::key::VolumeKey;
use byokd::key::secret::{SecretArena, SecretMemoryError};
use byokd::luks2::binary::{Copy, Which};
use byokd::luks2::metadata::Metadata;
use byokd::luks2::{Header, HeaderError};
use serde_json::{Value, json};

use crate::support::{Daemon, have, nbdsh, output, run, unwrap_blob};

const DENIED: i32 = 3;
/// Bytes of one copy of a header, and of both.
const COPY: usize = 16 << 10;
const HEADER: usize = 2 * COPY;
const DATA: usize = 16 << 20;
const SIZE: usize = 8 << 20;

/// Text whose every sector differs.
fn pattern(len: usize) -> Vec<u8> {
    let mut text: Vec<u8> =
        (0..).flat_map(|n| format!("byokd pattern {n}\n").into_bytes()).take(len).collect();
    text.truncate(len);
    text
}

/// The reader of LUKS2 that shares nothing with byokd.
fn independent_reader() -> Command {
    let mut command = Command::new("/usr/bin/python3");
    command.arg(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/luks2_independent.py"));
    command
}

/// Both headers as that reader sees them, which must find no fault in them.
fn inspect_sound(image: &Path) -> Value {
    let found = run(independent_reader().arg("inspect").arg(image));
    let found: Value = serde_json::from_str(&found).unwrap();
    assert_eq!(found["problems"], json!([]), "{}", image.display());
    found
}

/// The plaintext as that reader sees it.
fn decrypt_independently(image: &Path, key: &Path) -> Vec<u8> {
    let output = output(independent_reader().arg("decrypt").arg(image).arg(key));
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    output.stdout
}

fn cryptsetup(args: &[&str], image: &Path) -> String {
    run(Command::new("/usr/sbin/cryptsetup").args(args).arg(image))
}

/// A keyslot made fast: what it protects is a test's.
const FAST: [&str; 5] = ["--batch-mode", "--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000"];

#[test]
fn an_independent_reader_agrees_with_every_bit_of_our_volumes() {
    if !have(&["nbdcopy", "nbdsh", "cryptsetup"]) {
        return;
    }
    let daemon = Daemon::start();
    let key_arn = daemon.key();
    let dir = daemon.dir.path();
    let mut plain = pattern(SIZE);
    std::fs::write(dir.join("plain"), &plain).unwrap();
    plain[12_345..13_345].fill(b'x');
    plain[100_000..300_000].fill(0);
    for sector_size in [4096, 512] {
        let name = format!("v{sector_size}");
        let image = daemon.backing(&name);
        daemon.ok(&[
            "volume",
            "create",
            &name,
            "--backing",
            image.to_str().unwrap(),
            "--size",
            "8M",
            "--key",
            &key_arn,
            "--purpose",
            "documents",
            "--context",
            "tenant=blue",
            "--sector-size",
            &sector_size.to_string(),
        ]);
        daemon.ok(&["attach", &name]);
        run(Command::new("nbdcopy").arg(dir.join("plain")).arg(daemon.uri(&name)));
        nbdsh(&daemon.uri(&name), "h.pwrite(b'x' * 1000, 12345)\nh.zero(200000, 100000)");
        daemon.ok(&["detach", &name]);

        let found = inspect_sound(&image);
        let status = &daemon.ok(&["status", &name])["volumes"][0];
        assert_eq!(found["primary"]["hdr_size"], COPY);
        assert_eq!(found["primary"]["seqid"], status["header_seqid"]);
        assert_eq!(found["primary"]["uuid"], status["uuid"]);
        assert_eq!(found["primary"]["checksum_algorithm"], "sha256");
        assert_eq!(found["device_size"], DATA + SIZE, "the header comes on top of the size");
        let metadata = &found["metadata"];
        assert_eq!(metadata["keyslots"], json!({}), "no passphrase opens it");
        assert_eq!(
            metadata["segments"],
            json!({"0": {
                "type": "crypt", "offset": DATA.to_string(), "size": "dynamic", "iv_tweak": "0",
                "encryption": "aes-xts-plain64", "sector_size": sector_size,
            }})
        );
        assert_eq!(metadata["tokens"].as_object().unwrap().len(), 1);
        let token = &metadata["tokens"]["0"];
        holds_what_opens_the_volume(&daemon, token, &key_arn, status["uuid"].as_str().unwrap());

        let volume_key = dir.join("volume-key");
        std::fs::write(&volume_key, unwrap_blob(&daemon, token, "ciphertext_blob")).unwrap();
        assert!(decrypt_independently(&image, &volume_key) == plain, "{sector_size}: same bits");
        let keyed = ["--key-size", "512", "--volume-key-file", volume_key.to_str().unwrap()];
        cryptsetup(&[&["open", "--test-passphrase"], &keyed[..]].concat(), &image);

        // What cryptsetup writes is sound too, and still the same volume.
        std::fs::write(dir.join("passphrase"), "break the glass").unwrap();
        let mut add = Command::new("/usr/sbin/cryptsetup");
        add.arg("luksAddKey").args(FAST).args(keyed).arg(&image).arg(dir.join("passphrase"));
        run(&mut add);
        let after = inspect_sound(&image);
        assert_eq!(after["metadata"]["tokens"], metadata["tokens"]);
        assert!(after["primary"]["seqid"].as_u64() > found["primary"]["seqid"].as_u64());
        assert!(decrypt_independently(&image, &volume_key) == plain);

        // And neither takes another key.
        let mut other = std::fs::read(&volume_key).unwrap();
        other[63] ^= 1;
        std::fs::write(&volume_key, other).unwrap();
        let refused = output(independent_reader().arg("decrypt").arg(&image).arg(&volume_key));
        assert!(String::from_utf8_lossy(&refused.stderr).contains("not the volume key"));
        let mut open = Command::new("/usr/sbin/cryptsetup");
        let refused = output(open.args(["open", "--test-passphrase"]).args(keyed).arg(&image));
        assert_eq!(refused.status.code(), Some(2));
    }
}

/// The token has its fields, all public, and the blobs are what they are said to be.
fn holds_what_opens_the_volume(daemon: &Daemon, token: &Value, key_arn: &str, uuid: &str) {
    let mut fields: Vec<_> = token.as_object().unwrap().keys().map(String::as_str).collect();
    fields.sort_unstable();
    let known = [
        "canary_blob",
        "canary_sha256",
        "capacity",
        "ciphertext_blob",
        "created",
        "encryption_context",
        "header_mac",
        "key_arn",
        "keyslots",
        "type",
        "version",
    ];
    assert_eq!(fields, known);
    assert_eq!(token["type"], "byokd-aws-kms");
    assert_eq!(token["version"], 1);
    assert_eq!(token["keyslots"], json!([]));
    assert_eq!(token["key_arn"], key_arn);
    assert_eq!(token["capacity"], SIZE.to_string());
    let context = &token["encryption_context"];
    assert_eq!(context["byokd:volume-uuid"], uuid);
    assert_eq!(context["byokd:purpose"], "documents");
    assert_eq!(context["tenant"], "blue");
    let created = token["created"].as_str().unwrap();
    assert!(created.len() == 20 && created.ends_with('Z'), "RFC 3339: {created}");
    let decode = |name: &str| BASE64_STANDARD.decode(token[name].as_str().unwrap()).unwrap();
    assert_eq!(decode("header_mac").len(), 32);
    assert_eq!(unwrap_blob(daemon, token, "ciphertext_blob").len(), 64);
    let canary = unwrap_blob(daemon, token, "canary_blob");
    let sum = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, &canary);
    assert_eq!(decode("canary_sha256"), sum.as_ref());
}

/// A volume that the kernel's dm-crypt wrote.
struct Fixture {
    image: Vec<u8>,
    key: [u8; 64],
    key_file: String,
}

impl Fixture {
    fn read(sector_size: u32) -> Self {
        let stem = format!(
            "{}/tests/fixtures/luks2/dmcrypt-sector{sector_size}",
            env!("CARGO_MANIFEST_DIR")
        );
        let key_file = format!("{stem}.volume-key");
        let packed = std::fs::read(format!("{stem}.img.gz")).unwrap();
        let mut image = Vec::new();
        flate2::read::GzDecoder::new(&packed[..]).read_to_end(&mut image).unwrap();
        let key = std::fs::read(&key_file).unwrap().try_into().unwrap();
        Self { image, key, key_file }
    }

    fn plaintext() -> Vec<u8> {
        let lines = (0..).flat_map(|n| format!("byokd fixture line {n}\n").into_bytes());
        lines.take(256 << 10).collect()
    }
}

fn volume_key(bytes: &[u8; 64]) -> VolumeKey {
    VolumeKey::init_with(|key| {
        key.copy_from_slice(bytes);
        Ok::<_, SecretMemoryError>(())
    })
    .unwrap()
}

#[test]
fn volumes_that_dm_crypt_wrote_decrypt_bit_for_bit() {
    for sector_size in [512, 4096] {
        let Fixture { image, key: bytes, .. } = Fixture::read(sector_size);
        let copy = Copy::parse(&image, 0, Which::Primary).unwrap();
        let second = Copy::parse(&image, copy.size, Which::Secondary).unwrap();
        assert_eq!(copy, second);
        let metadata = Metadata::parse(&copy.json).unwrap();
        let (segment, digest) = (metadata.segment().unwrap(), metadata.digest().unwrap());
        assert_eq!(segment.sector_size.bytes(), sector_size);
        let key = volume_key(&bytes);
        assert!(digest.matches(&key));
        let mut other = bytes;
        other[0] ^= 1;
        assert!(!digest.matches(&volume_key(&other)));
        // A LUKS2 volume, and not one of ours.
        assert_eq!(Header::parse(&image).err(), Some(HeaderError::NoToken));

        let on_disk = &image[usize::try_from(segment.offset).unwrap()..];
        let fast = awslc::Xts::new(&key, &Arc::new(SecretArena::new())).unwrap();
        let engines: [(&str, Box<dyn Engine>); 2] =
            [("AWS-LC", Box::new(fast)), ("reference", Box::new(reference::Xts::new(&key)))];
        for (name, mut engine) in engines {
            let mut data = on_disk.to_vec();
            engine.decrypt(&mut data, segment.iv_tweak, segment.sector_size);
            assert!(data == Fixture::plaintext(), "{name}, {sector_size}: plaintext");
            engine.encrypt(&mut data, segment.iv_tweak, segment.sector_size);
            assert!(data == on_disk, "{name}, {sector_size}: ciphertext");
        }
    }
}

#[test]
fn the_independent_reader_agrees_with_dm_crypt() {
    let dir = tempfile::tempdir().unwrap();
    for sector_size in [512, 4096] {
        let fixture = Fixture::read(sector_size);
        let image = dir.path().join("image");
        std::fs::write(&image, &fixture.image).unwrap();
        inspect_sound(&image);
        let plain = decrypt_independently(&image, Path::new(&fixture.key_file));
        assert!(plain == Fixture::plaintext(), "{sector_size}");
    }
}

/// A volume with some data, detached, and its header as it was made.
struct Bench {
    daemon: Daemon,
    key: String,
    header: Vec<u8>,
}

impl Bench {
    fn new() -> Self {
        let daemon = Daemon::start();
        let key = daemon.key();
        daemon.volume("v", "8M", &key);
        nbdsh(&daemon.uri("v"), "h.pwrite(b'k' * 65536, 4096)");
        daemon.ok(&["detach", "v"]);
        let header = std::fs::read(daemon.backing("v")).unwrap()[..HEADER].to_vec();
        Self { daemon, key, header }
    }

    fn image(&self) -> Vec<u8> {
        std::fs::read(self.daemon.backing("v")).unwrap()
    }

    /// Puts `header` in the place of the one on disk.
    fn put(&self, header: &[u8]) {
        use std::os::unix::fs::FileExt as _;
        let file = std::fs::File::options().write(true).open(self.daemon.backing("v")).unwrap();
        file.write_all_at(header, 0).unwrap();
    }

    /// The good header with `change` made to it, and both checksums right.
    fn forged(&self, change: impl Fn(&mut Copy, &mut Value)) -> Vec<u8> {
        [Which::Primary, Which::Secondary]
            .into_iter()
            .flat_map(|which| {
                let mut copy = Copy::parse(&self.header, which.offset(COPY), which).unwrap();
                let mut json = serde_json::from_slice(&copy.json).unwrap();
                change(&mut copy, &mut json);
                copy.json = json.to_string().into_bytes();
                copy.encode(which, &[7; 64]).unwrap()
            })
            .collect()
    }

    /// Attaches it, which has to be refused without a byte written: the exit code and why.
    fn refused(&self, case: &str, args: &[&str]) -> (i32, String) {
        let before = self.image();
        let (code, answer) = self.daemon.ctl(&[&["attach", "v"], args].concat());
        assert_ne!(code, 0, "{case}: {answer}");
        assert!(self.image() == before, "{case}: what was refused is left as it was");
        assert!(!answer["remedy"].as_str().unwrap().is_empty(), "{case}: {answer}");
        (code, answer["why"].as_str().unwrap().to_owned())
    }

    /// Attaches it, which has to work, and finds its data there; what was noted about the header.
    fn attached(&self, case: &str) -> String {
        let (code, answer) = self.daemon.ctl(&["attach", "v"]);
        assert_eq!(code, 0, "{case}: {answer}");
        nbdsh(&self.daemon.uri("v"), "assert h.pread(65536, 4096) == b'k' * 65536");
        self.daemon.ok(&["detach", "v"]);
        answer["header_note"].as_str().unwrap_or_default().to_owned()
    }
}

/// Damage to one copy, each in another field: where, and what is written there.
const DAMAGE: [(&str, usize, &[u8]); 7] = [
    ("magic", 0, b"LUCK"),
    ("version", 6, &[0, 3]),
    ("seqid", 16, &[0xff; 8]),
    ("salt", 104, &[0x5a; 64]),
    ("hdr_offset", 256, &[0, 0, 0, 0, 0, 1, 0, 0]),
    ("checksum", 448, &[0; 32]),
    ("JSON", 4096 + 100, b"#"),
];

#[test]
fn damage_to_one_copy_is_reported_and_repaired() {
    if !have(&["nbdsh"]) {
        return;
    }
    let bench = Bench::new();
    for (copy, at) in [("first", 0), ("second", COPY)] {
        for (field, offset, bytes) in DAMAGE {
            let case = format!("{field} of the {copy} copy");
            let mut header = bench.header.clone();
            header[at + offset..][..bytes.len()].copy_from_slice(bytes);
            bench.put(&header);
            let note = bench.attached(&case);
            assert!(note.contains(copy) && note.contains("repaired"), "{case}: {note}");
            let found = inspect_sound(&bench.daemon.backing("v"));
            assert_eq!(found["primary"]["seqid"], 1, "{case}: only the copy is made again");
            assert_eq!(bench.attached(&case), "", "{case}: nothing is left to report");
        }
    }
}

#[test]
fn damage_to_both_copies_is_refused_and_left_alone() {
    if !have(&["nbdsh"]) {
        return;
    }
    let bench = Bench::new();
    for (field, offset, bytes) in DAMAGE {
        let mut header = bench.header.clone();
        header[offset..][..bytes.len()].copy_from_slice(bytes);
        header[COPY + offset..][..bytes.len()].copy_from_slice(bytes);
        bench.put(&header);
        let (_, why) = bench.refused(field, &[]);
        let says = if field == "magic" { "no LUKS2 header" } else { "both copies" };
        assert!(why.contains(says), "{field}: {why}");
    }
}

#[test]
fn of_two_good_copies_the_newer_one_counts_and_replaces_the_older() {
    if !have(&["nbdsh"]) {
        return;
    }
    let bench = Bench::new();
    let newer = bench.forged(|copy, _| {
        copy.seqid += 1;
        copy.label = "newer".into();
    });
    for newer_is in [Which::Primary, Which::Secondary] {
        let mut header = bench.header.clone();
        let at = newer_is.offset(COPY);
        header[at..][..COPY].copy_from_slice(&newer[at..][..COPY]);
        bench.put(&header);
        let case = format!("{newer_is:?} is newer");
        let note = bench.attached(&case);
        assert!(note.contains("cut off") && note.contains("repaired"), "{case}: {note}");
        let found = inspect_sound(&bench.daemon.backing("v"));
        assert_eq!(found["primary"]["label"], "newer", "{case}");
        assert_eq!(found["primary"]["seqid"], 2, "{case}");
    }
}

#[test]
fn nothing_is_written_before_the_key_has_confirmed_the_header() {
    if !have(&["nbdsh"]) {
        return;
    }
    let bench = Bench::new();
    // A newer second copy by someone without the key: it must not take the good one's place.
    let forged = bench.forged(|copy, json| {
        copy.seqid += 1;
        json["segments"]["0"]["sector_size"] = 512.into();
    });
    let mut header = bench.header.clone();
    header[COPY..].copy_from_slice(&forged[COPY..]);
    bench.put(&header);
    let (_, why) = bench.refused("a forged copy", &[]);
    assert!(why.contains("MAC"), "{why}");

    // Without the key nobody can say which copy is right, so nothing is repaired.
    let mut header = bench.header.clone();
    header[0] = 0;
    bench.put(&header);
    bench.daemon.ok(&["dev", "key", "disable", &bench.key]);
    assert_eq!(bench.refused("a denied key", &[]).0, DENIED);
    bench.daemon.ok(&["dev", "key", "enable", &bench.key]);
    assert!(bench.attached("the key is back").contains("repaired"));

    // Read-only means the header too.
    bench.put(&header);
    let before = bench.image();
    let answer = bench.daemon.ok(&["attach", "v", "--read-only"]);
    assert!(answer["header_note"].as_str().unwrap().contains("not repaired"), "{answer}");
    bench.daemon.ok(&["detach", "v"]);
    assert!(bench.image() == before);
}

#[test]
fn what_has_begun_over_a_lost_first_copy_is_not_repaired_away() {
    if !have(&["nbdsh"]) {
        return;
    }
    let bench = Bench::new();
    let mut partitions = [0x83; 66];
    partitions[64..].copy_from_slice(b"\x55\xaa");
    for (what, at, signature) in [
        ("an xfs file system", 0, &b"XFSB"[..]),
        ("a partition table", 446, &partitions),
        ("an ext2/3/4 file system", 1080, b"\x53\xef"),
        ("swap", 4086, b"SWAPSPACE2"),
    ] {
        let mut header = bench.header.clone();
        header[at..][..signature.len()].copy_from_slice(signature);
        bench.put(&header);
        for args in [&[][..], &["--read-only"]] {
            let (_, why) = bench.refused(what, args);
            assert!(why.contains(what), "{what}: {why}");
        }
    }
}

#[test]
fn a_header_changed_without_the_key_is_refused_and_left_alone() {
    if !have(&["nbdsh"]) {
        return;
    }
    let bench = Bench::new();
    // A definition that names no volume leaves it all to the header.
    let definition = bench.daemon.dir.path().join("volumes.d/v.toml");
    let named = std::fs::read_to_string(&definition).unwrap();
    let unnamed: Vec<_> = named.lines().filter(|line| !line.starts_with("uuid")).collect();
    assert_ne!(unnamed.len(), named.lines().count(), "{named}");
    std::fs::write(&definition, unnamed.join("\n")).unwrap();
    bench.daemon.ok(&["reload"]);
    let other = {
        bench.daemon.create("w", "8M", &bench.key);
        std::fs::read(bench.daemon.backing("w")).unwrap()[..HEADER].to_vec()
    };
    let other = Copy::parse(&other, 0, Which::Primary).unwrap();
    let other: Value = serde_json::from_slice(&other.json).unwrap();
    type Change<'a> = Box<dyn Fn(&mut Copy, &mut Value) + 'a>;
    let cases: Vec<(&str, Change<'_>, &str)> = vec![
        (
            "no cipher at all",
            Box::new(|_, json| json["segments"]["0"]["encryption"] = "cipher_null-ecb".into()),
            "cipher_null-ecb",
        ),
        (
            "another sector size",
            Box::new(|_, json| json["segments"]["0"]["sector_size"] = 512.into()),
            "MAC",
        ),
        (
            "another offset",
            Box::new(|_, json| json["segments"]["0"]["offset"] = "16773120".into()),
            "MAC",
        ),
        (
            "another tweak",
            Box::new(|_, json| json["segments"]["0"]["iv_tweak"] = "8".into()),
            "iv_tweak",
        ),
        (
            "integrity",
            Box::new(|_, json| json["segments"]["0"]["integrity"] = json!({"type": "hmac"})),
            "integrity",
        ),
        (
            "a second segment",
            Box::new(|_, json| json["segments"]["1"] = json["segments"]["0"].clone()),
            "2 data segments",
        ),
        (
            "an unfinished reencryption",
            Box::new(|_, json| {
                json["config"]["requirements"] = json!({"mandatory": ["online-reencrypt-v2"]});
            }),
            "online-reencrypt",
        ),
        (
            "a smaller capacity",
            Box::new(|_, json| json["tokens"]["0"]["capacity"] = "4096".into()),
            "MAC",
        ),
        (
            "another digest",
            Box::new(|_, json| {
                json["digests"]["0"]["digest"] = BASE64_STANDARD.encode([1; 32]).into();
            }),
            "not this volume's key",
        ),
        (
            "a token that is not ours",
            Box::new(|_, json| json["tokens"]["0"]["type"] = "other".into()),
            "without a byokd-aws-kms token",
        ),
        (
            "two tokens of ours",
            Box::new(|_, json| json["tokens"]["1"] = json["tokens"]["0"].clone()),
            "2 byokd-aws-kms tokens",
        ),
        (
            "the token of another volume",
            Box::new(|_, json| json["tokens"] = other["tokens"].clone()),
            "belongs to volume",
        ),
        (
            "another volume's token and uuid",
            Box::new(|copy, json| {
                json["tokens"] = other["tokens"].clone();
                let context = &other["tokens"]["0"]["encryption_context"];
                copy.uuid = context["byokd:volume-uuid"].as_str().unwrap().to_owned();
            }),
            "not this volume's key",
        ),
        ("another uuid", Box::new(|copy, _| copy.uuid = "elsewhere".into()), "not a uuid"),
        ("metadata that is none", Box::new(|_, json| *json = json!([1])), "JSON"),
    ];
    for (case, change, says) in cases {
        bench.put(&bench.forged(change));
        let (_, why) = bench.refused(case, &[]);
        assert!(why.contains(says), "{case}: {why}");
    }
    bench.put(&bench.header);
    assert_eq!(bench.attached("as it was"), "");
}

#[test]
fn foreign_and_cut_off_stores_are_refused_and_left_alone() {
    if !have(&["nbdsh", "cryptsetup", "mkfs.ext4"]) {
        return;
    }
    let bench = Bench::new();
    let image = bench.daemon.backing("v");
    let good = bench.image();
    let passphrase = bench.daemon.dir.path().join("passphrase");
    std::fs::write(&passphrase, "x").unwrap();
    let blank = || std::fs::write(&image, vec![0; good.len()]).unwrap();
    let luks_format = |kind: &str| {
        blank();
        let mut format = Command::new("/usr/sbin/cryptsetup");
        run(format.args(["luksFormat", "--type", kind]).args(FAST).arg(&image).arg(&passphrase));
    };
    let refused = |case: &str, says: &str| {
        let (_, why) = bench.refused(case, &[]);
        assert!(why.contains(says), "{case}: {why}");
    };
    luks_format("luks1");
    refused("LUKS1", "LUKS1");
    luks_format("luks2");
    refused("a LUKS2 volume of cryptsetup's", "not made by byokd");
    blank();
    run(Command::new("/usr/sbin/mkfs.ext4").args(["-q", "-F"]).arg(&image));
    refused("ext4", "no LUKS2 header");
    std::fs::write(&image, &good[..good.len() / 2]).unwrap();
    refused("half of the store", "cut off");
    std::fs::write(&image, &good[..HEADER / 2]).unwrap();
    refused("half of the header", "cut off");
    std::fs::write(&image, &good[..COPY / 2]).unwrap();
    refused("half of a copy", "header");
    std::fs::write(&image, "").unwrap();
    refused("an empty file", "no LUKS2 header");
}

#[test]
fn a_lost_header_is_brought_back_by_cryptsetup_as_the_error_says() {
    if !have(&["nbdsh", "cryptsetup"]) {
        return;
    }
    let bench = Bench::new();
    let image = bench.daemon.backing("v");
    let backup = bench.daemon.dir.path().join("backup");
    let file = ["--header-backup-file", backup.to_str().unwrap()];
    cryptsetup(&[&["luksHeaderBackup"], &file[..]].concat(), &image);
    let mut header = bench.header.clone();
    header[4096] = 0;
    header[COPY + 4096] = 0;
    bench.put(&header);
    let (_, why) = bench.refused("both copies damaged", &[]);
    assert!(why.contains("luksHeaderRestore"), "{why}");
    cryptsetup(&[&["luksHeaderRestore", "--batch-mode"], &file[..]].concat(), &image);
    assert_eq!(bench.attached("restored"), "");
    inspect_sound(&image);
}
