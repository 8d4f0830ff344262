//! How a run of `fusionllm train` goes on that was stopped before its end.

use std::path::{Path, PathBuf};

use fusionllm_broker::{Broker, BrokerError, Resumption};
use fusionllm_protocol::JobId;
use fusionllm_transport::{KnownFolder, shell_path};

use crate::cli;
use crate::outputs::is_same_file;

/// How a run goes on that was stopped. Nothing is read for it before it is asked for, and no checkpoint as a whole:
/// whoever stops a run waits for that.
pub(super) struct WayOn {
    run_dir: PathBuf,
    /// The checkpoint that it began with.
    from: Option<Began>,
    /// The last checkpoint that this command saw.
    checkpoint: Option<u64>,
    /// Its folder, which others may rename.
    folder: Option<KnownFolder>,
    /// Steps of those that are there, newest first.
    there: Result<Vec<u64>, BrokerError>,
}

/// A checkpoint with which a run began or went on.
struct Began {
    path: PathBuf,
    step: u64,
    /// Whether it is another run's.
    is_anothers: bool,
    /// Whether it was asked for; else it is the newest.
    is_chosen: bool,
}

impl WayOn {
    pub(super) fn new(args: &cli::Train, run_dir: &Path, from: Option<&Resumption>) -> Self {
        let began = |from: &Resumption| {
            let (path, step) = (from.checkpoint().path(), from.checkpoint().manifest().step);
            let path = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
            let is_named = args.resume.as_deref().is_some_and(|named| is_same_file(named, &path));
            Began { path, step, is_anothers: from.begins_anew(), is_chosen: args.step.is_some() || is_named }
        };
        Self {
            run_dir: run_dir.to_owned(),
            from: from.map(began),
            checkpoint: None,
            folder: None,
            there: Ok(Vec::new()),
        }
    }

    /// The step after which it began.
    pub(super) fn began_after(&self) -> u64 {
        self.from.as_ref().map_or(0, |from| from.step)
    }

    /// There is a new checkpoint, in this folder.
    pub(super) fn saw(&mut self, step: u64, folder: &str) {
        (self.checkpoint, self.folder) = (Some(step), KnownFolder::open(Path::new(folder)).ok());
    }

    /// Looks which checkpoints are there: what was known of may have been renamed or removed since.
    pub(super) async fn look(&mut self, broker: &Broker, job: JobId) {
        self.there = broker.checkpoints(job).await;
    }
}

impl std::fmt::Display for WayOn {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let dir = shell_path(&self.run_dir);
        let there = match &self.there {
            Ok(there) => there,
            Err(error) => return write!(f, "it cannot be said how it goes on: {error}"),
        };
        let own = self.from.as_ref().filter(|from| !from.is_anothers);
        // Until the run has put them aside, later ones than the chosen one are there.
        if let Some(Began { step, .. }) = own.filter(|from| from.is_chosen && self.checkpoint.is_none())
            && there.contains(step)
        {
            return write!(
                f,
                "`fusionllm train --resume {dir} --step {step}` goes on from the checkpoint of step {step}"
            );
        }
        let known = self.checkpoint.or(own.map(|from| from.step));
        let newest = known.filter(|known| there.contains(known)).or(there.first().copied());
        match (newest, known, &self.from) {
            (Some(step), ..) => {
                write!(f, "`fusionllm train --resume {dir}` goes on from the checkpoint of step {step}")
            }
            (None, Some(step), _) => {
                write!(
                    f,
                    "the checkpoint of step {step} is not in {dir} any more, others have renamed or removed it: `fusionllm \
                     train --resume"
                )?;
                match self.folder.as_ref().and_then(KnownFolder::name) {
                    Some(went) => write!(f, " {}` goes on from it", shell_path(&went)),
                    None => write!(f, "` with the folder where it is now goes on from it"),
                }
            }
            (None, None, Some(Began { path, step, .. })) => {
                let path = shell_path(path);
                write!(
                    f,
                    "there is no checkpoint in {dir} yet; `fusionllm train --resume {path} --out DIR` begins again with the \
                     one of step {step}, in another folder or in the same once that is removed"
                )
            }
            (None, None, None) => {
                write!(f, "there is no checkpoint yet to go on from; to train anew, remove {dir} or give another --out")
            }
        }
    }
}
