//! What everybody who asks the actor something has.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use fusionllm_protocol::{Inventory, JobId, JobSpec, StatusReport};
use tokio::sync::{mpsc, oneshot};
use tokio::task::spawn_blocking;

use super::command::{Command, RunDirChoice};
use super::events::Submitted;
use super::open_runs::OpenRuns;
use super::start::{planned_by, resumed_start, start_of};
use crate::BrokerError;
use crate::core::{StartPoint, check_resumable};
use crate::reach::Reach;
use crate::resume::resumed_job;
use crate::run_dir::{check_run_folders, default_run_dir, free_run_dir, is_free};
use crate::store::JobRecord;

/// A job that was taken in, or why not.
pub(super) type Taken = Result<Submitted, BrokerError>;

/// The way to the actor.
#[derive(Clone, Debug)]
pub(super) struct Handle {
    pub(super) commands: mpsc::Sender<Command>,
    pub(super) runs_dir: Arc<Path>,
    pub(super) scratch: Arc<Path>,
    pub(super) reach: Arc<Reach>,
    pub(super) open_runs: OpenRuns,
    /// Whether the broker has a relay.
    pub(super) has_relay: bool,
}

impl Handle {
    pub(super) async fn ask<T>(&self, command: impl FnOnce(oneshot::Sender<T>) -> Command) -> Result<T, BrokerError> {
        let (reply, answer) = oneshot::channel();
        self.commands.send(command(reply)).await.map_err(|_| BrokerError::Ended)?;
        answer.await.map_err(|_| BrokerError::Ended)
    }

    pub(super) async fn status(&self) -> Result<StatusReport, BrokerError> {
        self.ask(|reply| Command::Status { reply }).await
    }

    pub(super) async fn inventory(
        &self,
        max_age: Option<Duration>,
        job: Option<JobSpec>,
    ) -> Result<Inventory, BrokerError> {
        let job = match job {
            Some(spec) => {
                spec.validate()?;
                let loading = spec.clone();
                Some(Box::new((spec, blocking(move || start_of(&loading, None)).await?)))
            }
            None => None,
        };
        let inventory = self.ask(|reply| Command::Inventory { max_age, job, reply }).await?;
        Ok(Inventory { relay: self.has_relay, ..inventory })
    }

    pub(super) async fn stop(&self, job: JobId) -> Result<(), BrokerError> {
        self.ask(|reply| Command::Stop { job, reply }).await?
    }

    pub(super) async fn drain(&self, name: String) -> Result<(), BrokerError> {
        self.ask(|reply| Command::Drain { name, reply }).await?
    }

    /// Takes in a job of somebody else than this process.
    pub(super) async fn submit_for_client(&self, spec: JobSpec, tokenizer: Option<String>, own: bool) -> Taken {
        self.check_reach(&spec, own).await?;
        self.submit(spec, None, tokenizer).await
    }

    pub(super) async fn inventory_for_client(
        &self,
        max_age: Option<Duration>,
        job: Option<JobSpec>,
        own: bool,
    ) -> Result<Inventory, BrokerError> {
        if let Some(spec) = &job {
            self.check_reach(spec, own).await?;
        }
        self.inventory(max_age, job).await
    }

    /// Whether the job touches only what the broker touches for others, or for its `own` user.
    async fn check_reach(&self, spec: &JobSpec, own: bool) -> Result<(), BrokerError> {
        let (reach, spec) = (Arc::clone(&self.reach), spec.clone());
        blocking(move || reach.check(&spec, own)).await
    }

    pub(super) async fn submit(&self, spec: JobSpec, run_dir: Option<PathBuf>, tokenizer: Option<String>) -> Taken {
        spec.validate()?;
        let choice = match run_dir {
            Some(path) if is_free(&path)? => RunDirChoice::Given(path),
            Some(path) => return Err(BrokerError::RunDirNotEmpty { path }),
            None => RunDirChoice::Free(default_run_dir(&self.runs_dir, &spec.name, SystemTime::now())),
        };
        let loading = spec.clone();
        let start = blocking(move || start_of(&loading, tokenizer)).await?;
        self.submit_at(spec, start, choice).await
    }

    pub(super) async fn submit_at(&self, spec: JobSpec, start: StartPoint, run_dir: RunDirChoice) -> Taken {
        let folder = match &run_dir {
            RunDirChoice::Given(folder) => folder.clone(),
            // In the one that another job has just begun nobody is to work.
            RunDirChoice::Free(base) => free_run_dir(base, |_| false)?,
        };
        let prepared = blocking(move || {
            check_run_folders(&folder, &spec)?;
            planned_by(spec, start)
        });
        let (spec, start) = prepared.await?;
        let (spec, start) = (Box::new(spec), Box::new(start));
        self.ask(|reply| Command::Submit { spec, start, run_dir, reply }).await?
    }

    /// Goes on with a stopped or failed job from its newest whole checkpoint or that of `step`, or if it has none or
    /// `step` is 0, from its beginning. `overrides` change keys of the job; the broker's `own` user may name any file.
    pub(super) async fn resume(&self, job: JobId, step: Option<u64>, overrides: Vec<String>, own: bool) -> Taken {
        // A checkpoint that is being written counts.
        self.ask(|reply| Command::Flush { reply }).await?;
        let record: JobRecord = self.ask(|reply| Command::Record { job, reply }).await??;
        // Before all of its checkpoint is read.
        check_resumable(&record)?;
        let reach = Arc::clone(&self.reach);
        let prepared = blocking(move || {
            let spec = resumed_job(&record.spec, &overrides, None)?;
            // What it reads was allowed to whoever submitted it; where it may write can have changed since.
            let reads_the_same = (&spec.model.path, &spec.placement.cluster)
                == (&record.spec.model.path, &record.spec.placement.cluster);
            reach.check(&spec, own || reads_the_same)?;
            check_run_folders(&record.run_dir, &spec)?;
            let mut start = resumed_start(&record, &spec, step)?;
            // Its model was read from what the job names.
            if start.model.is_some() && record.step > 0 && step.is_none() {
                let lost =
                    format!("there is no checkpoint: it begins anew, and its {} steps are done again", record.step);
                start.notices.push(lost);
            }
            planned_by(spec, start)
        });
        let (spec, start) = prepared.await?;
        let (spec, start) = (Box::new(spec), Box::new(start));
        self.ask(|reply| Command::Resume { job, spec, start, step, reply }).await?
    }
}

/// Runs file work where it holds up nobody.
pub(super) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, BrokerError> + Send + 'static,
) -> Result<T, BrokerError> {
    // The work ends without a result only when the runtime does.
    spawn_blocking(work).await.unwrap_or(Err(BrokerError::Ended))
}
