//! What a record says, as a sentence for people.

use std::fmt;

use crate::audit::record::{Event, Kind};
use crate::key::lease::FenceReason;
use crate::units::word;

impl fmt::Display for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.sentence())?;
        match &self.request_id {
            Some(id) => write!(f, " (request id {id})"),
            None => Ok(()),
        }
    }
}

impl Event {
    fn sentence(&self) -> String {
        let detail = |name: &str| self.detail.get(name).map_or("", String::as_str);
        let why = self.why.as_deref().unwrap_or_default();
        match self.event {
            Kind::DaemonStart => format!("byokd {} started", detail("version")),
            Kind::DaemonStop => "byokd stopped".to_owned(),
            Kind::ConfigLoad if self.volume.is_some() => "its definition was read".to_owned(),
            Kind::ConfigLoad => "the settings were read".to_owned(),
            Kind::ConfigChange => match detail("change") {
                "removed" => "its definition was removed".to_owned(),
                change => format!("it was {change}"),
            },
            Kind::Request => format!("{} asked for {}", self.who(), self.asked()),
            Kind::Answer if self.why.is_none() => format!("{}: done", self.asked()),
            Kind::Answer => format!("{}: refused: {why}", self.asked()),
            Kind::Create => "the volume is made".to_owned(),
            Kind::Unwrap => "KMS unwrapped the volume's key".to_owned(),
            Kind::Attach => "attached".to_owned(),
            Kind::AttachFailed => format!("could not be attached: {why}"),
            Kind::Rewrap => "its key is wrapped anew".to_owned(),
            Kind::Resize => "it is made larger".to_owned(),
            Kind::Detach => "detached: the key is destroyed in memory".to_owned(),
            Kind::Lease => self.lease(),
            Kind::Denial => format!("KMS denied the key: {}", self.said()),
            Kind::KmsError => {
                let cause = self.cause.as_deref().unwrap_or("KMS gave no verdict");
                format!("{cause}: {}", self.said())
            }
            Kind::Fence => format!("fenced: {}", self.reason.map_or("", FenceReason::explain)),
            Kind::KeyDestroyed => match self.millis {
                Some(millis) => format!("the key is destroyed in memory, after {millis} ms"),
                None => "the key is destroyed in memory".to_owned(),
            },
            Kind::Restore => "served again: KMS allows the key".to_owned(),
            Kind::RestoreFailed => format!("KMS allows the key, but it is not served: {why}"),
            Kind::OnFence => format!("{} ended: {}", detail("program"), detail("ended")),
            Kind::DeviceAttach => format!("has the device {}", detail("device")),
            Kind::DeviceDetach => format!("has no longer the device {}", detail("device")),
            Kind::Purge => {
                format!("cached plaintext, step {}: {}", detail("step"), detail("details"))
            }
            Kind::KmsCalls => format!("{} requests to KMS", self.calls.len()),
            Kind::Checkpoint => "a checkpoint of the trail".to_owned(),
            Kind::FileStart => "a file of the trail begins".to_owned(),
            Kind::FilesDropped => "old files of the trail were deleted".to_owned(),
            Kind::Torn => "a crash cut off a record before this one".to_owned(),
            Kind::Damaged => "the trail before this record is damaged".to_owned(),
            Kind::ForeignChange => format!("something else changed the trail: {why}"),
        }
    }

    fn who(&self) -> String {
        let Some(by) = &self.by else { return "somebody".to_owned() };
        let program = by.program.as_deref().unwrap_or("a program");
        format!("{program} of user {}", by.uid)
    }

    fn asked(&self) -> &str {
        self.request.as_deref().unwrap_or("something")
    }

    /// What KMS said, verbatim.
    fn said(&self) -> String {
        let code = self.code.as_deref().unwrap_or_default();
        format!("{code}: {}", self.message.as_deref().unwrap_or_default())
    }

    fn lease(&self) -> String {
        let to = self.to.map(word).unwrap_or_default();
        match self.from {
            Some(from) => format!("the lease is {to}, after it was {}", word(from)),
            None => format!("the lease is {to}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use crate::key::lease::LeaseWord;

    use super::*;

    #[test]
    fn an_event_is_a_sentence() {
        let mut denial = Event::new(Kind::Denial).request_id(Some("7d5e"));
        denial.code = Some("DisabledException".to_owned());
        denial.message = Some("it is disabled.".to_owned());
        let lease = Event::new(Kind::Lease).states(LeaseWord::Held, LeaseWord::Suspect);
        for (event, sentence) in [
            (denial, "KMS denied the key: DisabledException: it is disabled. (request id 7d5e)"),
            (
                Event::new(Kind::Fence).reason(FenceReason::Suspended),
                "fenced: an operator suspended the key",
            ),
            (lease, "the lease is suspect, after it was held"),
            (
                Event::new(Kind::KeyDestroyed).millis(503),
                "the key is destroyed in memory, after 503 ms",
            ),
        ] {
            assert_eq!(event.to_string(), sentence);
        }
    }
}
