//! The directory of a run that goes on under another broker process: others may have done anything to it in between.

use std::ffi::OsStr;
use std::io::ErrorKind;
use std::path::Path;

use crate::BrokerError;
use crate::core::OpenRun;
use crate::files::{io_error, put_aside};
use crate::run_dir::{FolderLock, RunDir, RunFile, is_of_run_dir};

/// Makes sure that a run may go on in its directory, and makes room for its `run.json`. Gives what its user must know.
///
/// # Errors
/// [`BrokerError::GoneOn`] if another process has gone on with it, [`BrokerError::InUse`] if one is at work there now,
/// [`BrokerError::Foreign`] if something else is in the place of the directory, or what cannot be read or renamed.
pub(super) fn make_sure(open: &OpenRun) -> Result<Vec<String>, BrokerError> {
    if RunDir::new(&open.run_dir).is_of_another(&open.placement, &open.hashes) {
        return Err(BrokerError::GoneOn);
    }
    make_room(open, "while the broker was away")
}

/// Makes room in the directory of a run that goes on, which was let go in between, for its `run.json`. Gives what its user must
/// know; `when` says in it when that was.
///
/// # Errors
/// As [`make_sure`], but for [`BrokerError::GoneOn`].
pub(super) fn make_room(open: &OpenRun, when: &str) -> Result<Vec<String>, BrokerError> {
    let (path, at) = (open.run_dir.join(RunFile::FILE), open.run_dir.display());
    match RunFile::read(&open.run_dir) {
        Ok(Some(_)) => return Ok(Vec::new()),
        Ok(None) => {}
        Err(error) if error.is_shortage() => return Err(error),
        Err(_) => {
            // Another process may be at work here, and this be its file.
            FolderLock::check(&open.run_dir)?;
            let aside = put_aside(&path).map_err(|e| io_error(&path, e))?;
            let (path, aside) = (path.display(), aside.display());
            return Ok(vec![format!("something else was in the place of {path}: it is kept as {aside}")]);
        }
    }
    match foreign_in(&open.run_dir)? {
        None => Ok(vec![format!(
            "{at} was renamed or removed {when}: training goes on, and the folder is made again; \
             checkpoints and metrics so far are where it went"
        )]),
        // Only that file is gone.
        Some(None) => Ok(Vec::new()),
        Some(Some(path)) => Err(BrokerError::Foreign { path, run: open.run.run.clone() }),
    }
}

/// Something in a folder that is not of a run directory; nothing within if all in it is, and nothing at all if there is no
/// such folder, or an empty one.
fn foreign_in(folder: &Path) -> Result<Option<Option<std::path::PathBuf>>, BrokerError> {
    let fail = |e| io_error(folder, e);
    let entries = match std::fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(fail(e)),
    };
    let mut is_empty = true;
    for entry in entries {
        let path = entry.map_err(fail)?.path();
        if !is_of_run_dir(path.file_name().unwrap_or(OsStr::new(""))) {
            return Ok(Some(Some(path)));
        }
        is_empty = false;
    }
    Ok((!is_empty).then_some(None))
}

#[cfg(unix)]
#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;
    use crate::opened_run::OpenedRun;
    use crate::run_dir::{RunStart, WholeFiles};
    use crate::store::PlacedWork;
    use crate::testing;

    /// A run that was at work in a directory, which has a checkpoint and metrics.
    fn at_work(run_dir: &Path) -> OpenRun {
        let open = testing::open_run(run_dir);
        drop(opened(&open).unwrap());
        let metrics = RunDir::new(run_dir).metrics();
        let mut lines = crate::metrics::MetricsWriter::open(&metrics, 0).unwrap();
        for step in 1..=3 {
            lines.append(&metrics, &testing::metrics(step, 2.0)).unwrap();
        }
        OpenRun { start_step: 3, takes_back: true, ..open }
    }

    fn opened(open: &OpenRun) -> Result<OpenedRun, BrokerError> {
        RunDir::new(&open.run_dir).open(
            &open.run,
            &open.spec,
            &open.graph,
            &open.placement,
            open.start_step,
            WholeFiles::default(),
        )
    }

    /// What the user is told when it goes on.
    fn told(open: &OpenRun) -> Result<Vec<String>, BrokerError> {
        let mut texts = make_sure(open)?;
        let mut run = opened(open)?;
        assert_eq!(run.file.run, open.run.run);
        assert!(run.place.folder.is_dir());
        crate::metrics::MetricsWriter::open(&RunDir::new(&open.run_dir).metrics(), open.start_step)?;
        texts.append(&mut run.notices);
        Ok(texts)
    }

    /// Runs a shell command in the run directory, and tells what follows from it.
    fn after(command: &str) -> (Vec<String>, tempfile::TempDir) {
        let folder = tempfile::tempdir().unwrap();
        let run_dir = folder.path().join("run");
        let open = at_work(&run_dir);
        assert!(Command::new("sh").args(["-c", command]).current_dir(&run_dir).status().unwrap().success());
        let told = told(&open).unwrap();
        assert_eq!(make_sure(&open).unwrap(), Vec::<String>::new(), "once");
        (told, folder)
    }

    #[test]
    fn a_run_goes_on_whatever_others_did_to_its_directory() {
        for silent in ["true", "rm -rf checkpoints", "rm -f metrics.jsonl notices.jsonl", "rm *.json", "echo x > mine"]
        {
            assert_eq!(after(silent).0, Vec::<String>::new(), "{silent}");
        }
        for gone in ["cd .. && mv run moved", "cd .. && rm -rf run", "cd .. && mv run moved && mkdir run"] {
            let (told, _folder) = after(gone);
            assert!(
                told.len() == 1 && told[0].contains("run was renamed or removed while the broker was away"),
                "{told:?}"
            );
        }
        for (replaced, name) in [
            ("rm metrics.jsonl; mkfifo metrics.jsonl", "metrics.jsonl"),
            ("rm metrics.jsonl; mkdir metrics.jsonl", "metrics.jsonl"),
            ("rm metrics.jsonl; ln -s nowhere metrics.jsonl", "metrics.jsonl"),
            ("echo mine > metrics.jsonl", "metrics.jsonl"),
            ("rm -f notices.jsonl; mkfifo notices.jsonl", "notices.jsonl"),
            ("echo mine > run.json", "run.json"),
            ("rm run.json; mkdir run.json", "run.json"),
        ] {
            let (told, folder) = after(replaced);
            assert!(told.len() == 1 && told[0].ends_with(&format!("{name}.other")), "{replaced}: {told:?}");
            let other = folder.path().join("run").join(format!("{name}.other"));
            assert!(other.symlink_metadata().is_ok(), "{replaced}");
            let is_kept = |text: String| text == "mine\n";
            assert!(!replaced.starts_with("echo") || std::fs::read_to_string(other).is_ok_and(is_kept));
        }
        let (told, folder) = after("rmdir checkpoints; echo mine > checkpoints");
        assert!(told.len() == 1 && told[0].contains("is no folder, and stays as it is: checkpoints go to"), "{told:?}");
        assert_eq!(std::fs::read(folder.path().join("run/checkpoints")).unwrap(), b"mine\n");
    }

    /// As where somebody puts a copy back, or a crash came before the newest one was written.
    #[test]
    fn an_earlier_placement_of_the_job_is_no_other_process() {
        let folder = tempfile::tempdir().unwrap();
        let run_dir = folder.path().join("run");
        let open = at_work(&run_dir);
        let dir = RunDir::new(&run_dir);
        let earlier = std::fs::read(dir.placement()).unwrap();
        let first = PlacedWork {
            hashes: PlacedWork::hashes_with(None, &open.placement),
            placement: open.placement,
            graph: open.graph.clone(),
            carried: Default::default(),
            run: open.run.clone(),
        };
        let placement = testing::placed(&open.spec, 2).0;
        let hashes = PlacedWork::hashes_with(Some(&first), &placement);
        let open = OpenRun { placement, hashes, ..open };
        assert_eq!(make_sure(&open).unwrap(), Vec::<String>::new());
        opened(&open).unwrap();
        assert_eq!(make_sure(&open).unwrap(), Vec::<String>::new());
        std::fs::write(dir.placement(), &earlier).unwrap();
        assert_eq!(make_sure(&open).unwrap(), Vec::<String>::new());
        // One that the job never had.
        std::fs::write(dir.placement(), [earlier, b"\n".to_vec()].concat()).unwrap();
        assert!(matches!(make_sure(&open), Err(BrokerError::GoneOn)));
    }

    /// Nothing is written without the lock.
    #[test]
    fn what_another_process_is_writing_is_not_renamed() {
        let folder = tempfile::tempdir().unwrap();
        let run_dir = folder.path().join("run");
        let open = at_work(&run_dir);
        let lock = FolderLock::take(&run_dir, &RunStart::new().run).unwrap();
        std::fs::write(run_dir.join(RunFile::FILE), "theirs").unwrap();
        assert!(matches!(make_sure(&open), Err(BrokerError::InUse { .. })));
        assert_eq!(std::fs::read(run_dir.join(RunFile::FILE)).unwrap(), b"theirs");
        drop(lock);
        assert_eq!(make_sure(&open).unwrap().len(), 1);
    }

    /// Between two placements nobody holds the directory.
    #[test]
    fn a_run_that_goes_on_by_itself_keeps_out_of_a_folder_of_others() {
        let folder = tempfile::tempdir().unwrap();
        let run_dir = folder.path().join("run");
        let open = at_work(&run_dir);
        assert_eq!(make_room(&open, "meanwhile").unwrap(), Vec::<String>::new());
        std::fs::rename(&run_dir, folder.path().join("moved")).unwrap();
        let told = make_room(&open, "meanwhile").unwrap();
        assert!(told[0].contains("run was renamed or removed meanwhile: training goes on"), "{told:?}");
        std::fs::create_dir(&run_dir).unwrap();
        std::fs::write(run_dir.join("mine.txt"), "mine").unwrap();
        let error = make_room(&open, "meanwhile").unwrap_err().to_string();
        assert!(error.contains("mine.txt is in the way"), "{error}");
        #[cfg(unix)]
        {
            std::fs::rename(&run_dir, folder.path().join("theirs")).unwrap();
            std::os::unix::fs::symlink("theirs", &run_dir).unwrap();
            let error = make_room(&open, "meanwhile").unwrap_err().to_string();
            assert!(error.contains("mine.txt is in the way"), "{error}");
        }
    }

    #[test]
    fn what_is_not_of_the_run_stays_as_it_is_and_a_run_that_has_gone_on_is_not_taken_back() {
        let folder = tempfile::tempdir().unwrap();
        let run_dir = folder.path().join("run");
        let open = at_work(&run_dir);
        let other = testing::placed(&open.spec, 2).0;
        let dir = RunDir::new(&run_dir);
        std::fs::write(dir.placement(), serde_json::to_vec(&other).unwrap()).unwrap();
        assert!(matches!(told(&open), Err(BrokerError::GoneOn)));
        std::fs::rename(&run_dir, folder.path().join("moved")).unwrap();
        std::fs::create_dir(&run_dir).unwrap();
        std::fs::write(run_dir.join("thesis.tex"), "mine").unwrap();
        let error = told(&open).unwrap_err().to_string();
        assert!(error.contains("thesis.tex is in the way"), "{error}");
        assert_eq!(std::fs::read_dir(&run_dir).unwrap().count(), 1);
        std::fs::remove_file(run_dir.join("thesis.tex")).unwrap();
        assert_eq!(told(&open).unwrap().len(), 1);
    }
}
