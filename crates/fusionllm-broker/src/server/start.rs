//! Where a job starts: at its beginning, at a checkpoint, or where it was.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use fusionllm_graph::OpDag;
use fusionllm_protocol::{DataSpec, JobSpec, SampleOrder};

use super::late_report::write_if_missing;
use crate::checkpoint::{Checkpoint, Origin, checkpoints_of, open_at, open_newest, remove_partial};
use crate::cluster_file::read_cluster;
use crate::core::{Restored, StartPoint, Unread, WEIGHTS, check};
use crate::metrics::last_step;
use crate::model::{ModelFingerprint, load_model, model_tokenizer};
use crate::resume::{goes_on, notices_of};
use crate::run_dir::{FolderLock, Parent, RunDir, RunHome, RunStart};
use crate::store::{JobRecord, PlacedWork};
use crate::{BrokerError, CheckpointError};

/// A job's beginning. `tokenizer` is the content of its tokenizer file, where whoever handed the job in could read it.
pub(super) fn start_of(spec: &JobSpec, tokenizer: Option<String>) -> Result<StartPoint, BrokerError> {
    let model = load_model(spec)?;
    let mut notices: Vec<String> = model.notes.iter().map(ToString::to_string).collect();
    let graph = model.dag.to_json();
    let fingerprint = ModelFingerprint::of(spec, &graph, model.weights.as_deref(), &model.carried);
    let mut origin = Origin { carried: model.carried, data: None };
    if spec.data.tokenizer != DataSpec::MODEL {
        if origin.tokenizer().is_some_and(|own| tokenizer.as_ref().is_some_and(|given| own != given)) {
            notices.push("data.tokenizer is not the tokenizer.json in model.path".to_owned());
        }
        origin.set_tokenizer(tokenizer);
    }
    Ok(StartPoint {
        graph,
        dag: Arc::new(model.dag),
        weights: model.weights,
        cluster: None,
        step: 0,
        loss: None,
        notices,
        origin,
        model: Some(fingerprint),
        run: RunStart::new(),
        unread: None,
    })
}

/// Where a job goes on that waited when the broker ended.
pub(super) fn start_again(record: JobRecord) -> Result<StartPoint, BrokerError> {
    if record.placed.is_none() {
        // What is there changes while another process is at work.
        FolderLock::check(&record.run_dir).or_else(|error| if is_in_use(&error) { Err(error) } else { Ok(()) })?;
    }
    let start = resumed_start(&record, &record.spec, record.from_step);
    match (start.and_then(|start| planned_by(record.spec.clone(), start)), &record.work) {
        (Ok((_, start)), _) => Ok(start),
        (Err(error @ BrokerError::NothingLeft { .. }), _) => Err(error),
        (Err(error), Some(work)) if record.from_step.is_none() => start_of_work(&record.spec, work, error),
        (Err(error), _) => Err(error),
    }
}

fn is_in_use(error: &BrokerError) -> bool {
    matches!(error, BrokerError::InUse { .. })
}

/// The start of a job of which `error` says why it cannot be read any more, as far as the store has it: all but the weights.
fn start_of_work(spec: &JobSpec, work: &PlacedWork, error: BrokerError) -> Result<StartPoint, BrokerError> {
    let Ok(dag) = OpDag::from_json(&work.graph) else { return Err(error) };
    let cluster = spec.placement.cluster.as_ref().and_then(|path| read_cluster(path).ok());
    Ok(StartPoint {
        graph: work.graph.clone(),
        dag: Arc::new(dag),
        weights: None,
        cluster: cluster.map(|(_, cluster)| cluster),
        step: 0,
        loss: None,
        notices: Vec::new(),
        origin: Origin { carried: Arc::new(work.carried.clone()), data: None },
        model: None,
        run: RunStart { notices: Vec::new(), ..work.run.clone() },
        unread: Some(Unread { bad_input: error.is_bad_input(), reason: error.to_string() }),
    })
}

/// What a job's run directory knows of how far it came.
pub(super) fn restored(record: JobRecord) -> Restored {
    let is_open = !record.state.is_final();
    if is_open {
        clear_partial(&record.run_dir);
    }
    write_if_missing(&record);
    let reached = last_step(&RunDir::new(&record.run_dir).metrics()).filter(|_| is_open);
    let newest = || Some(checkpoints_of(&RunHome::read(&record.run_dir).ok()??).ok()?.first()?.step);
    let checkpoint = if is_open { newest() } else { None };
    let gone_for = reached.and_then(|_| age(&RunDir::new(&record.run_dir).metrics())).unwrap_or_default();
    let work = record.work.as_ref().filter(|_| is_open && record.placed.is_some());
    let is_ours = |work: &&Arc<PlacedWork>| !RunDir::new(&record.run_dir).is_of_another(&work.placement, &work.hashes);
    let placement = work.filter(is_ours).map(|work| work.placement.clone());
    Restored { record, reached, gone_for, checkpoint, placement }
}

/// How long ago a file was written last.
fn age(path: &Path) -> Option<Duration> {
    std::fs::metadata(path).ok()?.modified().ok()?.elapsed().ok()
}

/// Removes the shards of checkpoints that were not whole when the broker ended: until the job goes on, which may be never,
/// they would look like something. What cannot be removed now the next start of the run removes, or names.
fn clear_partial(run_dir: &Path) {
    let Ok(Some(home)) = RunHome::read(run_dir) else { return };
    let Some(file) = &home.file else { return };
    // Another process may be at work there; and what bears the id of a copy is the original's.
    let Ok(_lock) = FolderLock::take(run_dir, &file.run) else { return };
    if home.is_copy().unwrap_or(true) {
        return;
    }
    for place in home.places() {
        // Whoever gathers shards elsewhere has a lock there; in a folder without one nothing is made.
        let is_inside = place.starts_with(&home.dir);
        let lock = (!is_inside && FolderLock::is_in(&place)).then(|| FolderLock::take(&place, &file.run));
        if matches!(lock, Some(Err(_))) {
            continue;
        }
        let removal = remove_partial(&place, &file.run);
        for said in removal.failures.iter().chain(&removal.leftovers) {
            tracing::warn!(said, "what an earlier start left");
        }
    }
}

/// The start with the cluster file that the job names, if it does.
pub(super) fn planned_by(spec: JobSpec, mut start: StartPoint) -> Result<(JobSpec, StartPoint), BrokerError> {
    if let Some(path) = &spec.placement.cluster {
        start.cluster = Some(read_cluster(path)?.1);
    }
    check(&spec, &start)?;
    Ok((spec, start))
}

/// Where a job of this broker goes on.
pub(super) fn resumed_start(record: &JobRecord, spec: &JobSpec, step: Option<u64>) -> Result<StartPoint, BrokerError> {
    // What is known to have been there must not be begun anew without a word, as by a disk that is not mounted.
    let was_there = record.checkpoint.as_ref().filter(|_| step != Some(0)).map(|(step, _)| *step);
    let gone = |path: &Path| BrokerError::CheckpointGone { step: was_there.unwrap_or(0), path: path.to_owned() };
    let Some(mut home) = RunHome::read(&record.run_dir)? else {
        return match (step.filter(|&step| step > 0), was_there) {
            (Some(step), _) => {
                Err(CheckpointError::Step { path: record.run_dir.clone(), step, there: Vec::new() }.into())
            }
            (None, Some(_)) => Err(gone(&record.run_dir)),
            (None, None) => start_anew(record, spec),
        };
    };
    if let (Some(file), Some((step, checksum))) = (&mut home.file, record.checkpoint.clone()) {
        // What the broker remembers counts before what lies beside the checkpoints.
        file.manifests.insert(step, checksum);
    }
    let known = record.run.as_ref();
    let job_notice = home.job_notice(&record.spec, "that the broker remembers");
    let from_the_beginning = || {
        let run = goes_on(&home, known, Vec::new())?;
        let mut start = match home.file.as_ref().and_then(|file| file.from.as_ref()) {
            Some(parent) => start_at(began_with(parent)?, run, spec)?,
            None => StartPoint { run, ..start_anew(record, spec)? },
        };
        start.notices.append(&mut start.run.notices);
        start.notices.extend(job_notice.clone());
        Ok(start)
    };
    if step == Some(0) {
        return from_the_beginning();
    }
    match open_newest(&home, step) {
        Ok(newest) => {
            let mut notices = notices_of(&newest, Some(&home).filter(|_| step.is_none()));
            notices.extend(job_notice);
            start_at(newest.checkpoint, goes_on(&home, known, notices)?, spec)
        }
        Err(CheckpointError::None { path }) if was_there.is_some() => Err(gone(&path)),
        Err(CheckpointError::None { .. }) if step.is_none() => from_the_beginning(),
        Err(error) => Err(error.into()),
    }
}

/// The checkpoint of another run with which one began.
fn began_with(parent: &Parent) -> Result<Checkpoint, BrokerError> {
    let checkpoint = open_at(&parent.path, None)?;
    let manifest = checkpoint.manifest();
    if (manifest.step, &manifest.run) == (parent.step, &parent.run) {
        Ok(checkpoint)
    } else {
        Err(CheckpointError::Changed { path: parent.path.clone() }.into())
    }
}

/// A job's beginning once more, held against what it was when it was handed in. The content of its tokenizer file was only
/// known then.
fn start_anew(record: &JobRecord, spec: &JobSpec) -> Result<StartPoint, BrokerError> {
    let mut start = start_of(spec, None)?;
    if let (Some(now), Some(before)) = (&start.model, &record.model) {
        start.notices.extend(now.changes_since(before, spec.model.path.as_deref())?);
    }
    if ![DataSpec::MODEL, DataSpec::BYTES].contains(&spec.data.tokenizer.as_str()) {
        start.notices.push(format!(
            "the content of {} is not known to the broker any more: checkpoints go without it, and export and generate need \
             --tokenizer FILE",
            spec.data.tokenizer
        ));
    }
    Ok(start)
}

/// Where a run goes on with a checkpoint, and is trained as `spec` says.
pub(super) fn start_at(checkpoint: Checkpoint, mut run: RunStart, spec: &JobSpec) -> Result<StartPoint, BrokerError> {
    let (dag, step, loss) = (checkpoint.dag().clone(), checkpoint.manifest().step, checkpoint.manifest().loss);
    let mut notices = vec![format!("{WEIGHTS}{} (step {step})", checkpoint.path().display())];
    notices.append(&mut run.notices);
    let was = &checkpoint.manifest().job;
    notices.extend(other_samples(was, spec, step));
    let before = was.train.states();
    let unused = before.iter().filter(|kind| !spec.train.states().contains(kind));
    let unused: Vec<&str> = unused.map(|kind| kind.name()).collect();
    if !unused.is_empty() {
        let kinds = unused.join(", ");
        notices.push(format!("the checkpoint's {kinds} is left out: the job as it is now has no use for it"));
    }
    let mut origin = checkpoint.origin().clone();
    if origin.tokenizer().is_none()
        && let Some(tokenizer) = model_tokenizer(&checkpoint.manifest().job)?
    {
        origin.set_tokenizer(Some(tokenizer));
    }
    let weights = Some(Arc::new(checkpoint.into_tensors()));
    let (graph, dag) = (dag.to_json(), Arc::new(dag));
    Ok(StartPoint { graph, dag, weights, cluster: None, step, loss, notices, origin, model: None, run, unread: None })
}

/// A sentence if a run whose samples come one after the other goes on at another one than the next.
fn other_samples(was: &JobSpec, is: &JobSpec, step: u64) -> Option<String> {
    let (before, now) = (was.train.batch, is.train.batch);
    let (order_before, order) = (was.data.sample_order(), is.data.sample_order());
    if order == SampleOrder::Drawn || step == 0 || (before, order_before) == (now, order) {
        return None;
    }
    let (seen, next) = (step.saturating_mul(before.into()), step.saturating_mul(now.into()));
    Some(format!(
        "samples are counted as if all {step} steps had had train.batch = {now} and the data.order of now: after {seen} samples \
         it goes on at number {next}"
    ))
}

#[cfg(test)]
mod tests {
    use fusionllm_protocol::{Generation, JobId, JobState};

    use super::*;
    use crate::store::Placed;
    use crate::testing::{self, OldRuns};

    /// A job that was stopped after five steps.
    fn record(run_dir: &Path, spec: JobSpec) -> JobRecord {
        let (state, generation) = (JobState::Stopped, Generation(1));
        JobRecord { state, generation, step: 5, ..JobRecord::new(JobId(1), spec, run_dir.to_owned()) }
    }

    /// A broker that was killed leaves the shards of a checkpoint that never became whole.
    #[test]
    fn half_a_checkpoint_is_gone_after_a_restart() {
        let old = OldRuns::new();
        let run_dir = old.path("run");
        let found = crate::resume::find_resumption(&run_dir, None, None).unwrap();
        let file = crate::run_dir::RunFile {
            run: found.start.run.clone(),
            copy_of: found.start.copy_of.clone(),
            ..testing::run_file(&run_dir)
        };
        file.write(&mut crate::run_dir::WholeFiles::default()).unwrap();
        let partial = run_dir.join(format!("checkpoints/step-6.partial-{}-1", file.run.short()));
        crate::checkpoint::make_partial(&partial, &file.run).unwrap();
        std::fs::write(partial.join("shard-0.safetensors"), "half").unwrap();
        let spec = found.checkpoint().manifest().job.clone();
        let record = |state| JobRecord { state, run: Some(file.run.clone()), ..record(&run_dir, spec.clone()) };
        let lock = FolderLock::take(&run_dir, &file.run).unwrap();
        restored(record(JobState::Running));
        assert!(partial.is_dir(), "somebody is at work there");
        drop(lock);
        let restored = restored(record(JobState::Running));
        assert!(!partial.exists());
        assert_eq!((restored.reached.map(|(step, _)| step), restored.checkpoint), (Some(4), Some(4)));
    }

    /// Its first own checkpoint may come to nothing, and a CompNode be lost at the same time.
    #[test]
    fn a_run_that_began_with_another_ones_checkpoint_begins_again_with_it() {
        let old = OldRuns::new();
        let run_dir = old.path("new");
        std::fs::create_dir(&run_dir).unwrap();
        let path = old.path("run/checkpoints/step-4");
        let parent = Parent { run: None, path: path.clone(), step: 4 };
        let file = crate::run_dir::RunFile { from: Some(parent), ..testing::run_file(&run_dir) };
        file.write(&mut crate::run_dir::WholeFiles::default()).unwrap();
        let spec = open_at(&path, None).unwrap().manifest().job.clone();
        let record = JobRecord { run: Some(file.run.clone()), ..record(&run_dir, spec.clone()) };
        let start = resumed_start(&record, &spec, None).unwrap();
        assert_eq!((start.step, start.weights.is_some(), start.run.run), (4, true, file.run));
        assert!(start.notices[0].ends_with("step-4 (step 4)"), "{:?}", start.notices);
        // Another one has come in its place.
        std::fs::remove_dir_all(&path).unwrap();
        std::fs::rename(old.path("run/checkpoints/step-2"), &path).unwrap();
        let error = resumed_start(&record, &spec, None).unwrap_err();
        assert!(error.to_string().contains("step-4 has changed since it was checked"), "{error}");
    }

    /// What a job is at work with the store has, too.
    #[test]
    fn a_job_at_work_has_a_start_whatever_became_of_its_directory() {
        let folder = tempfile::tempdir().unwrap();
        let run_dir = folder.path().join("run");
        let spec = testing::spec(&[]);
        let (placement, graph) = testing::placed(&spec, 1);
        let carried = [("tokenizer.json".to_owned(), "[1]".to_owned())].into();
        let run = RunStart::new();
        let work = PlacedWork {
            placement: placement.clone(),
            graph: graph.clone(),
            carried,
            run: run.clone(),
            hashes: Vec::new(),
        };
        let placed = Placed { placement: String::new(), from: 0, members: Vec::new() };
        let record = JobRecord {
            state: JobState::Running,
            checkpoint: Some((3, "00".to_owned())),
            placed: Some(placed),
            work: Some(Arc::new(work)),
            ..record(&run_dir, spec.clone())
        };
        let start = start_again(record.clone()).unwrap();
        assert_eq!((start.step, start.graph, start.run, start.origin.tokenizer()), (0, graph, run, Some("[1]")));
        assert!(start.unread.unwrap().reason.contains("the checkpoint of step 3 is not there any more"));
        start_again(JobRecord { work: None, ..record.clone() }).unwrap_err();
        start_again(JobRecord { from_step: Some(3), ..record.clone() }).unwrap_err();
        assert_eq!(restored(record.clone()).placement, Some(placement));
        // Another process goes on with it, and is at work.
        let dir = RunDir::new(&run_dir);
        std::fs::create_dir(&run_dir).unwrap();
        std::fs::write(dir.placement(), serde_json::to_vec(&testing::placed(&spec, 2).0).unwrap()).unwrap();
        assert_eq!(restored(record.clone()).placement, None);
        let _lock = FolderLock::take(&run_dir, &RunStart::new().run).unwrap();
        let error = start_again(JobRecord { placed: None, ..record }).unwrap_err();
        assert!(is_in_use(&error), "{error}");
    }

    /// Where checkpoints lie elsewhere, another run may be at work, and a copy's original may.
    #[test]
    fn half_a_checkpoint_elsewhere_is_left_to_whoever_works_there() {
        let folder = tempfile::tempdir().unwrap();
        let (run_dir, shared) = (folder.path().join("run"), folder.path().join("ck"));
        let mut file = testing::run_file(&run_dir);
        file.checkpoints = Some(shared.clone());
        let partial = shared.join(format!("step-6.partial-{}-1", file.run.short()));
        let prepare = || {
            std::fs::create_dir_all(&run_dir).unwrap();
            std::fs::create_dir_all(&shared).unwrap();
            file.write(&mut crate::run_dir::WholeFiles::default()).unwrap();
            crate::checkpoint::make_partial(&partial, &file.run).unwrap();
        };
        prepare();
        let lock = FolderLock::take(&shared, &file.run).unwrap();
        clear_partial(&run_dir);
        assert!(partial.is_dir(), "somebody is at work there");
        drop(lock);
        let copy = folder.path().join("copy");
        std::fs::create_dir(&copy).unwrap();
        std::fs::copy(run_dir.join("run.json"), copy.join("run.json")).unwrap();
        clear_partial(&copy);
        assert!(partial.is_dir(), "it is the original's");
        clear_partial(&run_dir);
        assert!(!partial.exists());
    }

    /// A folder that is not mounted looks like one in which nothing was ever done.
    #[test]
    fn a_run_whose_checkpoints_are_gone_is_not_begun_anew_without_a_word() {
        let folder = tempfile::tempdir().unwrap();
        let record = JobRecord {
            checkpoint: Some((3, "00".to_owned())),
            ..record(&folder.path().join("run"), testing::spec(&[]))
        };
        let step_of = |record: &JobRecord, step| resumed_start(record, &record.spec, step).map(|start| start.step);
        for dir_is_there in [false, true] {
            if dir_is_there {
                std::fs::create_dir(&record.run_dir).unwrap();
                std::fs::write(record.run_dir.join("job.json"), serde_json::to_vec(&record.spec).unwrap()).unwrap();
            }
            let error = step_of(&record, None).unwrap_err();
            assert!(error.is_bad_input() && error.to_string().contains("`--step 0` begins anew"), "{error}");
            assert!(error.to_string().contains("the checkpoint of step 3 is not there any more"), "{error}");
            // What was asked for is named, whatever the broker remembers.
            for record in [&record, &JobRecord { checkpoint: None, ..record.clone() }] {
                let error = step_of(record, Some(4)).unwrap_err();
                assert!(error.is_bad_input(), "{error}");
                let error = error.to_string();
                assert!(
                    error.contains("no checkpoint of step 4, nor of any other step: is a disk not mounted?"),
                    "{error}"
                );
            }
            assert_eq!(step_of(&record, Some(0)).unwrap(), 0);
        }
        let record = JobRecord { checkpoint: None, ..record };
        assert_eq!(step_of(&record, None).unwrap(), 0, "there never was one");
        let mut record = record;
        record.spec.data.tokenizer = "/tokenizer.json".to_owned();
        let start = resumed_start(&record, &record.spec, None).unwrap();
        assert!(start.notices.iter().any(|n| n.contains("is not known to the broker any more")), "{:?}", start.notices);
    }
}
