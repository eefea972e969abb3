//! Wraps a volume's key anew: after the customer rotated their key, or under another key of theirs.
//!
//! KMS wraps the same volume key by the new key within itself (`ReEncrypt`); the new key then makes
//! a canary and proves with it and with the volume key that it can be used; only then is the header
//! written. Service goes on meanwhile. Whatever fails leaves the old header in use.

use std::path::PathBuf;
use std::sync::Arc;

use tracing::info;

use crate::audit::record::{Event, Kind};
use crate::config::VolumeConfig;
use crate::control::VolumeStatus;
use crate::daemon::keys::teller;
use crate::daemon::refusals::{Answered, by_panic, by_service, by_volume, refused};
use crate::daemon::status::status;
use crate::daemon::volumes::is_the_one;
use crate::daemon::{Daemon, Service, Volume};
use crate::exit::ExitCode;
use crate::export::Export;
use crate::keeper::threads::apart;
use crate::key::lease::Connection;
use crate::key::wrapped::KeyArn;
use crate::kms::{KeyService, Proof, ServiceError};
use crate::luks2::Header;
use crate::volume::{Access, LockedVolume, NextHeader, inspect};

/// A volume's header before it is changed, and how it is defined.
pub(super) struct Before {
    pub(super) config: VolumeConfig,
    pub(super) path: PathBuf,
    pub(super) header: Arc<Header>,
}

impl Daemon {
    pub(super) async fn rewrap(
        &self,
        name: &str,
        to: Option<KeyArn>,
    ) -> Answered<Box<VolumeStatus>> {
        let what = format!("rewrap the key of volume {name}");
        let volume = self.find(&what, name).await?;
        let _one_at_a_time = volume.rewrapping.lock().await;
        self.not_suspended(&what, name).await?;
        let before = self.before(&what, name, &volume).await?;
        let from = before.header.token().wrapped.key_arn.clone();
        let to = to.unwrap_or_else(|| from.clone());
        let (next, proof) = self.next_header(&what, &before, &to).await?;
        let wrapped = &next.header().token().wrapped;
        let event = Event::new(Kind::Rewrap).volume(name).wrapped(wrapped);
        let event = event.request_id(proof.request_id.as_deref());
        self.first_record(&what, event.detail("from", from.as_str())).await?;
        self.put(&what, &volume, &before.config, next).await?;
        info!(volume = name, %from, %to, request_id = proof.request_id, "rewrapped");
        Ok(Box::new(status(name, &volume).await))
    }

    pub(super) async fn before(&self, what: &str, name: &str, volume: &Volume) -> Answered<Before> {
        if let Some((export, config)) =
            volume.with(|now| Some((in_service(&now.service)?, now.config.clone())))
        {
            let refuse = |why: &str, remedy: &str| {
                Err(refused(ExitCode::WrongState, what, why, format!("{remedy} {name}")))
            };
            if export.volume().access() == Access::ReadOnly {
                return refuse("it is attached read-only", "Detach it first: byokctl detach");
            }
            if !export.is_serving() {
                return refuse(
                    "it is fenced, and only a key that may be used can seal another header",
                    "When it is served again; see byokctl status",
                );
            }
            let path = export.volume().backing_path().to_owned();
            return Ok(Before { config, path, header: export.volume().header() });
        }
        let config = match self.read_definition(name).await {
            Ok(Some(config)) => config,
            Ok(None) => volume.with(|now| now.config.clone()),
            Err(why) => {
                return Err(refused(ExitCode::Usage, what, why, "Mend the lines named above."));
            }
        };
        let path = config.backing.clone();
        let store = path.clone();
        let inspected = apart("look", move || inspect(&store)).await;
        let (header, _) =
            inspected.map_err(|e| by_panic(what, e))?.map_err(|e| by_volume(what, &e))?;
        is_the_one(what, &config, &header)?;
        Ok(Before { config, path, header: Arc::new(header) })
    }

    /// The next header. The volume key is here only from KMS's answer to the header's seal: no disk
    /// is waited for with it.
    async fn next_header(
        &self,
        what: &str,
        before: &Before,
        to: &KeyArn,
    ) -> Answered<(NextHeader, Proof)> {
        let kms = self.kms_for(what, before.config.role().as_ref()).await?;
        let by_kms = |error: ServiceError| by_service(what, &error);
        let old = &before.header.token().wrapped;
        let wrapped = kms.rewrap_key(old, to).await.map_err(|e| by_kms(e.into()))?;
        let canary = kms.make_canary(to, &old.context).await.map_err(by_kms)?;
        let probed = kms.probe(&canary, Connection::Fresh).await;
        probed.map_err(|e| by_kms(e.into()))?;
        let (key, proof) = kms.unwrap_key(&wrapped).await.map_err(by_kms)?;
        let (header, path) = (Arc::clone(&before.header), before.path.clone());
        // Not among work that may hang, as the key would.
        let sealed =
            apart("seal", move || NextHeader::seal(header, &key, wrapped, canary, &path)).await;
        let next = sealed.map_err(|e| by_panic(what, e))?.map_err(|e| by_volume(what, &e))?;
        Ok((next, proof))
    }

    /// Writes the next header, and tells the volume's keeper if it is in service.
    async fn put(
        &self,
        what: &str,
        volume: &Volume,
        config: &VolumeConfig,
        next: NextHeader,
    ) -> Answered<()> {
        let alone = volume.changing.lock().await;
        let in_service = volume.with(|now| in_service(&now.service)).zip(teller(volume));
        let Some((export, teller)) = in_service else {
            let backing = config.backing.clone();
            let written = apart("header", move || {
                LockedVolume::open(&backing, Access::ReadWrite)?.replace_header(&next)
            });
            return written.await.map_err(|e| by_panic(what, e))?.map_err(|e| by_volume(what, &e));
        };
        // A store that stalls keeps nobody from detaching the volume: its lock is the store's.
        drop(alone);
        let key = next.header().token().wrapped.key_arn.clone();
        let written = apart("header", move || export.volume().replace_header(&next)).await;
        written.map_err(|e| by_panic(what, e))?.map_err(|e| by_volume(what, &e))?;
        let interval = config.lease.policy(self.setup.policy).interval;
        teller.rewrapped(self.groups.join(&key, config.role().as_ref(), interval)).await;
        Ok(())
    }
}

pub(super) fn in_service(service: &Service) -> Option<Arc<Export>> {
    match service {
        Service::Attached(attached) => Some(Arc::clone(&attached.export)),
        Service::Detached | Service::Attaching(_) | Service::Detaching(_) => None,
    }
}
