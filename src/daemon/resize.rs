//! Makes a volume larger: its store, then its header, then what is served, then its device in the
//! kernel. Each step leaves something whole, and asking again goes on where one failed.

use std::sync::Arc;

use tracing::info;

use crate::audit::record::{Event, Kind};
use crate::control::VolumeStatus;
use crate::daemon::refusals::{Answered, by_kernel, by_panic, by_service, by_volume, refused};
use crate::daemon::rewrap::{Before, in_service};
use crate::daemon::status::status;
use crate::daemon::{Daemon, Volume};
use crate::exit::ExitCode;
use crate::keeper::threads::apart;
use crate::kms::KeyService;
use crate::volume::{Access, LockedVolume, NextHeader};

impl Daemon {
    pub(super) async fn resize(&self, name: &str, size: u64) -> Answered<Box<VolumeStatus>> {
        let what = format!("resize volume {name}");
        let volume = self.find(&what, name).await?;
        // One header after the other.
        let _one_at_a_time = volume.rewrapping.lock().await;
        self.not_suspended(&what, name).await?;
        let before = self.before(&what, name, &volume).await?;
        let now = before.header.token().capacity;
        let sector = before.header.segment().sector_size.bytes_u64();
        if size < now {
            let why = format!("it has {now} bytes; a volume only grows");
            return Err(refused(ExitCode::Usage, &what, why, "Give a larger --size."));
        }
        if !size.is_multiple_of(sector) {
            let why = format!("{size} bytes are not whole sectors of {sector}");
            return Err(refused(ExitCode::Usage, &what, why, "Give a multiple of that."));
        }
        if size > now {
            self.grow(&what, name, &volume, &before, size).await?;
            info!(volume = name, from = now, to = size, "the volume has grown");
        }
        if let Some(export) = volume.with(|now| in_service(&now.service)) {
            export.grown();
        }
        if let Some(device) = volume.with(|now| now.device.clone()) {
            device.resize(size).await.map_err(|e| {
                let mut error = by_kernel(&what, &e);
                error.why =
                    format!("the volume has grown, its kernel device has not: {}", error.why);
                error
            })?;
        }
        Ok(Box::new(status(name, &volume).await))
    }

    /// Grows the store and writes the header. The volume key is here only from KMS's answer to the
    /// header's seal.
    async fn grow(
        &self,
        what: &str,
        name: &str,
        volume: &Volume,
        before: &Before,
        size: u64,
    ) -> Answered<()> {
        let kms = self.kms_for(what, before.config.role().as_ref()).await?;
        let wrapped = &before.header.token().wrapped;
        let unwrapped = kms.unwrap_key(wrapped).await;
        let (key, proof) = unwrapped.map_err(|e| by_service(what, &e))?;
        let (header, path) = (Arc::clone(&before.header), before.path.clone());
        // Not among work that may hang, as the key would.
        let sealed = apart("seal", move || NextHeader::resize(header, &key, size, &path)).await;
        let next = sealed.map_err(|e| by_panic(what, e))?.map_err(|e| by_volume(what, &e))?;
        let event = Event::new(Kind::Resize).volume(name).wrapped(wrapped);
        let event = event.request_id(proof.request_id.as_deref());
        let from = before.header.token().capacity.to_string();
        let event = event.detail("from", &from).detail("to", &size.to_string());
        self.first_record(what, event).await?;
        let alone = volume.changing.lock().await;
        let export = volume.with(|now| in_service(&now.service));
        let backing = before.config.backing.clone();
        let grown = apart("grow", move || match export {
            // A store that stalls keeps nobody from detaching the volume: its lock is the store's.
            Some(export) => export.volume().grow(&next),
            None => LockedVolume::open(&backing, Access::ReadWrite)?.grow(&next),
        });
        if volume.with(|now| in_service(&now.service)).is_some() {
            drop(alone);
        }
        grown.await.map_err(|e| by_panic(what, e))?.map_err(|e| by_volume(what, &e))
    }
}
