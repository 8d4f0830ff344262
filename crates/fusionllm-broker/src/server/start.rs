//! Where a job starts: at its beginning, at a checkpoint, or where it was.

use std::path::Path;
use std::sync::Arc;

use fusionllm_protocol::{DataSpec, JobSpec};

use crate::checkpoint::{Checkpoint, Origin, checkpoints_of, open_newest};
use crate::cluster_file::read_cluster;
use crate::core::{Restored, StartPoint, check};
use crate::metrics::last_step;
use crate::model::{load_model, model_tokenizer};
use crate::resume::{goes_on, notices_of};
use crate::run_dir::{RunDir, RunHome, RunStart};
use crate::store::JobRecord;
use crate::{BrokerError, CheckpointError};

/// A job's beginning. `tokenizer` is the content of its tokenizer file, where whoever handed the job in could read it.
pub(super) fn start_of(spec: &JobSpec, tokenizer: Option<String>) -> Result<StartPoint, BrokerError> {
    let model = load_model(spec)?;
    let mut notices = model.notes;
    let mut origin = Origin { carried: model.carried, data: None };
    if spec.data.tokenizer != DataSpec::MODEL {
        if origin.tokenizer().is_some_and(|own| tokenizer.as_ref().is_some_and(|given| own != given)) {
            notices.push("data.tokenizer is not the tokenizer.json in model.path".to_owned());
        }
        origin.set_tokenizer(tokenizer);
    }
    Ok(StartPoint {
        graph: model.dag.to_json(),
        dag: Arc::new(model.dag),
        weights: model.weights,
        cluster: None,
        step: 0,
        notices,
        origin,
        run: RunStart::new(),
    })
}

/// Where a job goes on that waited when the broker ended.
pub(super) fn start_again(record: JobRecord) -> Result<StartPoint, BrokerError> {
    let start = resumed_start(&record, &record.spec, record.from_step)?;
    Ok(planned_by(record.spec, start)?.1)
}

/// What a job's run directory knows of how far it came.
pub(super) fn restored(record: JobRecord) -> Restored {
    let is_open = !record.state.is_final();
    let reached = last_step(&RunDir::new(&record.run_dir).metrics()).filter(|_| is_open);
    let newest = || Some(checkpoints_of(&RunHome::read(&record.run_dir).ok()??).ok()?.first()?.step);
    let checkpoint = if is_open { newest() } else { None };
    Restored { record, reached, checkpoint }
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
        return match was_there {
            Some(_) => Err(gone(&record.run_dir)),
            None => start_anew(spec),
        };
    };
    if let (Some(file), Some((step, checksum))) = (&mut home.file, record.checkpoint.clone()) {
        // What the broker remembers counts before what lies beside the checkpoints.
        file.manifests.insert(step, checksum);
    }
    let known = record.run.as_ref();
    let from_the_beginning = || {
        let mut start = StartPoint { run: goes_on(&home, known, Vec::new())?, ..start_anew(spec)? };
        start.notices.append(&mut start.run.notices);
        Ok(start)
    };
    if step == Some(0) {
        return from_the_beginning();
    }
    match open_newest(&home, step) {
        Ok(newest) => {
            let notices = notices_of(&newest, Some(&home).filter(|_| step.is_none()));
            start_at(newest.checkpoint, goes_on(&home, known, notices)?)
        }
        Err(CheckpointError::None { path }) if was_there.is_some() => Err(gone(&path)),
        Err(CheckpointError::None { .. }) if step.is_none() => from_the_beginning(),
        Err(error) => Err(error.into()),
    }
}

/// A job's beginning once more. The content of its tokenizer file was only known when it was handed in.
fn start_anew(spec: &JobSpec) -> Result<StartPoint, BrokerError> {
    let mut start = start_of(spec, None)?;
    if ![DataSpec::MODEL, DataSpec::BYTES].contains(&spec.data.tokenizer.as_str()) {
        start.notices.push(format!(
            "the content of {} is not known to the broker any more: checkpoints go without it, and export and generate need \
             --tokenizer FILE",
            spec.data.tokenizer
        ));
    }
    Ok(start)
}

/// Where a run goes on with a checkpoint.
pub(super) fn start_at(checkpoint: Checkpoint, mut run: RunStart) -> Result<StartPoint, BrokerError> {
    let (dag, step) = (checkpoint.dag().clone(), checkpoint.manifest().step);
    let mut notices = vec![format!("weights: {} (step {step})", checkpoint.path().display())];
    notices.append(&mut run.notices);
    let mut origin = checkpoint.origin().clone();
    if origin.tokenizer().is_none()
        && let Some(tokenizer) = model_tokenizer(&checkpoint.manifest().job)?
    {
        origin.set_tokenizer(Some(tokenizer));
    }
    let weights = Some(Arc::new(checkpoint.into_tensors()));
    Ok(StartPoint { graph: dag.to_json(), dag: Arc::new(dag), weights, cluster: None, step, notices, origin, run })
}

#[cfg(test)]
mod tests {
    use fusionllm_protocol::{Generation, JobId, JobState};

    use super::*;
    use crate::testing;

    /// A folder that is not mounted looks like one in which nothing was ever done.
    #[test]
    fn a_run_whose_checkpoints_are_gone_is_not_begun_anew_without_a_word() {
        let folder = tempfile::tempdir().unwrap();
        let record = JobRecord {
            job: JobId(1),
            spec: testing::spec(&[]),
            state: JobState::Stopped,
            step: 5,
            loss: None,
            run_dir: folder.path().join("run"),
            generation: Generation(1),
            run: None,
            checkpoint: Some((3, "00".to_owned())),
            from_step: None,
            data: None,
        };
        let step_of = |record: &JobRecord, step| resumed_start(record, &record.spec, step).map(|start| start.step);
        for dir_is_there in [false, true] {
            if dir_is_there {
                std::fs::create_dir(&record.run_dir).unwrap();
                std::fs::write(record.run_dir.join("job.json"), serde_json::to_vec(&record.spec).unwrap()).unwrap();
            }
            for step in [None, Some(3)] {
                let error = step_of(&record, step).unwrap_err().to_string();
                assert!(error.contains("the checkpoint of step 3 is not there any more"), "{error}");
                assert!(error.contains("`--step 0` begins anew"), "{error}");
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
