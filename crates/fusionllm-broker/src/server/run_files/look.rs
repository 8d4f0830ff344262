//! What others do to the folders and files of a run while it trains, and how that is put right.

use std::io::ErrorKind::{NotADirectory, NotFound};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use fusionllm_protocol::Notice;
use fusionllm_transport::{KnownFolder, Stands, io_reason};

use super::RunFiles;
use crate::BrokerError;
use crate::checkpoint::{Found, MANIFEST, checkpoints_of, remove_partial};
use crate::core::{CoreEvent, FailedBy};
use crate::files::{FileKey, free_name, io_error};
use crate::run_dir::{RunDir, RunHome};

/// Longer nobody takes to remove a run directory.
const REMOVING: Duration = Duration::from_secs(1);
/// So often the files are looked at that are written as a whole.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// What the name of a file has that is kept beside what others have put in its place.
const KEPT: &str = ".kept";

/// The newest checkpoint of a run: whether it is still there can be told without reading it.
pub(super) struct NewestCheckpoint {
    step: u64,
    manifest: PathBuf,
    key: Option<FileKey>,
    /// Its folder, which may be renamed.
    folder: Option<KnownFolder>,
}

impl NewestCheckpoint {
    pub(super) fn new(step: u64, folder: &Path) -> Self {
        let manifest = folder.join(MANIFEST);
        Self { step, key: FileKey::of(&manifest), manifest, folder: KnownFolder::open(folder).ok() }
    }

    pub(super) fn step(&self) -> u64 {
        self.step
    }

    /// The name that its folder has by now, if that is another one and can be told.
    fn went(&self) -> Option<PathBuf> {
        let folder = self.folder.as_ref()?;
        folder.name().filter(|name| name != folder.path())
    }

    /// That of a run directory, if it has one.
    pub(super) fn of(home: &RunHome) -> Option<Self> {
        let found = checkpoints_of(home).ok()?.into_iter().next();
        found.map(|Found { step, path, .. }| Self::new(step, &path))
    }
}

impl RunFiles {
    /// Looks whether the folders and files of the run are where they were: others may rename, remove or replace them while
    /// it trains. Files are written again at once. What is written to a folder meanwhile goes where that went, and comes
    /// back with [`Self::come_back`].
    pub(super) fn look(&mut self) -> Vec<CoreEvent> {
        self.look_after(REMOVING)
    }

    /// The same before a checkpoint, which waits for nobody.
    pub(in crate::server) fn look_now(&mut self) -> Vec<CoreEvent> {
        self.look_after(Duration::ZERO)
    }

    fn look_after(&mut self, removing: Duration) -> Vec<CoreEvent> {
        if self.lost.is_some() {
            return Vec::new();
        }
        let texts = match self.opened.missing() {
            Some(_) if self.is_away => Vec::new(),
            Some(folder) => {
                let told = gone(folder);
                self.is_away = true;
                vec![told]
            }
            None => {
                self.is_away = false;
                if !self.opened.is_taken() && self.may_be_going(removing) {
                    return Vec::new();
                }
                self.look_into(removing)
            }
        };
        let mut events = self.noticed(texts.iter().cloned());
        let key = self.key;
        if let Some(reason) = self.lost.clone() {
            self.open_runs.set(key, None);
            events.push(CoreEvent::RunFailed { key, reason, by: FailedBy::Machine });
            return events;
        }
        if let Some((why, left, went)) = self.look_at_newest() {
            if texts.is_empty() {
                events.extend(self.noticed([why]));
            }
            events.push(CoreEvent::CheckpointsGone { key, left, went });
        }
        events
    }

    /// Has the next look try again what could not be done.
    pub(in crate::server) fn try_again(&mut self) {
        self.is_unlocked = false;
        self.opened.files.try_again();
        self.metrics.lines().try_again();
        self.notices.lines().into_iter().for_each(|lines| lines.try_again());
    }

    /// Whether somebody may be about to remove the whole folder, of which some is gone: nothing is made in it meanwhile.
    fn may_be_going(&mut self, removing: Duration) -> bool {
        if !self.opened.is_going() {
            self.let_go_since = None;
            return false;
        }
        self.let_go_since.get_or_insert_with(Instant::now).elapsed() < removing
    }

    /// The same for what is in the run directory, which is in its place.
    fn look_into(&mut self, removing: Duration) -> Vec<String> {
        let mut texts = Vec::new();
        // Where it cannot be taken, another process may come and take it.
        if !self.is_unlocked || self.opened.is_taken() {
            match self.opened.hold_on() {
                Ok(told) => {
                    self.is_unlocked = false;
                    texts.extend(told);
                }
                Err(error @ BrokerError::LostLock { .. }) => {
                    self.lost = Some(error.to_string());
                    return texts;
                }
                // It is told once.
                Err(_) if self.is_unlocked => {}
                Err(error) => {
                    self.is_unlocked = true;
                    texts.push(error.to_string());
                }
            }
        }
        let told = self.opened.look_at_checkpoints();
        texts.extend(told.unwrap_or_else(|error| Some(error.to_string())));
        texts.extend(self.look_at_files());
        if removing.is_zero() || self.looked.is_none_or(|looked| looked.elapsed() > LOOK_EVERY) {
            self.looked = Some(Instant::now());
            texts.extend(self.opened.files.look());
        }
        texts
    }

    fn look_at_files(&mut self) -> Vec<String> {
        let (metrics, notices) = (self.dir.metrics(), self.dir.notices());
        let told = [self.metrics.lines().look(&metrics), self.notices.lines().and_then(|lines| lines.look(&notices))];
        told.into_iter().flatten().collect()
    }

    /// If the newest checkpoint is not there any more, or cannot be read: what its user must know, the newest that is left, and
    /// where the other is now.
    fn look_at_newest(&mut self) -> Option<(String, Option<u64>, Option<PathBuf>)> {
        let newest = self.newest.as_ref()?;
        let found = newest.manifest.symlink_metadata();
        if found.is_ok() && FileKey::of(&newest.manifest) == newest.key {
            return None;
        }
        let others = checkpoints_of(&self.opened.home()).ok()?;
        let step = newest.step;
        let folder = newest.manifest.parent().unwrap_or(&newest.manifest);
        let (gone, went) = (folder.display().to_string(), newest.went());
        let became = match found {
            Err(error) if !matches!(error.kind(), NotFound | NotADirectory) => format!("cannot be read ({error})"),
            _ => went.as_ref().map_or_else(
                || "is not there any more".to_owned(),
                |went| format!("is not there any more, it is {} now", went.display()),
            ),
        };
        self.newest = others.first().map(|found| NewestCheckpoint::new(found.step, &found.path));
        let left = self.newest.as_ref().map(|newest| newest.step);
        if left == Some(step) {
            return None;
        }
        let newest = match left {
            Some(left) => format!("the newest one is that of step {left}"),
            None => "there is no other one yet".to_owned(),
        };
        Some((format!("{gone} {became}: training goes on, and {newest}"), left, went))
    }

    /// Makes the folders of the run again if they were renamed or removed, with all that is still known; for the last
    /// checkpoint another one if something else is in the way.
    ///
    /// # Errors
    /// [`BrokerError`] if something else is there by now, or they cannot be made.
    pub(in crate::server) fn come_back(&mut self, is_last: bool) -> Result<(), BrokerError> {
        if self.opened.missing().is_none() {
            self.is_away = false;
            if self.opened.make_checkpoints()? {
                self.say_where();
            }
            return Ok(());
        }
        self.is_away = true;
        self.opened.make_again(is_last)?;
        self.dir = RunDir::new(&self.opened.file.dir);
        self.say_where();
        self.metrics.move_to(&self.dir.metrics())?;
        self.notices.move_to(self.dir.notices()).map_err(|e| io_error(&self.dir.notices(), e))?;
        self.is_away = false;
        Ok(())
    }

    /// The last look at the folders, when the job has ended; they are made again if they are gone. Gives what the user must
    /// know.
    pub(in crate::server) fn look_last(&mut self) -> Vec<String> {
        self.try_again();
        let told = |event: CoreEvent| match event {
            CoreEvent::Noticed { text, .. } => Some(text),
            _ => None,
        };
        let mut texts: Vec<String> = self.look_now().into_iter().filter_map(told).collect();
        if self.is_lost() {
            return texts;
        }
        // A folder elsewhere is not needed any more, but the run directory is to have its report.
        if let Err(error) = self.come_back(!self.opened.is_in_place()) {
            self.is_away = !self.opened.is_in_place();
            texts.push(error.to_string());
        }
        texts.append(&mut self.opened.notices);
        texts
    }

    /// Tells what is seen at the end, when nobody follows the job any more, and what of unfinished checkpoints is left.
    pub(in crate::server) fn tell_last(&mut self, step: u64, texts: Vec<String>) {
        for text in &texts {
            tracing::warn!(text, "notice");
        }
        if self.is_lost() {
            return;
        }
        let removal = remove_partial(&self.opened.place.folder, &self.opened.file.run);
        for why in removal.failures {
            tracing::warn!(why, "an unfinished checkpoint was not removed");
        }
        for text in texts.into_iter().chain(removal.leftovers) {
            // The report matters more than why it cannot be written.
            let _ = self.notices.append(&Notice { step, text });
        }
        if let Err(error) = self.notices.flush() {
            let error = io_reason(&error);
            tracing::error!(%error, path = %self.dir.notices().display(), "the last notices are not written");
        }
    }

    /// Puts right at the end what can be: where the steps are in the end, and what the user must know. The run directory must
    /// be in its place.
    pub(in crate::server) fn last_look(&mut self) -> (PathBuf, Vec<String>) {
        self.try_again();
        let mut texts = self.look_at_files();
        texts.extend(self.opened.files.look());
        let mut place = self.dir.metrics();
        if !self.metrics.lines().is_at(&place) {
            let kept = free_name(&place, KEPT);
            match self.metrics.move_to(&kept) {
                Ok(()) => {
                    texts.push(format!(
                        "{} is not written again: its lines are in {}",
                        place.display(),
                        kept.display()
                    ));
                    place = kept;
                }
                Err(error) => texts.push(error.to_string()),
            }
        }
        if let Err(error) = self.metrics.flush() {
            texts.push(format!("{}: {}: the last steps are not in it", place.display(), io_reason(&error)));
        }
        for path in [self.dir.plot(), self.dir.report()] {
            match self.opened.files.make_room(&path) {
                Ok(told) => texts.extend(told),
                Err(error) => texts.push(error.to_string()),
            }
        }
        (place, texts)
    }
}

/// What is told of a locked folder that is not where it was.
fn gone(folder: &KnownFolder) -> String {
    let (path, name) = (folder.path().display(), folder.name());
    let went = name.map_or_else(|| "where it went".to_owned(), |name| format!("in {}", name.display()));
    match folder.stands() {
        Stands::Other => format!(
            "{path} is not there any more, it was renamed or removed, and something else is in its place: training goes on; \
             unless that is empty it stays as it is, and until it is moved away there is no checkpoint but the last one; \
             checkpoints so far are {went}"
        ),
        _ => format!(
            "{path} is not there any more, it was renamed or removed: training goes on, and the folder is made again with \
             the next checkpoint or at the end, with the metrics and notices so far; checkpoints so far are {went}"
        ),
    }
}
