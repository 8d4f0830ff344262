//! A run directory at the start of a placement: whose it is, and what of earlier ones does not count any more.

use std::path::{Path, PathBuf};

use fusionllm_protocol::{JobSpec, Notice};
use fusionllm_transport::{KnownFolder, Stands};

use crate::BrokerError;
use crate::checkpoint::{Abandoned, ShardPlace, abandon, checkpoints_of, recover, remove_partial, steps_in};
use crate::files::{free_name, io_error, make_folder, new_folder, put_aside, write_atomic};
use crate::metrics::{copy_after, each_line, has_no_step};
use crate::run_dir::{
    CHECKPOINTS, FolderLock, PlacementFile, RunDir, RunFile, RunHome, RunLocks, RunStart, SPARE_FOLDERS, WholeFiles,
    is_of_snapshots, make_room, spare_name, to_json,
};

/// What a folder may have in it that nobody uses: our lock, and what a new disk comes with.
const EMPTY: [&str; 2] = [FolderLock::FILE, "lost+found"];

/// A run at work: its directory is locked.
#[derive(Debug)]
pub(crate) struct OpenedRun {
    /// Its `run.json`.
    pub(crate) file: RunFile,
    /// The job as this run does it, every default filled in.
    pub(crate) spec: JobSpec,
    /// Where checkpoints go.
    pub(crate) place: ShardPlace,
    /// What was found that its user must know.
    pub(crate) notices: Vec<String>,
    /// The files of its directory that are written as a whole.
    pub(crate) files: WholeFiles,
    locks: RunLocks,
    /// The folder for checkpoints that takes the place of one that has gone, and is not made yet.
    next: Option<PathBuf>,
}

impl OpenedRun {
    /// The run as readers see it.
    pub(crate) fn home(&self) -> RunHome {
        RunHome { dir: self.file.dir.clone(), file: Some(self.file.clone()), spec: Some(self.spec.clone()) }
    }

    /// A locked folder of the run that was renamed, removed or replaced meanwhile.
    pub(crate) fn missing(&self) -> Option<&KnownFolder> {
        self.locks.missing()
    }

    /// Makes such folders again, with the files that the run directory had. Checkpoints that are gone are forgotten. Where
    /// something else has come in the place of the folder elsewhere, the last checkpoint goes to one in the run directory; where
    /// it has come in the place of that, to where that is now, or to another one.
    ///
    /// # Errors
    /// [`BrokerError`] if something else is there by now, or it cannot be made.
    pub(crate) fn make_again(&mut self, is_last: bool) -> Result<(), BrokerError> {
        let mut is_new = !self.is_in_place();
        let mut taken = self.locks.take_again(&self.file.run);
        if let Err(BrokerError::Foreign { path, .. }) = &taken
            && is_last
            && !self.is_in_place()
        {
            is_new = self.leave_place(&path.clone())?;
            taken = self.locks.take_again(&self.file.run);
        }
        match taken {
            Err(BrokerError::Foreign { path, .. }) if is_last && self.is_in_place() => self.leave_elsewhere(&path)?,
            taken => taken?,
        }
        let folder = self.place.folder.clone();
        make_folder(&folder)?;
        self.place = ShardPlace::new(self.file.run.clone(), folder)?;
        self.next = None;
        self.forget_what_is_gone()?;
        if is_new { self.files.write_all() } else { Ok(()) }
    }

    /// Gives up the place of the run directory, in which something else is by now: the run goes on where its directory went, or
    /// in a new one beside it. Whether that is new.
    fn leave_place(&mut self, other: &Path) -> Result<bool, BrokerError> {
        let from = self.file.dir.clone();
        let (to, is_new) = match self.locks.run_dir.follow() {
            Some(went) => (went, false),
            None => {
                let to = free_name(&from, &format!("-{}", self.file.run.short()));
                new_folder(&to)?;
                self.locks.run_dir = FolderLock::take(&to, &self.file.run)?;
                (to, true)
            }
        };
        self.notices.push(format!(
            "{} is in the way, which this run did not make, and stays as it is: the run directory is {} now",
            other.display(),
            to.display()
        ));
        self.files.move_to(&from, &to);
        if let Ok(inside) = self.place.folder.strip_prefix(&from) {
            self.place.folder = to.join(inside);
        }
        self.file.dir = to;
        Ok(is_new)
    }

    /// Gives up the folder for checkpoints elsewhere, in which something else is by now.
    fn leave_elsewhere(&mut self, other: &Path) -> Result<(), BrokerError> {
        let folder = self.spare_folder()?;
        new_folder(&folder)?;
        self.notices.push(format!(
            "{} is in the way, which this run did not make, and stays as it is: the last checkpoint goes to {}",
            other.display(),
            folder.display()
        ));
        self.locks.checkpoints = None;
        self.place.folder = folder;
        Ok(())
    }

    /// Whether the run directory is in its place.
    pub(crate) fn is_in_place(&self) -> bool {
        self.locks.run_dir.is_in_place()
    }

    /// Whether others have removed a lock of the run's folders, its folder for checkpoints, or a file.
    pub(crate) fn is_going(&self) -> bool {
        self.locks.is_removed() || self.place.known().stands() == Stands::Nothing || self.files.is_going()
    }

    /// Whether somebody may be at work in a folder of the run: there is another lock in it.
    pub(crate) fn is_taken(&self) -> bool {
        self.locks.is_replaced()
    }

    /// Takes such locks again: what its user must know of that.
    ///
    /// # Errors
    /// [`BrokerError::LostLock`] if another process has come into such a folder meanwhile, or why one cannot be taken.
    pub(crate) fn hold_on(&mut self) -> Result<Vec<String>, BrokerError> {
        let taken = self.locks.hold_on(&self.file.run).map_err(|error| match error {
            BrokerError::InUse { path, holder } => BrokerError::LostLock { path, holder },
            other => other,
        })?;
        Ok(taken.iter().map(|lock| format!("{} was removed or replaced: it is locked again", lock.display())).collect())
    }

    /// Looks whether others have renamed, removed or replaced the folder for checkpoints in the run directory, which must be in
    /// its place. Gives what its user must know, once.
    ///
    /// # Errors
    /// [`BrokerError::Foreign`] if there is no name for another one.
    pub(crate) fn look_at_checkpoints(&mut self) -> Result<Option<String>, BrokerError> {
        let known = self.place.known();
        let stands = known.stands();
        if stands == Stands::Itself || self.locks.checkpoints.is_some() {
            self.next = None;
            return Ok(None);
        }
        let is_replaced = stands == Stands::Other;
        if self.next.as_ref().is_some_and(|next| !(is_replaced && *next == self.place.folder)) {
            return Ok(None);
        }
        let went = match known.name() {
            Some(name) => format!("it is {} now, with the checkpoints so far", name.display()),
            None => "it was renamed or removed".to_owned(),
        };
        let gone = self.place.folder.display();
        if !is_replaced {
            let told = format!(
                "{gone} is not there any more ({went}): training goes on, and the folder is made again with the next \
                 checkpoint or at the end"
            );
            self.next = Some(self.place.folder.clone());
            return Ok(Some(told));
        }
        let folder = self.spare_folder()?;
        let told = format!(
            "{gone} is not there any more ({went}), and something else is in its place, which stays as it is: checkpoints \
             go to {}",
            folder.display()
        );
        self.next = Some(folder);
        Ok(Some(told))
    }

    /// A name for a folder of checkpoints in the run directory that nothing has.
    fn spare_folder(&self) -> Result<PathBuf, BrokerError> {
        let run = &self.file.run;
        let mut spare = (1..=SPARE_FOLDERS).map(|n| self.file.dir.join(spare_name(run, n)));
        let free = spare.find(|folder| folder.symlink_metadata().is_err());
        free.ok_or_else(|| BrokerError::Foreign { path: self.place.folder.clone(), run: run.clone() })
    }

    /// Makes the folder where checkpoints go by what [`Self::look_at_checkpoints`] has found. Whether it is another one.
    ///
    /// # Errors
    /// [`BrokerError`] if it cannot be made.
    pub(crate) fn make_checkpoints(&mut self) -> Result<bool, BrokerError> {
        let Some(folder) = self.next.clone() else { return Ok(false) };
        new_folder(&folder)?;
        self.place = ShardPlace::new(self.file.run.clone(), folder)?;
        self.next = None;
        self.forget_what_is_gone()?;
        Ok(true)
    }

    fn forget_what_is_gone(&mut self) -> Result<(), BrokerError> {
        let there: Vec<u64> = checkpoints_of(&self.home())?.into_iter().map(|found| found.step).collect();
        self.file.manifests.retain(|step, _| there.contains(step));
        self.write_run_file()
    }

    fn write_run_file(&mut self) -> Result<(), BrokerError> {
        self.notices.extend(self.file.write(&mut self.files)?);
        Ok(())
    }

    /// Remembers the manifest of a new checkpoint, and forgets those that have gone.
    pub(crate) fn record(&mut self, new: Option<(u64, String)>, gone: &[u64]) -> Result<(), BrokerError> {
        self.file.manifests.extend(new);
        self.file.manifests.retain(|step, _| !gone.contains(step));
        self.write_run_file()
    }
}

impl RunDir {
    /// Makes the directory, or takes over that of an earlier placement, and writes what is known at the start. What lies
    /// after `start_step` is put aside: it is not this run's future any more.
    pub(crate) fn open(
        &self,
        start: &RunStart,
        spec: &JobSpec,
        graph: &str,
        placement: &PlacementFile,
        start_step: u64,
        mut files: WholeFiles,
    ) -> Result<OpenedRun, BrokerError> {
        make_folder(self.path())?;
        let run_lock = FolderLock::take(self.path(), &start.run)?;
        [self.trace(), self.plot(), self.report()].into_iter().for_each(|path| files.expect(path));
        // Which run it is must be readable; all else is written anew.
        let mut file = self.claim(start, spec, &mut files)?;
        let mut notices = make_room(self.files())?;
        notices.extend(self.put_metrics_of_others_aside()?);
        let (folder, lock) = self.checkpoint_folder(&file, spec, &mut notices)?;
        if lock.is_some() {
            file.checkpoints = Some(folder.clone());
        }
        // The lock is ours: nobody else puts these right at the same time.
        let home = RunHome { dir: file.dir.clone(), file: Some(file.clone()), spec: Some(spec.clone()) };
        for place in home.places().into_iter().filter(|place| place.is_dir()) {
            let mut removal = recover(&place, &file.run);
            removal.add(remove_partial(&place, &file.run));
            let not_removed = |why| format!("what an earlier start left was not removed: {why}");
            notices.extend(removal.failures.into_iter().map(not_removed).chain(removal.leftovers));
        }
        let Abandoned { aside: abandoned, unsure } = abandon(&home, start_step)?;
        if !unsure.is_empty() {
            file.unnamed_up_to = Some(start_step);
            let named: Vec<String> = unsure.iter().map(|path| path.display().to_string()).collect();
            notices.push(format!(
                "the run goes on from step {start_step}: checkpoints of later steps without a run's id may be another run's, \
                 and stay as they are ({}); they are not its future",
                named.join(", ")
            ));
        }
        if let Some((_, newest)) = abandoned.first() {
            let steps: Vec<String> = abandoned.iter().map(|(step, _)| step.to_string()).collect();
            notices.push(format!(
                "the run goes on from step {start_step}: checkpoints of later steps ({}) are kept aside, the newest as {}",
                steps.join(", "),
                newest.display()
            ));
        }
        if !abandoned.is_empty() || start_step == 0 {
            self.keep_aside(start_step)?;
        }
        file.manifests.retain(|step, _| *step <= start_step);
        notices.extend(file.write(&mut files)?);
        let (job, placed) = (to_json(&self.job(), spec)?, to_json(&self.placement(), placement)?);
        let beginning = [(self.job(), job), (self.graph(), graph.as_bytes().to_vec()), (self.placement(), placed)];
        for (path, bytes) in beginning {
            notices.extend(files.write(&path, bytes)?);
        }
        files.tidy(self.path());
        let place = ShardPlace::new(file.run.clone(), folder)?;
        let locks = RunLocks { run_dir: run_lock, checkpoints: lock };
        Ok(OpenedRun { file, spec: spec.clone(), place, notices, files, locks, next: None })
    }

    /// A file of somebody else may have the name of the metrics: it is kept. Gives what the user must know.
    fn put_metrics_of_others_aside(&self) -> Result<Option<String>, BrokerError> {
        let path = self.metrics();
        if !has_no_step(&path) {
            return Ok(None);
        }
        let aside = put_aside(&path).map_err(|e| io_error(&path, e))?;
        let (path, aside) = (path.display(), aside.display());
        Ok(Some(format!("something else was in the place of {path}: it is kept as {aside}")))
    }

    /// The directory's `run.json`, made if it is not there. The directory must be locked.
    fn claim(&self, start: &RunStart, spec: &JobSpec, files: &mut WholeFiles) -> Result<RunFile, BrokerError> {
        let dir = std::path::absolute(self.path()).map_err(|e| io_error(self.path(), e))?;
        let mut file = match RunFile::read(self.path())? {
            Some(file) if file.run == start.run || start.copy_of.contains(&file.run) => file,
            Some(file) => {
                let (holds, run) = (file.run, start.run.clone());
                return Err(BrokerError::OtherRun { path: self.path().to_owned(), holds, run });
            }
            None => RunFile {
                run: start.run.clone(),
                name: spec.name.clone(),
                dir: dir.clone(),
                copy_of: Vec::new(),
                from: start.from.clone(),
                checkpoints: None,
                unnamed_up_to: None,
                manifests: std::collections::BTreeMap::new(),
            },
        };
        if file.run != start.run {
            // A copy is a run of its own, with a folder elsewhere of its own.
            file.checkpoints = None;
            file.run = start.run.clone();
        }
        file.copy_of.clone_from(&start.copy_of);
        file.dir = dir;
        file.write(files)?;
        Ok(file)
    }

    /// Where checkpoints go: to the folder that the job names if it is this run's alone, else to one of its own in it.
    fn checkpoint_folder(
        &self,
        file: &RunFile,
        spec: &JobSpec,
        notices: &mut Vec<String>,
    ) -> Result<(PathBuf, Option<FolderLock>), BrokerError> {
        let make = make_folder;
        let Some(shared) = &spec.checkpoint.to else {
            let home = RunHome { dir: file.dir.clone(), file: Some(file.clone()), spec: None };
            // Where something else came in the place of the first one, it may be there still.
            let first = self.path().join(CHECKPOINTS);
            let is_other = first.symlink_metadata().is_ok() && !first.is_dir();
            let spare = is_other.then(|| self.path().join(spare_name(&file.run, 1)));
            let folder = home.spare_folders().pop().or(spare).unwrap_or_else(|| first.clone());
            if is_other {
                let (first, folder) = (first.display(), folder.display());
                notices.push(format!("{first} is no folder, and stays as it is: checkpoints go to {folder}"));
            }
            make(&folder)?;
            return Ok((folder, None));
        };
        make(shared)?;
        let own = file.subfolder(shared);
        let is_other = |other: PathBuf| format!("{} is not of this run", other.display());
        // A folder of others is left without a lock file, too.
        let others = match self.other_in(file, spec, shared)? {
            // Where it was before, there it stays.
            _ if own.is_dir() => String::new(),
            Some(other) => is_other(other),
            None => match FolderLock::take(shared, &file.run) {
                Ok(lock) => match self.other_in(file, spec, shared)? {
                    None => return Ok((shared.clone(), Some(lock))),
                    Some(other) => is_other(other),
                },
                Err(BrokerError::InUse { holder, .. }) => format!("it is in use by {holder}"),
                Err(error) => return Err(error),
            },
        };
        make(&own)?;
        let lock = FolderLock::take(&own, &file.run)?;
        if !others.is_empty() {
            let (shared, own) = (shared.display(), own.display());
            notices.push(format!("checkpoint.to = {shared} is used by others ({others}): checkpoints go to {own}"));
        }
        Ok((own, Some(lock)))
    }

    /// Something in the folder that is not of this run: what has a checkpoint's name, and unless the run has its
    /// checkpoints there already, anything.
    fn other_in(&self, file: &RunFile, spec: &JobSpec, folder: &Path) -> Result<Option<PathBuf>, BrokerError> {
        let home = RunHome { dir: file.dir.clone(), file: Some(file.clone()), spec: Some(spec.clone()) };
        let is_other =
            |path: &Path| home.owns(folder, path).map(|owned| owned.is_none()).map_err(|e| io_error(path, e));
        let steps: Vec<PathBuf> = steps_in(folder)?.into_iter().map(|(_, path)| path).collect();
        for path in &steps {
            if is_other(path)? {
                return Ok(Some(path.clone()));
            }
        }
        if !steps.is_empty() || file.checkpoints.as_deref() == Some(folder) {
            return Ok(None);
        }
        let entries = std::fs::read_dir(folder).map_err(|e| io_error(folder, e))?;
        let mut others: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).collect();
        others.retain(|path| !EMPTY.iter().any(|name| path.ends_with(name)) && !is_of_snapshots(path));
        others.sort();
        for path in others {
            if is_other(&path)? {
                return Ok(Some(path));
            }
        }
        Ok(None)
    }

    /// Keeps the metrics and notices after `step` in files of their own.
    fn keep_aside(&self, step: u64) -> Result<(), BrokerError> {
        let aside = |what: &str| free_name(&self.path().join(format!("{what}.after-{step}")), ".jsonl");
        copy_after(&self.metrics(), step, &aside("metrics"))?;
        let (mut kept, mut others) = (Vec::new(), Vec::new());
        each_line(&self.notices(), |line| {
            let is_later = |notice: Notice| notice.step > step;
            let is_later = serde_json::from_slice(line).is_ok_and(is_later);
            if is_later { &mut others } else { &mut kept }.extend_from_slice(line);
        })?;
        if others.is_empty() {
            return Ok(());
        }
        write_atomic(&aside("notices"), &others)?;
        write_atomic(&self.notices(), &kept)
    }
}
