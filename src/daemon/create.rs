//! New volumes: written to their stores, and defined.

use std::fs::File;
use std::io::{self, Write};
use std::path::Path;
use std::sync::Arc;

use tracing::info;
use uuid::Uuid;

use crate::audit::record::{Event, Kind};
use crate::config::{VolumeConfig, is_volume_name};
use crate::control::{VolumeCreate, VolumeStatus};
use crate::daemon::refusals::{Answered, by_panic, by_service, by_volume, refused};
use crate::daemon::status::status;
use crate::daemon::{Daemon, Volume};
use crate::exit::ExitCode;
use crate::keeper::threads::{apart, close};
use crate::key::lease::Connection;
use crate::key::wrapped::{Canary, EncryptionContext};
use crate::kms::{KeyService, NewKey, ServiceError};
use crate::volume::{CreateOptions, NewVolume};

/// A name that a volume being made has for itself.
struct Reserved<'a> {
    daemon: &'a Daemon,
    name: String,
}

impl Drop for Reserved<'_> {
    fn drop(&mut self) {
        self.daemon.creating().remove(&self.name);
    }
}

impl Daemon {
    async fn reserve(&self, what: &str, name: &str) -> Answered<Reserved<'_>> {
        let taken = || {
            refused(
                ExitCode::WrongState,
                what,
                "there is a volume of that name",
                "Choose another name, or `byokctl volume forget` that one (its data stays).",
            )
        };
        let reserved = {
            let mut creating = self.creating();
            if self.volumes().contains_key(name) || !creating.insert(name.to_owned()) {
                return Err(taken());
            }
            Reserved { daemon: self, name: name.to_owned() }
        };
        if self.is_defined(name).await.map_err(|e| by_panic(what, e))? {
            return Err(taken());
        }
        Ok(reserved)
    }

    pub(super) async fn create(&self, create: VolumeCreate) -> Answered<Box<VolumeStatus>> {
        let what = format!("create volume {}", create.name);
        if !is_volume_name(&create.name) {
            return Err(refused(
                ExitCode::Usage,
                &what,
                "that cannot be a volume's name",
                "Use letters, digits, `-`, `_` and `.`, at most 64, beginning with a letter or digit.",
            ));
        }
        if create.backing.is_relative() {
            return Err(refused(
                ExitCode::Usage,
                &what,
                format!("{} is a relative path", create.backing.display()),
                "Give the backing file or device as an absolute path.",
            ));
        }
        let reserved = self.reserve(&what, &create.name).await?;
        let uuid = self.make(&what, &create).await?;
        let mut config = VolumeConfig::new(create.backing);
        config.uuid = Some(uuid);
        config.role_arn = create.role.as_ref().map(|role| role.arn.clone());
        config.external_id = create.role.and_then(|role| role.external_id);
        let (path, defined) = (self.definition(&create.name), config.clone());
        let written = apart("define", move || define(&path, &defined)).await;
        written.flatten().map_err(|e| {
            let why = format!("the volume is made, but its definition is not written: {e}");
            refused(
                ExitCode::Failed,
                &what,
                why,
                "Write the definition by hand, or create it again with --force.",
            )
        })?;
        let defined = Event::new(Kind::ConfigChange).volume(&create.name);
        self.audit.record(defined.detail("change", "defined"));
        info!(volume = create.name, key = %create.key, purpose = %create.purpose, "volume created");
        // A reload may have found the definition already, and attach the volume.
        let volume = {
            let mut volumes = self.volumes();
            let volume = volumes.entry(create.name.clone());
            Arc::clone(volume.or_insert_with(|| Arc::new(Volume::new(config))))
        };
        drop(reserved);
        Ok(Box::new(status(&create.name, &volume).await))
    }

    /// Writes the volume to its store. The key has proved by then that it can be used in the
    /// volume's context, also for unwrapping.
    async fn make(&self, what: &str, create: &VolumeCreate) -> Answered<Uuid> {
        let options = CreateOptions {
            backing: create.backing.clone(),
            capacity: create.size,
            sector_size: create.sector_size,
            label: create.name.clone(),
            force: create.force,
            preallocate: create.preallocate,
        };
        let prepared = apart("prepare", move || NewVolume::prepare(options)).await;
        let new = prepared.map_err(|e| by_panic(what, e))?.map_err(|e| by_volume(what, &e))?;
        let uuid = new.uuid();
        let (key, canary) = match self.make_key(what, create, uuid).await {
            Ok(made) => made,
            Err(refused) => {
                close(new).await;
                return Err(refused);
            }
        };
        let event = Event::new(Kind::Create).volume(&create.name).wrapped(&key.wrapped);
        let event = event.detail("backing", &create.backing.display().to_string());
        // Not among work that may hang, as the key would.
        let sealed = apart("seal", move || new.seal(key.key, key.wrapped, canary)).await;
        let sealed = sealed.map_err(|e| by_panic(what, e))?.map_err(|e| by_volume(what, &e))?;
        if let Err(refused) = self.first_record(what, event).await {
            close(sealed).await;
            return Err(refused);
        }
        let committed = apart("commit", move || sealed.commit()).await;
        committed.map_err(|e| by_panic(what, e))?.map_err(|e| by_volume(what, &e))?;
        Ok(uuid)
    }

    /// A key for a new volume, which has proved that it can be used, and a canary.
    async fn make_key(
        &self,
        what: &str,
        create: &VolumeCreate,
        uuid: Uuid,
    ) -> Answered<(NewKey, Canary)> {
        let pairs = create.context.clone();
        let context = EncryptionContext::for_volume(uuid, create.purpose, pairs)
            .map_err(|e| refused(ExitCode::Usage, what, e, "Mend the --context options."))?;
        let kms = self.kms_for(what, create.role.as_ref()).await?;
        let by_kms = |error: ServiceError| by_service(what, &error);
        let key = kms.make_key(&create.key, &context).await.map_err(by_kms)?;
        let canary = kms.make_canary(&create.key, &context).await.map_err(by_kms)?;
        let probed = kms.probe(&canary, Connection::Fresh).await;
        probed.map_err(|e| by_kms(e.into()))?;
        Ok((key, canary))
    }
}

/// Writes a definition so that it is there whole or not at all.
fn define(path: &Path, config: &VolumeConfig) -> io::Result<()> {
    let text = toml::to_string(config).map_err(io::Error::other)?;
    let new = path.with_extension("toml.new");
    let mut file = File::create(&new)?;
    file.write_all(text.as_bytes())?;
    file.sync_all()?;
    std::fs::rename(&new, path)?;
    match path.parent() {
        Some(directory) => File::open(directory)?.sync_all(),
        None => Ok(()),
    }
}
