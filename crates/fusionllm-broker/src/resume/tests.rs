//! Tests of how a run goes on.

use std::path::Path;

use super::*;
use crate::checkpoint::Course;
use crate::opened_run::OpenedRun;
use crate::run_dir::{FolderLock, PlacementFile, RunDir, WholeFiles};
use crate::testing::{self, OldRuns};
use crate::{Checkpoint as Opened, open_checkpoint};

/// Opens a run directory as a placement does that goes on after `step`.
fn open(dir: &Path, start: &RunStart, spec: &JobSpec, step: u64) -> Result<OpenedRun, BrokerError> {
    let runs = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/runs-v1/run");
    let placement: PlacementFile =
        serde_json::from_slice(&std::fs::read(runs.join("placement.json")).unwrap()).unwrap();
    RunDir::new(dir).open(start, spec, "{}", &placement, step, WholeFiles::default())
}

/// A checkpoint of an open run: that of an old run under its id.
fn save(run: &OpenedRun, old: &Opened, step: u64) {
    let folder = run.place.folder.join(step_name(step));
    std::fs::create_dir(&folder).unwrap();
    for file in std::fs::read_dir(old.path()).unwrap().flatten() {
        std::fs::copy(file.path(), folder.join(file.file_name())).unwrap();
    }
    let mut manifest = old.manifest().clone();
    (manifest.version, manifest.step) = (fusionllm_protocol::Manifest::VERSION, step);
    (manifest.run, manifest.run_dir) = (Some(run.place.run.clone()), Some(run.file.dir.clone()));
    std::fs::write(folder.join("manifest.json"), manifest.seal().unwrap()).unwrap();
    std::fs::write(folder.join("run.id"), run.place.run.as_str()).unwrap();
}

fn step(path: &Path, step: Option<u64>, out: Option<&Path>) -> (u64, PathBuf) {
    let found = find_resumption(path, step, out).unwrap();
    (found.checkpoint().manifest().step, found.run_dir)
}

fn refusal(path: &Path, out: Option<&Path>) -> String {
    let error = find_resumption(path, None, out).unwrap_err();
    assert!(error.is_bad_input());
    error.to_string()
}

#[test]
fn runs_of_the_first_version_go_on() {
    let old = OldRuns::new();
    let (run, elsewhere, volume) = (old.path("run"), old.path("elsewhere"), old.path("volume"));
    assert_eq!(step(&run, None, None), (4, run.clone()));
    assert_eq!(step(&run.join("checkpoints/step-2"), None, None), (2, run.clone()));
    assert_eq!(step(&elsewhere, None, None), (4, elsewhere.clone()));
    assert_eq!(step(&elsewhere, Some(2), None), (2, elsewhere.clone()));
    assert_eq!(open_checkpoint(&volume).unwrap().manifest().job.name, "other");
    // It does not say whose it is, and the folder above it is nobody's run directory.
    assert!(refusal(&volume.join("step-4"), None).contains("say by --out DIR"));
    assert_eq!(step(&volume.join("step-4"), None, Some(&old.path("new"))).1, old.path("new"));
    // Another run's in the same folder is not taken for its own.
    let manifest = std::fs::read_to_string(volume.join("step-2/manifest.json")).unwrap();
    std::fs::rename(volume.join("step-2"), volume.join("step-9")).unwrap();
    let manifest = manifest.replace("\"seed\": 2", "\"seed\": 3").replace("\"step\": 2", "\"step\": 9");
    std::fs::write(volume.join("step-9/manifest.json"), manifest).unwrap();
    assert_eq!(step(&elsewhere, None, None).0, 4);
    assert!(open_checkpoint(&volume).unwrap_err().to_string().contains("several runs"));
}

#[test]
fn a_run_of_the_first_version_has_an_id_once_it_goes_on() {
    let old = OldRuns::new();
    let found = find_resumption(&old.path("run"), Some(2), None).unwrap();
    let spec = found.checkpoint().manifest().job.clone();
    let opened = open(&found.run_dir, &found.start, &spec, 2).unwrap();
    assert_eq!(opened.place.run, found.start.run);
    drop(opened);
    let checkpoints = old.path("run/checkpoints");
    assert!(checkpoints.join("step-4.abandoned/manifest.json").is_file());
    let again = find_resumption(&old.path("run"), None, None).unwrap();
    assert_eq!((again.start.run, again.checkpoint.manifest().step), (found.start.run, 2));
    assert_eq!(std::fs::read_to_string(old.path("run/metrics.after-2.jsonl")).unwrap().lines().count(), 2);
}

#[test]
fn the_directory_is_that_of_the_run_wherever_its_checkpoints_lie() {
    let old = OldRuns::new();
    let from = open_checkpoint(&old.path("run")).unwrap();
    let (dir, to) = (old.path("runs/a"), old.path("shared"));
    let spec = JobSpec {
        checkpoint: fusionllm_protocol::CheckpointSpec { to: Some(to.clone()), ..Default::default() },
        ..from.manifest().job.clone()
    };
    let start = RunStart::new();
    let first = open(&dir, &start, &spec, 0).unwrap();
    assert_eq!(first.place.folder, to, "the folder is its own so far");
    assert!(matches!(open(&dir, &start, &spec, 0), Err(BrokerError::InUse { .. })));

    // A second run, at the same time and later.
    let second = open(&old.path("runs/b"), &RunStart::new(), &spec, 0).unwrap();
    let own = second.place.folder.clone();
    assert_eq!(own, second.file.subfolder(&to));
    assert!(second.notices[0].contains("in use by run"), "{:?}", second.notices);
    save(&first, &from, 3);
    save(&second, &from, 7);
    drop((first, second));
    let third = open(&old.path("runs/c"), &RunStart::new(), &spec, 0).unwrap();
    assert!(third.notices[0].contains("step-3 is not of this run"), "{:?}", third.notices);
    drop(third);

    assert_eq!(step(&dir, None, None), (3, dir.clone()));
    assert_eq!(step(&to.join("step-3"), None, None), (3, dir.clone()));
    assert_eq!(step(&own.join("step-7"), None, None), (7, old.path("runs/b")));
    assert!(refusal(&to, None).contains("several runs"));
    // It goes on in the same folder.
    let again = open(&dir, &start, &spec, 3).unwrap();
    assert_eq!((&again.place.folder, &again.notices), (&to, &Vec::new()));
    let pruned = crate::checkpoint::prune(&again.home(), 1, Course { vouched: 3, ..Course::default() });
    assert_eq!(pruned, Default::default());
    drop(again);
    let other = RunStart::new();
    assert!(matches!(open(&dir, &other, &spec, 0), Err(BrokerError::OtherRun { .. })));
    std::fs::remove_dir_all(&dir).unwrap();
    assert!(refusal(&to.join("step-3"), None).contains("is not in"), "its directory is gone");
}

#[test]
fn a_moved_directory_stays_the_run_and_a_copied_one_does_not() {
    let old = OldRuns::new();
    let from = open_checkpoint(&old.path("run")).unwrap();
    let spec = from.manifest().job.clone();
    let (start, a, b) = (RunStart::new(), old.path("a"), old.path("b"));
    save(&open(&a, &start, &spec, 0).unwrap(), &from, 3);
    std::fs::rename(&a, &b).unwrap();
    let moved = find_resumption(&b, None, None).unwrap();
    assert_eq!((&moved.start.run, &moved.run_dir), (&start.run, &b));
    drop(open(&b, &moved.start, &spec, 3).unwrap());
    let status = std::process::Command::new("cp").arg("-r").args([&b, &a]).status().unwrap();
    assert!(status.success());
    let copied = find_resumption(&a, None, None).unwrap();
    assert_eq!((copied.start.copy_of.clone(), copied.run_dir.clone()), (vec![start.run.clone()], a.clone()));
    assert!(copied.start.notices[0].contains("is a copy of"), "{:?}", copied.start.notices);
    let opened = open(&a, &copied.start, &spec, 3).unwrap();
    assert_eq!(open_newest(&opened.home(), None).unwrap().checkpoint.path(), a.join("checkpoints/step-3"));
    assert_eq!(find_resumption(&b, None, None).unwrap().start.run, start.run);
}

#[test]
fn a_directory_without_its_run_file_keeps_its_checkpoints() {
    let old = OldRuns::new();
    let from = open_checkpoint(&old.path("run")).unwrap();
    let spec = from.manifest().job.clone();
    let (start, dir) = (RunStart::new(), old.path("a"));
    let opened = open(&dir, &start, &spec, 0).unwrap();
    save(&opened, &from, 3);
    save(&opened, &from, 5);
    drop(opened);
    std::fs::remove_file(dir.join("run.json")).unwrap();
    let found = find_resumption(&dir, Some(3), None).unwrap();
    let said = found.start.notices.join("\n");
    assert!(said.contains("has no run.json") && said.contains("as a run of its own"), "{said}");
    let opened = open(&dir, &found.start, &spec, 3).unwrap();
    assert!(dir.join("checkpoints/step-5.abandoned").is_dir());
    assert_eq!(open_newest(&opened.home(), None).unwrap().checkpoint.manifest().step, 3);
}

/// A folder that is the place of other things, such as that of all run directories, gets no checkpoints among them.
#[test]
fn checkpoints_have_a_folder_of_their_own_among_other_things() {
    let old = OldRuns::new();
    let from = open_checkpoint(&old.path("run")).unwrap();
    let runs = old.path("runs");
    let mut spec = from.manifest().job.clone();
    spec.checkpoint.to = Some(runs.clone());
    let start = RunStart::new();
    let opened = open(&runs.join("a"), &start, &spec, 0).unwrap();
    let own = opened.file.subfolder(&runs);
    assert_eq!(opened.place.folder, own);
    let said = &opened.notices[0];
    assert!(said.contains("a is not of this run") && said.contains(&own.display().to_string()), "{said}");
    save(&opened, &from, 3);
    drop(opened);
    let mut names: Vec<_> = std::fs::read_dir(&runs).unwrap().map(|entry| entry.unwrap().path()).collect();
    names.sort();
    assert_eq!(names, [runs.join("a"), own], "not even a lock");
    assert_eq!(step(&runs.join("a"), None, None).0, 3);
    // Its own directory is no better, and a new disk is not one that others use.
    spec.checkpoint.to = Some(runs.join("b"));
    let opened = open(&runs.join("b"), &RunStart::new(), &spec, 0).unwrap();
    assert_eq!(opened.place.folder, opened.file.subfolder(&runs.join("b")));
    let disk = old.path("disk");
    std::fs::create_dir_all(disk.join("lost+found")).unwrap();
    spec.checkpoint.to = Some(disk.clone());
    let opened = open(&runs.join("c"), &RunStart::new(), &spec, 0).unwrap();
    assert_eq!((&opened.place.folder, &opened.notices), (&disk, &Vec::new()));
}

/// Two runs of one job by version 0.1.0, in one folder, cannot be told apart: neither renames what may be the other's.
#[test]
fn what_may_be_another_runs_is_not_abandoned() {
    let old = OldRuns::new();
    let (dir, volume) = (old.path("elsewhere"), old.path("volume"));
    let found = find_resumption(&dir, Some(2), None).unwrap();
    let spec = found.checkpoint().manifest().job.clone();
    let opened = open(&dir, &found.start, &spec, 2).unwrap();
    assert!(volume.join("step-4/manifest.json").is_file(), "{:?}", std::fs::read_dir(&volume));
    assert!(opened.notices.iter().any(|n| n.contains("may be another run's") && n.contains("step-4")), "{opened:?}");
    drop(opened);
    // It is not this run's future all the same.
    assert_eq!(step(&dir, None, None).0, 2);
    let error = find_resumption(&dir, Some(4), None).unwrap_err().to_string();
    assert!(error.contains("no checkpoint of step 4, expected one of step-2"), "{error}");
}

#[test]
fn an_edited_job_file_is_not_ignored_without_a_word() {
    let old = OldRuns::new();
    let dir = old.path("run");
    let notices = || find_resumption(&dir, None, None).unwrap().start.notices;
    assert_eq!(notices(), [""; 0]);
    let text = std::fs::read_to_string(dir.join("job.json")).unwrap();
    let edited = text.replace("\"lr\": 0.001", "\"lr\": 0.1").replace("\"warmup\": 1", "\"warmup\": 0");
    std::fs::write(dir.join("job.json"), edited).unwrap();
    let said = notices().join("\n");
    assert!(
        said.contains("job.json has another train.lr, train.warmup than the job in the checkpoint of step 4"),
        "{said}"
    );
    assert!(said.contains("--set changes keys"), "{said}");
    // Of this version the directory is known by run.json.
    std::fs::write(dir.join("job.json"), &text).unwrap();
    let found = find_resumption(&dir, None, None).unwrap();
    let spec = found.checkpoint().manifest().job.clone();
    drop(open(&dir, &found.start, &spec, 4).unwrap());
    std::fs::write(dir.join("job.json"), "{").unwrap();
    let said = notices().join("\n");
    assert!(said.contains("job.json") && said.contains("passed over"), "{said}");
    // Neither is a damaged run.json, which says what to do.
    let run_json = std::fs::read(dir.join("run.json")).unwrap();
    std::fs::write(dir.join("run.json"), &run_json[..run_json.len() / 2]).unwrap();
    let error = find_resumption(&dir, None, None).unwrap_err();
    assert!(error.is_bad_input() && error.to_string().contains("run.json is damaged"), "{error}");
    assert!(error.to_string().contains("move it away"), "{error}");
    std::fs::remove_file(dir.join("run.json")).unwrap();
    std::fs::write(dir.join("job.json"), &text).unwrap();
    assert_eq!(step(&dir, None, None), (4, dir.clone()), "what it says can be done");
}

#[test]
fn with_out_a_new_run_begins_only_where_nothing_is() {
    let old = OldRuns::new();
    let new = old.path("new");
    let found = find_resumption(&old.path("run"), None, Some(&new)).unwrap();
    assert_eq!((found.run_dir, found.start.from.unwrap().step), (new.clone(), 4));
    assert!(refusal(&old.path("run"), Some(&old.path("elsewhere"))).contains("exists and is not empty"));
    // Its own directory is no other.
    assert_eq!(step(&old.path("run"), None, Some(&old.path("run"))), (4, old.path("run")));
}

#[test]
fn keys_change_where_they_can() {
    let spec = testing::spec(&[]);
    let change = |given: &str, folder| resumed_job(&spec, &[given.to_owned()], folder);
    assert!((change("train.lr=0.5", None).unwrap().train.lr - 0.5).abs() < 1e-12);
    assert_eq!(change("train.steps=99", None).unwrap().train.steps, 99);
    for given in ["model.n_layer=2", "data.seq_len=4", "train.optimizer=sgd"] {
        let error = change(given, None).unwrap_err();
        let key = given.split('=').next().unwrap();
        assert!(error.is_bad_input() && error.to_string().contains(&format!("--set {key}")), "{error}");
    }
    let error = change("data.path=there", None).unwrap_err().to_string();
    assert!(error.contains("data.path") && error.contains("absolute"), "{error}");
    assert_eq!(change("data.path=there", Some(Path::new("/a"))).unwrap().data.path, [Path::new("/a/there")]);
    assert!(change("train.lrr=1", None).unwrap_err().to_string().contains("train.lr"));
}

#[cfg(unix)]
#[test]
fn a_run_directory_that_was_renamed_is_made_again_unless_something_else_is_there() {
    let folder = tempfile::tempdir().unwrap();
    let (dir, moved) = (folder.path().join("run"), folder.path().join("moved"));
    let (spec, start) = (testing::spec(&[]), RunStart::new());
    let mut opened = open(&dir, &start, &spec, 0).unwrap();
    assert_eq!(opened.missing().map(|folder| folder.path()), None);
    std::fs::rename(&dir, &moved).unwrap();
    assert_eq!(opened.missing().map(|folder| folder.path()), Some(dir.as_path()));
    std::fs::create_dir(&dir).unwrap();
    std::fs::write(dir.join("mine"), "mine").unwrap();
    let error = opened.make_again(false).unwrap_err().to_string();
    assert!(error.contains("mine is in the way"), "{error}");
    assert_eq!(std::fs::read_dir(&dir).unwrap().count(), 1, "nothing was written");
    std::fs::remove_file(dir.join("mine")).unwrap();
    // A shard may have come meanwhile.
    std::fs::create_dir_all(dir.join("checkpoints/step-3.partial-x")).unwrap();
    opened.make_again(false).unwrap();
    assert_eq!(opened.missing().map(|folder| folder.path()), None);
    for name in ["run.json", "job.json", "graph.json", "placement.json"] {
        assert_eq!(std::fs::read(dir.join(name)).unwrap(), std::fs::read(moved.join(name)).unwrap(), "{name}");
    }
    // What was renamed is a copy from now on, and free for whoever goes on there.
    assert!(RunHome::read(&moved).unwrap().unwrap().is_copy().unwrap());
    FolderLock::check(&moved).unwrap();
    assert!(FolderLock::check(&dir).is_err());
}
