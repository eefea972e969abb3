//! Where credentials come from, and what becomes of a volume when they do not come: the instance's
//! metadata service and STS as the SDK meets them, in a running daemon.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use byokd::kms::dev::Fault;
use jiff::Timestamp;
use serde_json::json;

use crate::customer::Customer;
use crate::support::{Daemon, have, in_memory, nbdsh, until};

/// How a source of credentials answers.
#[derive(Clone, Copy, PartialEq)]
enum Mood {
    /// With credentials that the SDK wants to renew within a second or two: it does so 10 s before they end.
    Gives,
    /// With this status and nothing that helps.
    Fails(u16),
    /// STS's words when the role does not trust whoever asks.
    Refuses,
    /// Not at all, though it listens.
    Hangs,
}

/// Instance metadata (IMDSv2) and STS at one address, as much of them as a node asks for.
struct Source {
    address: SocketAddr,
    mood: Arc<Mutex<Mood>>,
}

impl Source {
    fn new(mood: Mood) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let mood = Arc::new(Mutex::new(mood));
        let shared = Arc::clone(&mood);
        std::thread::spawn(move || {
            // Connections that are never answered stay open with the test.
            let mut kept = Vec::new();
            for client in listener.incoming().map_while(Result::ok) {
                let now = *shared.lock().unwrap();
                if now == Mood::Hangs {
                    kept.push(client);
                } else {
                    // Who asks may have hung up.
                    let _answered = answer(client, now);
                }
            }
        });
        Self { address, mood }
    }

    fn set(&self, mood: Mood) {
        *self.mood.lock().unwrap() = mood;
    }

    fn url(&self) -> String {
        format!("http://{}", self.address)
    }
}

/// Reads one request and answers it.
fn answer(client: TcpStream, mood: Mood) -> std::io::Result<()> {
    client.set_read_timeout(Some(Duration::from_secs(5)))?;
    let mut reader = BufReader::new(client);
    let (mut first, mut length) = (String::new(), 0);
    reader.read_line(&mut first)?;
    loop {
        let mut line = String::new();
        reader.read_line(&mut line)?;
        let line = line.to_ascii_lowercase();
        if let Some(value) = line.strip_prefix("content-length:") {
            length = value.trim().parse().unwrap_or(0);
        }
        if line.trim().is_empty() {
            break;
        }
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body)?;
    let (status, text) = match mood {
        Mood::Fails(status) => (status, String::new()),
        Mood::Refuses => (403, STS_REFUSES.to_owned()),
        Mood::Gives | Mood::Hangs => (200, given(&first)),
    };
    write!(
        reader.get_mut(),
        "HTTP/1.1 {status} X\r\nContent-Length: {}\r\nX-Aws-Ec2-Metadata-Token-Ttl-Seconds: 21600\r\n\
         Connection: close\r\n\r\n{text}",
        text.len()
    )
}

/// What a request is given.
fn given(request: &str) -> String {
    let ends = (Timestamp::now() + Duration::from_secs(11)).to_string();
    let path = request.split(' ').nth(1).unwrap_or_default();
    match path.strip_prefix("/latest/") {
        Some("api/token") => "a-token".to_owned(),
        Some("meta-data/iam/security-credentials/") => "node".to_owned(),
        Some("meta-data/iam/security-credentials/node") => json!({
            "Code": "Success", "Type": "AWS-HMAC", "LastUpdated": Timestamp::now().to_string(),
            "AccessKeyId": "ASIAIMDS", "SecretAccessKey": "secret", "Token": "session", "Expiration": ends,
        })
        .to_string(),
        _ => format!(
            "<AssumeRoleWithWebIdentityResponse xmlns=\"https://sts.amazonaws.com/doc/2011-06-15/\">\
             <AssumeRoleWithWebIdentityResult><Credentials><AccessKeyId>ASIAIRSA</AccessKeyId>\
             <SecretAccessKey>secret</SecretAccessKey><SessionToken>session</SessionToken>\
             <Expiration>{ends}</Expiration></Credentials><AssumedRoleUser>\
             <Arn>arn:aws:sts::111122223333:assumed-role/node/byokd</Arn><AssumedRoleId>AROA:byokd\
             </AssumedRoleId></AssumedRoleUser></AssumeRoleWithWebIdentityResult></AssumeRoleWithWebIdentityResponse>"
        ),
    }
}

const STS_REFUSES: &str = "<ErrorResponse xmlns=\"https://sts.amazonaws.com/doc/2011-06-15/\"><Error><Type>Sender</Type>\
    <Code>AccessDenied</Code><Message>Not authorized to perform sts:AssumeRoleWithWebIdentity</Message></Error>\
    <RequestId>1</RequestId></ErrorResponse>";

/// A daemon that has no credentials but what its environment leads to.
fn daemon(customer: &Customer, more: &[(&str, &str)]) -> Daemon {
    let nothing = [("AWS_ACCESS_KEY_ID", ""), ("AWS_SECRET_ACCESS_KEY", "")];
    let all = nothing.iter().chain(more).map(|(name, value)| ((*name).into(), (*value).into()));
    let settings = customer.settings("", "probe_interval = \"1s\"\nfail_closed_after = \"1h\"\n");
    Daemon::configured_with(&settings, all.collect())
}

/// Whose credentials KMS saw last.
fn signed_by(customer: &Customer) -> String {
    let requests = customer.kms.requests();
    requests.iter().rev().find_map(|request| request.access_key.clone()).unwrap_or_default()
}

/// The volume's state, and the verdict and code of the evidence.
fn told(daemon: &Daemon) -> (String, String, String) {
    let status = daemon.status("v");
    let word = |value: &serde_json::Value| value.as_str().unwrap_or_default().to_owned();
    let evidence = &status["lease"]["evidence"];
    (word(&status["state"]), word(&evidence["verdict"]), word(&evidence["code"]))
}

fn is_served(daemon: &Daemon) {
    nbdsh(&daemon.uri("v"), "h.pwrite(b'x' * 4096, 0); h.flush(); assert h.pread(1, 0) == b'x'");
}

fn never_fenced(daemon: &Daemon) {
    let lease = &daemon.status("v")["lease"];
    assert!(lease["fence_ms"].is_null(), "{lease}");
}

/// Whether what keeps the key from being verified is our own trouble.
fn is_our_trouble(daemon: &Daemon) -> bool {
    let (state, verdict, code) = told(daemon);
    let ours = matches!(code.as_str(), "NoCredentials" | "ExpiredTokenException");
    state == "unverified" && verdict == "credentials" && ours
}

#[test]
fn an_instance_without_its_metadata_service_keeps_its_volumes() {
    if !have(&["nbdsh"]) {
        return;
    }
    let customer = Customer::new();
    let source = Source::new(Mood::Gives);
    let mut daemon = daemon(&customer, &[("AWS_EC2_METADATA_SERVICE_ENDPOINT", &source.url())]);
    daemon.volume("v", "8M", customer.key.as_str());
    assert_eq!(signed_by(&customer), "ASIAIMDS");
    // The last credentials are used on, as the SDK does: KMS decides whether they still hold.
    for mood in [Mood::Fails(500), Mood::Hangs] {
        source.set(mood);
        let before = customer.kms.requests().len();
        // On a slow machine one that hangs takes all the time that a probe has.
        until("probes with what there was", || {
            customer.kms.requests().len() >= before + 3 || is_our_trouble(&daemon)
        });
        is_served(&daemon);
        customer.kms.inject(Fault::error(400, "ExpiredTokenException", "the token expired"));
        until("KMS takes them no more", || is_our_trouble(&daemon));
        is_served(&daemon);
        source.set(Mood::Gives);
        customer.kms.clear_faults();
        until("fresh ones are found", || daemon.state("v") == "serving");
    }
    never_fenced(&daemon);
    // A node that starts without it says whose trouble that is, and needs nobody when it is over.
    source.set(Mood::Fails(500));
    daemon.crash_and_restart();
    let (code, refused) = daemon.ctl(&["attach", "v"]);
    assert!(code != 0 && refused.to_string().contains("NoCredentials"), "{code}: {refused}");
    source.set(Mood::Gives);
    daemon.ok(&["attach", "v"]);
    is_served(&daemon);
}

#[test]
fn a_pod_without_sts_keeps_its_volumes() {
    if !have(&["nbdsh"]) {
        return;
    }
    let customer = Customer::new();
    let source = Source::new(Mood::Gives);
    let place = in_memory();
    let token = place.path().join("token");
    let write_token = |path: &Path| std::fs::write(path, "an.identity.token").unwrap();
    write_token(&token);
    let daemon = daemon(
        &customer,
        &[
            ("AWS_ROLE_ARN", "arn:aws:iam::111122223333:role/node"),
            ("AWS_WEB_IDENTITY_TOKEN_FILE", token.to_str().unwrap()),
            ("AWS_ENDPOINT_URL_STS", &source.url()),
        ],
    );
    daemon.volume("v", "8M", customer.key.as_str());
    assert_eq!(signed_by(&customer), "ASIAIRSA");
    let none = ("unverified".into(), "credentials".into(), "NoCredentials".into());
    // That the role refuses us is no word of the customer about his key.
    for mood in [Mood::Fails(500), Mood::Refuses, Mood::Hangs] {
        source.set(mood);
        until("credentials run out", || told(&daemon) == none);
        is_served(&daemon);
        source.set(Mood::Gives);
        until("they are found again", || daemon.state("v") == "serving");
    }
    std::fs::remove_file(&token).unwrap();
    until("the identity is gone", || told(&daemon) == none);
    is_served(&daemon);
    write_token(&token);
    until("it is there again", || daemon.state("v") == "serving");
    never_fenced(&daemon);
    daemon.says("alert=\"OwnCredentialsFailing\"");
}
