//! What others do to the folders and files of a run while it trains, and how that is put right.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use fusionllm_transport::{KnownFolder, Stands, io_reason};

use super::RunFiles;
use crate::BrokerError;
use crate::checkpoint::{Found, MANIFEST, checkpoints_of};
use crate::core::CoreEvent;
use crate::files::{FileKey, free_name, io_error};
use crate::run_dir::RunHome;

/// Longer nobody takes to remove a run directory.
const REMOVING: Duration = Duration::from_secs(1);
/// What the name of a file has that is kept beside what others have put in its place.
const KEPT: &str = ".kept";

/// The newest checkpoint of a run: whether it is still there can be told without reading it.
pub(super) struct NewestCheckpoint {
    step: u64,
    manifest: PathBuf,
    key: Option<FileKey>,
}

impl NewestCheckpoint {
    pub(super) fn new(step: u64, folder: &Path) -> Self {
        let manifest = folder.join(MANIFEST);
        Self { step, key: FileKey::of(&manifest), manifest }
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
        let texts = match self.opened.missing() {
            Some(_) if self.is_away => Vec::new(),
            Some(folder) => {
                let told = gone(folder);
                self.is_away = true;
                vec![told]
            }
            None => {
                self.is_away = false;
                if self.may_be_going(removing) {
                    return Vec::new();
                }
                self.look_into()
            }
        };
        let changed = self.look_at_newest();
        let texts = match &changed {
            Some((why, _)) if texts.is_empty() => vec![why.clone()],
            _ => texts,
        };
        let mut events = self.noticed(texts);
        let key = self.key;
        events.extend(changed.map(|(_, left)| CoreEvent::CheckpointsGone { key, left }));
        events
    }

    /// Has the next look try again what could not be done.
    pub(super) fn try_again(&mut self) {
        self.is_unlocked = false;
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
    fn look_into(&mut self) -> Vec<String> {
        let mut texts = Vec::new();
        if !self.is_unlocked {
            let held = self.opened.hold_on();
            self.is_unlocked = held.is_err();
            texts.extend(held.unwrap_or_else(|error| vec![error.to_string()]));
        }
        let told = self.opened.look_at_checkpoints();
        texts.extend(told.unwrap_or_else(|error| Some(error.to_string())));
        texts.extend(self.look_at_files());
        texts
    }

    fn look_at_files(&mut self) -> Vec<String> {
        let (metrics, notices) = (self.dir.metrics(), self.dir.notices());
        let told = [self.metrics.lines().look(&metrics), self.notices.lines().and_then(|lines| lines.look(&notices))];
        told.into_iter().flatten().collect()
    }

    /// If the newest checkpoint is not there any more: what its user must know, and the newest that is left.
    fn look_at_newest(&mut self) -> Option<(String, Option<u64>)> {
        let newest = self.newest.as_ref()?;
        if FileKey::of(&newest.manifest) == newest.key {
            return None;
        }
        let found = checkpoints_of(&self.opened.home()).ok()?;
        let step = newest.step;
        let gone = newest.manifest.parent().unwrap_or(&newest.manifest).display().to_string();
        self.newest = found.first().map(|found| NewestCheckpoint::new(found.step, &found.path));
        let left = self.newest.as_ref().map(|newest| newest.step);
        if left == Some(step) {
            return None;
        }
        let newest = match left {
            Some(left) => format!("the newest one is that of step {left}"),
            None => "there is no other one yet".to_owned(),
        };
        Some((format!("{gone} is not there any more: training goes on, and {newest}"), left))
    }

    /// Makes the folders of the run again if they were renamed or removed, with all that is still known.
    ///
    /// # Errors
    /// [`BrokerError`] if something else is there by now, or they cannot be made.
    pub(in crate::server) fn come_back(&mut self) -> Result<(), BrokerError> {
        if self.opened.missing().is_none() {
            self.is_away = false;
            if self.opened.make_checkpoints()? {
                self.say_where();
            }
            return Ok(());
        }
        self.is_away = true;
        self.opened.make_again()?;
        self.say_where();
        if let Some(data) = &self.data {
            self.dir.write_json(&self.dir.data(), data)?;
        }
        if let Some(trace) = &self.trace {
            self.dir.write_json(&self.dir.trace(), trace)?;
        }
        self.metrics.move_to(&self.dir.metrics())?;
        self.notices.write_again().map_err(|e| io_error(&self.dir.notices(), e))?;
        self.is_away = false;
        Ok(())
    }

    /// Puts right at the end what can be: where the steps are in the end, and what the user must know. The run directory must
    /// be in its place.
    pub(in crate::server) fn last_look(&mut self) -> (PathBuf, Vec<String>) {
        self.try_again();
        let mut texts = self.look_at_files();
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
            match self.make_room(&path) {
                Ok(said) => texts.extend(said),
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
             unless that is empty it stays as it is, and until it is moved away there is no checkpoint; checkpoints so far \
             are {went}"
        ),
        _ => format!(
            "{path} is not there any more, it was renamed or removed: training goes on, and the folder is made again with \
             the next checkpoint or at the end, with the metrics and notices so far; checkpoints so far are {went}"
        ),
    }
}
