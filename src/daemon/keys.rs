//! What operators do to the keys of volumes: suspend, resume, ask KMS now.
//!
//! A suspension outlives the daemon: a file `NAME.suspended` beside the volume's definition keeps
//! the volume from being attached. It waits for nobody, least of all for a KMS that is slow.

use std::fs::File;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use tokio::task::JoinSet;
use tracing::{info, warn};

use crate::control::VolumeStatus;
use crate::daemon::refusals::{Answered, refused};
use crate::daemon::status::status;
use crate::daemon::{Daemon, Service, Volume};
use crate::exit::ExitCode;
use crate::keeper::Teller;
use crate::key::wrapped::KeyArn;

impl Daemon {
    fn suspension(&self, name: &str) -> PathBuf {
        self.setup.config.volumes_dir.join(format!("{name}.suspended"))
    }

    /// Whether an operator keeps the volume fenced.
    pub(super) fn is_suspended(&self, name: &str) -> bool {
        self.suspension(name).exists()
    }

    /// Refuses what wants the key of a volume that an operator keeps fenced.
    pub(super) fn not_suspended(&self, what: &str, name: &str) -> Answered<()> {
        if self.is_suspended(name) {
            let remedy = format!("Whoever may end that: byokctl key resume {name}");
            let why = "an operator suspended its key";
            return Err(refused(ExitCode::WrongState, what, why, remedy));
        }
        Ok(())
    }

    /// Forgets a suspension, if there is one.
    pub(super) fn unsuspend(&self, name: &str) -> io::Result<()> {
        match std::fs::remove_file(self.suspension(name)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => File::open(&self.setup.config.volumes_dir)?.sync_all(),
        }
    }

    pub(super) async fn suspend(&self, name: &str) -> Answered<Box<VolumeStatus>> {
        let what = format!("suspend the key of volume {name}");
        let volume = self.find(&what, name).await?;
        let kept = File::create(self.suspension(name))
            .and_then(|file| file.sync_all())
            .and_then(|()| File::open(&self.setup.config.volumes_dir)?.sync_all());
        // The fence does not wait for a disk that is full.
        if let Some(teller) = teller(&volume) {
            teller.suspend().await;
        }
        kept.map_err(|e| {
            let why = format!("it is fenced, but will not be after a restart: {e}");
            refused(ExitCode::Failed, &what, why, "Check the volumes directory, and suspend again.")
        })?;
        warn!(volume = name, "an operator suspended the key");
        Ok(Box::new(status(name, &volume).await))
    }

    pub(super) async fn resume(&self, name: &str) -> Answered<Box<VolumeStatus>> {
        let what = format!("resume the key of volume {name}");
        let volume = self.find(&what, name).await?;
        if !self.is_suspended(name) {
            return Err(refused(
                ExitCode::WrongState,
                &what,
                "it is not suspended",
                format!("See `byokctl status {name}`."),
            ));
        }
        self.unsuspend(name)
            .map_err(|e| refused(ExitCode::Failed, &what, e, "Check the volumes directory."))?;
        info!(volume = name, "an operator resumed the key");
        if let Some(teller) = teller(&volume) {
            teller.resume().await;
        }
        Ok(Box::new(status(name, &volume).await))
    }

    /// Probes the volume of that name, or all attached volumes under that key.
    pub(super) async fn recheck(self: &Arc<Self>, target: &str) -> Answered<Vec<VolumeStatus>> {
        let what = format!("recheck {target}");
        let chosen: Vec<_> = match target.parse::<KeyArn>() {
            Ok(arn) => {
                let under = |volume: &Volume| {
                    volume.with(|now| key_of(&now.service).as_ref() == Some(&arn))
                };
                let all = self.volumes().clone();
                all.into_iter().filter(|(_, volume)| under(volume)).collect()
            }
            Err(_) => vec![(target.to_owned(), self.find(&what, target).await?)],
        };
        let mut probes = JoinSet::new();
        for teller in chosen.iter().filter_map(|(_, volume)| teller(volume)) {
            probes.spawn(async move { teller.recheck().await });
        }
        if probes.is_empty() {
            return Err(refused(
                ExitCode::WrongState,
                &what,
                "no such volume is attached",
                "See `byokctl status`; only attached volumes are probed.",
            ));
        }
        while probes.join_next().await.is_some() {}
        let mut volumes = Vec::with_capacity(chosen.len());
        for (name, volume) in chosen {
            volumes.push(status(&name, &volume).await);
        }
        Ok(volumes)
    }
}

fn key_of(service: &Service) -> Option<KeyArn> {
    match service {
        Service::Attached(attached) => {
            Some(attached.export.volume().header().token().wrapped.key_arn.clone())
        }
        Service::Detached | Service::Attaching | Service::Detaching => None,
    }
}

/// The way to the volume's keeper, while it is attached.
pub(super) fn teller(volume: &Volume) -> Option<Teller> {
    volume.with(|now| match &now.service {
        Service::Attached(attached) => Some(attached.keeper.teller()),
        Service::Detached | Service::Attaching | Service::Detaching => None,
    })
}
