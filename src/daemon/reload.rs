//! Reads `byokd.toml` and the definitions anew, when `byokctl reload` or SIGHUP asks for it: all of
//! it or, if anything is wrong with it, nothing.
//!
//! A volume in service is never disturbed: what changed of it waits until it is attached anew, and
//! `byokctl status` says so.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::{Arc, PoisonError};

use jiff::Timestamp;
use tokio::signal::unix::Signal;
use tracing::{error, info};

use crate::audit::record::{Event, Kind};
use crate::config::{
    AttachWhen, Config, ConfigError, ConfigErrors, VolumeConfig, load, load_volumes,
};
use crate::control::{Problem, Reloaded};
use crate::daemon::refusals::{Answered, by_panic, refused};
use crate::daemon::{Daemon, Now, Service, Volume};
use crate::exit::ExitCode;
use crate::keeper::threads::apart;
use crate::units::rfc3339;

/// What a definition that was read has come to.
enum Taken {
    /// It is what was known.
    Same,
    /// It is in force.
    Now,
    /// Its volume is in service, and goes on as it was.
    Later,
}

impl Daemon {
    /// Reloads at each SIGHUP. Never ends.
    pub(super) async fn reload_when_told(self: Arc<Self>, mut hup: Signal) {
        while hup.recv().await.is_some() {
            match self.reload().await {
                Ok(reloaded) => info!(?reloaded, "settings and definitions read anew"),
                Err(e) => error!(why = e.why, remedy = e.remedy, "everything stays as it was"),
            }
        }
    }

    pub(super) async fn reload(self: &Arc<Self>) -> Answered<Reloaded> {
        let what = "reload the configuration";
        let _one_at_a_time = self.reloading.lock().await;
        let file = self.setup.file.as_ref().map(|(file, _)| file.clone());
        let dir = self.setup.config.volumes_dir.clone();
        let read = apart("reload", move || {
            let settings = file.map(|file| load(&file)).transpose();
            all(settings, load_volumes(&dir))
        });
        let read = read.await.map_err(|e| by_panic(what, e))?;
        let (settings, definitions) =
            read.map_err(|e| refused(ExitCode::Usage, what, e, "Mend the lines named above."))?;
        // All of them could be read.
        self.skipped.lock().unwrap_or_else(PoisonError::into_inner).clear();
        let mut reloaded = Reloaded::default();
        if let Some(settings) = settings {
            reloaded.at_restart = self.differing(&settings);
        }
        let (mut names, mut tries) = (BTreeSet::new(), Vec::new());
        for (name, config) in definitions {
            let is_auto = config.attach == AttachWhen::Auto;
            let (known, volume, mut tried) = {
                let mut volumes = self.volumes();
                let known = volumes.get(&name).cloned();
                let tried = known
                    .as_ref()
                    .is_some_and(|v| v.with(|now| now.config.attach == AttachWhen::Auto));
                let volume = volumes.entry(name.clone());
                let volume = volume.or_insert_with(|| Arc::new(Volume::new(config.clone())));
                (known.is_some(), Arc::clone(volume), tried)
            };
            // Forgotten since it was read, if it was so before it was known again: whoever forgets it
            // from now on takes it from those that are known.
            if !known && !self.is_defined(&name).await.unwrap_or(true) {
                let stays = |other: &Volume| other.with(|now| is_in_use(now));
                self.volumes().retain(|_, other| !Arc::ptr_eq(other, &volume) || stays(other));
                continue;
            }
            names.insert(name.clone());
            if !known {
                reloaded.added.push(name.clone());
            } else {
                match volume.with(|now| take(now, config)) {
                    Taken::Same => {}
                    Taken::Now => {
                        tried = false;
                        reloaded.changed.push(name.clone());
                    }
                    Taken::Later => reloaded.at_next_attach.push(name.clone()),
                }
            }
            if is_auto && !tried {
                tries.push((name, volume));
            }
        }
        self.drop_removed(&names, &mut reloaded).await;
        // Before it is tried: what waits for a volume is told whatever KMS says.
        for name in self.find_devices().await {
            if !tries.iter().any(|(tried, _)| *tried == name) {
                self.try_on(&name);
            }
        }
        for (name, volume) in tries {
            self.start_tries(name, volume, None);
        }
        for (change, names) in [("defined", &reloaded.added), ("removed", &reloaded.removed)] {
            for name in names {
                let event = Event::new(Kind::ConfigChange).volume(name);
                self.audit.record(event.detail("change", change));
            }
        }
        let count = names.len().to_string();
        self.audit.record(Event::new(Kind::ConfigLoad).detail("volumes", &count));
        Ok(reloaded)
    }

    /// Settings that are not those that the daemon started with; they wait for the next start.
    fn differing(&self, settings: &Config) -> Vec<String> {
        let differing = self.setup.config.differing(settings);
        let problem = (!differing.is_empty()).then(|| Problem {
            at: rfc3339(Timestamp::now()),
            why: format!("byokd.toml was changed: its new {} wait", differing.join(", ")),
            remedy: "systemctl restart byokd".to_owned(),
        });
        *self.at_restart.lock().unwrap_or_else(PoisonError::into_inner) = problem;
        differing.into_iter().map(str::to_owned).collect()
    }

    pub(super) fn settings_problem(&self) -> Option<Problem> {
        self.at_restart.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Definitions that could not be read when the daemon started.
    pub(super) fn skipped_problems(&self) -> Vec<Problem> {
        let skipped = self.skipped.lock().unwrap_or_else(PoisonError::into_inner);
        skipped.values().cloned().collect()
    }

    /// The definition of that name was read, or it was found to be gone.
    pub(super) fn not_skipped(&self, name: &str) {
        let mut skipped = self.skipped.lock().unwrap_or_else(PoisonError::into_inner);
        skipped.remove(&self.definition(name));
    }

    /// Volumes whose definitions are gone are not known any more, unless they are in use.
    async fn drop_removed(&self, names: &BTreeSet<String>, reloaded: &mut Reloaded) {
        let mut gone: Vec<_> = self.volumes().clone().into_iter().collect();
        gone.retain(|(name, _)| !names.contains(name));
        for at in (0..gone.len()).rev() {
            // Made since the directory was read.
            if self.is_defined(&gone[at].0).await.unwrap_or(true) {
                gone.swap_remove(at);
            }
        }
        self.volumes().retain(|name, volume| {
            if !gone.iter().any(|(_, gone)| Arc::ptr_eq(gone, volume)) {
                return true;
            }
            let in_use = volume.with(|now| {
                let in_use = is_in_use(now);
                if in_use {
                    now.at_next_attach = vec!["definition, which is gone"];
                }
                in_use
            });
            if in_use {
                reloaded.at_next_attach.push(name.clone());
            } else {
                reloaded.removed.push(name.clone());
            }
            in_use
        });
    }
}

/// What is told of a definition that cannot be read when the daemon starts.
pub(super) fn skipped(error: ConfigError) -> (PathBuf, Problem) {
    let problem = Problem {
        at: rfc3339(Timestamp::now()),
        why: format!("the volume of a definition that cannot be read is not served: {error}"),
        remedy: "Mend the line named above, then: byokctl reload".to_owned(),
    };
    (error.file, problem)
}

fn is_in_use(now: &Now) -> bool {
    !matches!(now.service, Service::Detached) || now.device.is_some()
}

/// Puts a definition in force, as far as its volume may be changed now.
fn take(now: &mut Now, config: VolumeConfig) -> Taken {
    let mut differing = now.config.differing(&config);
    if !is_in_use(now) {
        now.config = config;
        now.at_next_attach = Vec::new();
        return if differing.is_empty() { Taken::Same } else { Taken::Now };
    }
    // The next start asks for it, not the volume.
    let attach_changed = now.config.attach != config.attach;
    now.config.attach = config.attach;
    differing.retain(|key| *key != "attach");
    now.at_next_attach.clone_from(&differing);
    match (differing.is_empty(), attach_changed) {
        (false, _) => Taken::Later,
        (true, true) => Taken::Now,
        (true, false) => Taken::Same,
    }
}

/// Both, or everything that is wrong with either.
fn all<A, B>(
    one: Result<A, ConfigErrors>,
    other: Result<B, ConfigErrors>,
) -> Result<(A, B), ConfigErrors> {
    match (one, other) {
        (Ok(one), Ok(other)) => Ok((one, other)),
        (Err(mut one), Err(other)) => {
            one.0.extend(other.0);
            Err(one)
        }
        (Err(errors), Ok(_)) | (Ok(_), Err(errors)) => Err(errors),
    }
}
