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
use crate::daemon::status::{each, status};
use crate::daemon::{Daemon, Keyed, Service, Volume};
use crate::exit::ExitCode;
use crate::keeper::Teller;
use crate::keeper::threads::apart;
use crate::key::wrapped::KeyArn;

impl Daemon {
    fn suspension(&self, name: &str) -> PathBuf {
        self.setup.config.volumes_dir.join(format!("{name}.suspended"))
    }

    /// Refuses what wants the key of a volume that an operator keeps fenced.
    pub(super) async fn not_suspended(&self, what: &str, name: &str) -> Answered<()> {
        if self.is_suspended(name).await {
            let remedy = format!("Whoever may end that: byokctl key resume {name}");
            let why = "an operator suspended its key";
            return Err(refused(ExitCode::WrongState, what, why, remedy));
        }
        Ok(())
    }

    /// Whether an operator keeps the volume fenced.
    pub(super) async fn is_suspended(&self, name: &str) -> bool {
        let path = self.suspension(name);
        // Without a thread to look, it is as if he did.
        apart("suspended", move || path.exists()).await.unwrap_or(true)
    }

    /// Forgets a suspension, if there is one.
    pub(super) async fn unsuspend(&self, name: &str) -> io::Result<()> {
        let (path, directory) = (self.suspension(name), self.setup.config.volumes_dir.clone());
        let removed = apart("resume", move || match std::fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => File::open(directory)?.sync_all(),
        });
        removed.await.flatten()
    }

    pub(super) async fn suspend(&self, name: &str) -> Answered<Box<VolumeStatus>> {
        let what = format!("suspend the key of volume {name}");
        let volume = self.find(&what, name).await?;
        let (path, directory) = (self.suspension(name), self.setup.config.volumes_dir.clone());
        let keep = apart("suspend", move || {
            File::create(path)?.sync_all()?;
            File::open(directory)?.sync_all()
        });
        let fence = async {
            if let Some(teller) = teller(&volume) {
                teller.suspend().await;
            }
        };
        // The fence does not wait for a disk, be it full or hanging.
        let (kept, ()) = tokio::join!(keep, fence);
        // Its key came meanwhile, before the file was there to be seen.
        if let Some(teller) = teller(&volume) {
            teller.suspend().await;
        }
        let kept = kept.flatten();
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
        if !self.is_suspended(name).await {
            return Err(refused(
                ExitCode::WrongState,
                &what,
                "it is not suspended",
                format!("See `byokctl status {name}`."),
            ));
        }
        let resumed = self.unsuspend(name).await;
        resumed.map_err(|e| refused(ExitCode::Failed, &what, e, "Check the volumes directory."))?;
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
        Ok(each(chosen).await)
    }
}

fn key_of(service: &Service) -> Option<KeyArn> {
    let Keyed { export, .. } = service.keyed()?;
    Some(export.volume().header().token().wrapped.key_arn.clone())
}

/// The way to the volume's keeper, while its key may be here.
pub(super) fn teller(volume: &Volume) -> Option<Teller> {
    volume.with(|now| Some(now.service.keyed()?.teller))
}
