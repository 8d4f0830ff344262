//! `fusionllm train`: the main job, all on this machine.

mod finish;
mod way_on;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

use anyhow::Context;
use fusionllm_broker::{
    Broker, BrokerConfig, BrokerError, ResumedBy, Resumption, RunReport, SNAPSHOT_FOLDER, Submitted, check_run_folders,
    default_run_dir, find_resumption, free_run_dir, holds_run, is_free, load_model, model_tokenizer, newest_checkpoint,
    read_cluster, resumed_job,
};
use fusionllm_compnode::{ChatTemplate, ReadableData, Tokenizer, Tokenizing, check_run_room, open_device};
use fusionllm_planner::{Cluster, place};
use fusionllm_protocol::{JobEvent, JobId, JobSpec, JobState, hugging_face};
use fusionllm_transport::{folder_above, without_temporary_name};

use super::follow::Interrupts;
use super::plan::DEFAULT_COMPNODES;
use crate::cli;
use crate::exit::{bad_input, refused};
use crate::local::{Death, Home, LocalCompNodes, local_name};
use crate::outputs::{check_folder, is_same_file};
use crate::progress::Progress;
use crate::render;
use way_on::WayOn;

/// After so many ends in a row of the processes of one CompNode the job is no more waited for that needs it.
const MOST_DEATHS: u32 = 8;
/// Where a job has others, it is at work again within this time.
const OTHERS: Duration = Duration::from_secs(120);

/// Why there is no run.
const BEFORE_TRAINING: &str = "interrupted before training began";

/// A job that has passed all checks.
struct Checked {
    spec: JobSpec,
    run_dir: PathBuf,
    compnodes: u32,
}

impl Checked {
    /// Where weights and shards lie on the way: on the disk where they will stay.
    fn scratch(&self) -> &Path {
        scratch(&self.spec, &self.run_dir)
    }

    /// What the CompNodes may read, and where their files lie.
    fn home<'a>(&'a self, snapshots: &'a Path) -> Home<'a> {
        Home { data: &self.spec.data, scratch: self.scratch(), snapshots }
    }
}

/// The nearest existing folder above the checkpoints of a run.
fn scratch<'a>(spec: &'a JobSpec, run_dir: &'a Path) -> &'a Path {
    let stay = spec.checkpoint.to.as_deref().unwrap_or(run_dir);
    folder_above(stay).unwrap_or(Path::new("/"))
}

pub(super) async fn run(args: cli::Train) -> anyhow::Result<()> {
    let (checked, from) = check(&args)?;
    let temporary = std::env::temp_dir();
    let no_folder = || {
        let folder = temporary.display();
        format!("no folder for the broker's state can be made in {folder}: make room there, or name another by TMPDIR")
    };
    let state = tempfile::tempdir().map_err(without_temporary_name).with_context(no_folder)?;
    let config = BrokerConfig {
        bind: "127.0.0.1:0".parse().context("loopback address")?,
        advertise: Vec::new(),
        relay: None,
        state_dir: state.path().join("state"),
        runs_dir: PathBuf::from("runs"),
        checkpoint_dirs: Vec::new(),
        model_dirs: Vec::new(),
        scratch: Some(checked.scratch().to_owned()),
        resumed_by: ResumedBy::Train,
    };
    let broker = Broker::start(config).await.map_err(|error| match error {
        BrokerError::StateFull { reason, .. } => state_full(&temporary, &reason),
        other => broker_error(other),
    })?;
    let result = train(&args, &checked, from, &broker).await;
    broker.shutdown().await;
    result
}

/// The state of this command's broker is in a temporary folder, which no option moves.
fn state_full(temporary: &Path, reason: &str) -> anyhow::Error {
    let folder = temporary.display();
    anyhow::anyhow!(
        "{folder} has no room for the broker's state ({reason}): make room there, or name another by TMPDIR"
    )
}

/// Everything that can be wrong with the input is found here, before anything is started or written.
fn check(args: &cli::Train) -> anyhow::Result<(Checked, Option<Resumption>)> {
    args.out.iter().try_for_each(|dir| check_folder("--out", dir))?;
    let (mut spec, dag, from, carried, beside) = match (&args.job, &args.resume) {
        (_, Some(dir)) => {
            let (spec, from) = resumed(dir, args)?;
            let beside = from.checkpoint().carried().clone();
            let carried = match beside.get(hugging_face::TOKENIZER) {
                Some(tokenizer) => Some(tokenizer.clone()),
                None => model_tokenizer(&spec).map_err(refused)?,
            };
            (spec, from.checkpoint().dag().clone(), Some(from), carried, beside)
        }
        (Some(job), None) => {
            let spec = super::job_file::read(job, &args.overrides.overrides)?;
            let model = load_model(&spec).map_err(refused)?;
            let of_model = model_tokenizer(&spec).map_err(refused)?;
            (spec, model.dag, None, of_model, BTreeMap::clone(&model.carried))
        }
        (None, None) => return Err(bad_input("no job file")),
    };
    let cluster = spec.placement.cluster.as_deref().map(read_cluster).transpose().map_err(refused)?.map(|c| c.1);
    let stood_for =
        cluster.as_ref().map_or(DEFAULT_COMPNODES, |c| u32::try_from(c.compnodes.len()).unwrap_or(u32::MAX));
    let compnodes = args.compnodes.or(spec.placement.compnodes).unwrap_or(stood_for);
    spec.placement.compnodes = Some(compnodes);
    check_owner(&spec, compnodes)?;
    let run_dir = run_dir_of(args, &spec, from.as_ref())?;
    open_device(args.device.parse().map_err(bad_input)?).map_err(refused)?;
    let placement = place(&dag, &Cluster::uniform(compnodes as usize), &spec.placement_spec()).map_err(refused)?;
    check_run_room(scratch(&spec, &run_dir), &dag, &placement, &spec.train.view())?;
    if spec.data.format.is_images() {
        let images = super::reading::read_images(&spec.data, args.json).map_err(refused)?;
        images.check_classes(dag.vocab().unwrap_or_default()).map_err(refused)?;
        return Ok((Checked { spec, run_dir, compnodes }, from));
    }
    let tokenizer = Tokenizer::of_job(&spec.data, carried.as_deref()).map_err(refused)?;
    let template = ChatTemplate::of_job(&spec.data, &beside, &ReadableData::everything()).map_err(refused)?;
    let by = Tokenizing { tokenizer: &tokenizer, template: template.as_ref() };
    let corpus = super::reading::read(&spec.data, by, args.json).map_err(refused)?;
    if let Some(vocab) = dag.vocab() {
        corpus.check_vocabulary(vocab, spec.model.path.is_none()).map_err(refused)?;
    }
    Ok((Checked { spec, run_dir, compnodes }, from))
}

/// The run directory, if the run can begin or go on there. Reading the data comes later: it may take long.
fn run_dir_of(args: &cli::Train, spec: &JobSpec, from: Option<&Resumption>) -> anyhow::Result<PathBuf> {
    let run_dir = match (from, &args.out) {
        (Some(from), _) => from.run_dir().to_owned(),
        (None, Some(out)) => out.clone(),
        (None, None) => free_run_dir(&default_run_dir(Path::new("runs"), &spec.name, SystemTime::now()), |_| false)
            .map_err(broker_error)?,
    };
    // Whatever else has such a file is not a run, and not to be removed.
    if from.is_none() && run_dir.join("metrics.jsonl").exists() && holds_run(&run_dir).unwrap_or(true) {
        let hint = match newest_checkpoint(&run_dir) {
            Ok(None) => "it has no checkpoint to go on from: give another --out, or remove it",
            _ => "give another --out, or go on with it by --resume",
        };
        return Err(bad_input(format!("{} holds a run already; {hint}", run_dir.display())));
    }
    if run_dir.to_str().is_none() {
        return Err(bad_input(format!("--out {} is not UTF-8, give a folder whose name is", run_dir.display())));
    }
    check_run_folders(&run_dir, spec).map_err(broker_error)?;
    // The data lies on this machine, too: what a run writes must not be trained on when it goes on.
    for (key, folder) in [("--out", Some(&run_dir)), ("checkpoint.to", spec.checkpoint.to.as_ref())] {
        let is_data = |path: &&PathBuf| folder.is_some_and(|folder| is_same_file(folder, path));
        if let Some(path) = spec.data.path.iter().find(is_data) {
            return Err(bad_input(format!(
                "{key} is the job's data.path too, {}: give another folder",
                path.display()
            )));
        }
    }
    if from.is_none() && !is_free(&run_dir).map_err(broker_error)? {
        return Err(broker_error(BrokerError::RunDirNotEmpty { path: run_dir }));
    }
    std::path::absolute(run_dir).context("the current folder")
}

/// The data's owner is one of the processes that will be started, or nobody would ever come to read it.
fn check_owner(spec: &JobSpec, compnodes: u32) -> anyhow::Result<()> {
    let Some(owner) = &spec.data.owner else { return Ok(()) };
    if (0..compnodes).any(|index| *owner == local_name(index)) {
        return Ok(());
    }
    let (first, last) = (local_name(0), local_name(compnodes.saturating_sub(1)));
    Err(bad_input(format!("data.owner = `{owner}` is none of the CompNodes of this run, which are {first} to {last}")))
}

/// The job of a run that goes on, and from where.
fn resumed(dir: &Path, args: &cli::Train) -> anyhow::Result<(JobSpec, Resumption)> {
    if args.step == Some(0) {
        return Err(bad_input("--step 0 is the beginning: train the job file into another --out"));
    }
    let from = find_resumption(dir, args.step, args.out.as_deref()).map_err(refused)?;
    let manifest = from.checkpoint().manifest();
    let here = std::env::current_dir().context("the current folder")?;
    let spec = resumed_job(&manifest.job, &args.overrides.overrides, Some(&here)).map_err(refused)?;
    if manifest.step >= spec.train.steps {
        let (done, steps) = (manifest.step, spec.train.steps);
        return Err(bad_input(format!("{done} of train.steps = {steps} are done; raise it with --set train.steps=N")));
    }
    Ok((spec, from))
}

async fn train(args: &cli::Train, checked: &Checked, from: Option<Resumption>, broker: &Broker) -> anyhow::Result<()> {
    if !args.json {
        if let Some(from) = &from {
            let (checkpoint, dir) = (from.checkpoint(), from.run_dir().display());
            let (path, step) = (checkpoint.path().display(), checkpoint.manifest().step);
            render::line(&format!("going on in {dir} after step {step}, from {path}"))?;
        }
        render::line(&format!("starting {} CompNode processes on this machine", checked.compnodes))?;
    }
    // Those of a process that ends stay there for the one that takes its place.
    let snapshots = tempfile::Builder::new().prefix(SNAPSHOT_FOLDER).tempdir_in(checked.scratch());
    let no_folder = || format!("{}: no folder for snapshots can be made there", checked.scratch().display());
    let snapshots = snapshots.map_err(without_temporary_name).with_context(no_folder)?;
    let home = checked.home(snapshots.path());
    // Where a job is to fail by the end of one, there is nothing to start it again for.
    let options = (args.fresh_profile, checked.spec.survive.enabled);
    let starting = LocalCompNodes::start(broker, checked.compnodes, &args.device, &home, options);
    let mut interrupts = Interrupts::new();
    let mut compnodes = tokio::select! {
        started = starting => started?,
        () = interrupts.next() => anyhow::bail!(BEFORE_TRAINING),
    };
    let result = run_job(args, checked, from, broker, &mut compnodes, &mut interrupts).await;
    let crashed = compnodes.stop().await;
    let report = match result {
        // The broker knows only that it vanished.
        Err(error) if !crashed.is_empty() => return Err(error.context(crashed.join(", "))),
        result => result?,
    };
    finish::finish(args, checked, &report, &mut interrupts).await
}

/// Submits the job and follows it to its end. Ctrl-C stops it, and so does the end of whoever reads the output, or a
/// CompNode that the job needs and whose process cannot be kept going.
async fn run_job(
    args: &cli::Train,
    checked: &Checked,
    from: Option<Resumption>,
    broker: &Broker,
    compnodes: &mut LocalCompNodes,
    interrupts: &mut Interrupts,
) -> anyhow::Result<RunReport> {
    let (spec, run_dir) = (checked.spec.clone(), checked.run_dir.clone());
    let mut way = WayOn::new(args, &run_dir, from.as_ref());
    let submitting = async {
        match from {
            Some(from) => broker.resume_from(spec, from).await,
            None => {
                let tokenizer = super::job_file::tokenizer_source(&spec);
                broker.submit(spec, Some(run_dir), tokenizer).await
            }
        }
    };
    let submitted = tokio::select! {
        submitted = submitting => submitted,
        () = interrupts.next() => anyhow::bail!(BEFORE_TRAINING),
    };
    let Submitted { job, mut events, .. } = submitted.map_err(broker_error)?;
    let mut progress = Progress::new(args.json, checked.spec.train.steps);
    let mut cut_short: Option<CutShort> = None;
    let mut step = way.began_after();
    let mut waits_since = Some(Instant::now());
    loop {
        let event = tokio::select! {
            event = events.next() => event.context("the broker ended before the job")?,
            () = interrupts.next() => {
                // The second of two finds it stopped.
                stop_if_at_work(broker, job).await?;
                continue;
            }
            death = compnodes.death(broker), if cut_short.is_none() => {
                cut_short = died(broker, death, waits_since.map(|since| since.elapsed())).await?;
                if cut_short.is_some() {
                    stop_if_at_work(broker, job).await?;
                }
                continue;
            }
        };
        match &event {
            JobEvent::Step { metrics, .. } => (step, waits_since) = (metrics.step, None),
            JobEvent::Checkpoint { step, path, .. } => way.saw(*step, path),
            JobEvent::State { state: JobState::Waiting { .. }, .. } => {
                waits_since.get_or_insert_with(Instant::now);
            }
            JobEvent::State { state: JobState::Running, .. } => waits_since = None,
            _ => {}
        }
        if cut_short.is_none()
            && let Err(error) = progress.event(&event)
        {
            cut_short = Some(CutShort::Unread(error));
            stop_if_at_work(broker, job).await?;
        }
        if let JobEvent::State { state, .. } = &event
            && state.is_final()
        {
            if *state == JobState::Stopped {
                let steps = checked.spec.train.steps;
                way.look(broker, job).await;
                return Err(cut_short.unwrap_or(CutShort::Interrupted { step, steps }).error(&way));
            }
            super::follow::outcome(state)?;
            return broker.report(job).await.map_err(broker_error);
        }
    }
}

/// Tells the broker of a CompNode that has no process any more. Why training ends by it, if it does: for so long the job
/// has waited, if it waits.
async fn died(broker: &Broker, death: Death, waits: Option<Duration>) -> anyhow::Result<Option<CutShort>> {
    let Death { index, how, in_a_row } = death;
    let name = local_name(index);
    broker.lost(name.clone(), format!("its process {how}")).await.map_err(broker_error)?;
    if in_a_row == MOST_DEATHS {
        tracing::warn!(
            "the process of {name} {how}, for the {in_a_row}th time in a row: it is tried again once a minute, and training \
             goes on without it if it can"
        );
    }
    Ok(is_in_vain(in_a_row, waits).then_some(CutShort::Died(name, in_a_row)))
}

/// Whether a job waits in vain for a CompNode whose processes have ended so many times in a row: others would be at work
/// by now.
fn is_in_vain(in_a_row: u32, waits: Option<Duration>) -> bool {
    in_a_row > MOST_DEATHS && waits.is_some_and(|waits| waits >= OTHERS)
}

/// Stops a job unless it has ended already.
async fn stop_if_at_work(broker: &Broker, job: JobId) -> anyhow::Result<()> {
    match broker.stop(job).await {
        Ok(()) | Err(BrokerError::JobState { .. }) => Ok(()),
        Err(error) => Err(broker_error(error)),
    }
}

/// Why a job was stopped before its end.
enum CutShort {
    /// The job waits for this CompNode, whose processes have ended so many times in a row.
    Died(String, u32),
    /// Nobody reads the output, or it cannot be written.
    Unread(anyhow::Error),
    /// Whoever ran it has stopped it, after this step of so many.
    Interrupted { step: u64, steps: u64 },
}

impl CutShort {
    /// The same for people, with the way on where it can still be said.
    fn error(self, way: &WayOn) -> anyhow::Error {
        match self {
            Self::Died(name, times) => {
                anyhow::anyhow!("{name} was started in vain {times} times in a row, and the job needs it: {way}")
            }
            Self::Unread(error) => anyhow::anyhow!("{error:#}; training was stopped: {way}"),
            Self::Interrupted { step, steps } => {
                anyhow::anyhow!("interrupted, the job was stopped after step {step} of {steps}: {way}")
            }
        }
    }
}

/// A broker's error with its exit code.
pub(super) fn broker_error(error: BrokerError) -> anyhow::Error {
    if error.is_bad_input() { bad_input(error) } else { error.into() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_compnode_that_cannot_be_started_ends_only_a_job_that_needs_it() {
        assert!(!is_in_vain(MOST_DEATHS, Some(OTHERS)));
        assert!(!is_in_vain(1000, None), "it trains with the others");
        assert!(!is_in_vain(1000, Some(OTHERS / 2)), "it has just lost another one");
        assert!(is_in_vain(MOST_DEATHS + 1, Some(OTHERS)));
    }

    #[test]
    fn shards_pass_over_the_disk_where_they_stay() {
        let folder = tempfile::tempdir().unwrap();
        let job = "[model]\nname = \"gpt2\"\n[data]\npath = \"text\"";
        let mut spec = JobSpec::from_toml(job, &[]).unwrap();
        let checked =
            |spec: &JobSpec| Checked { spec: spec.clone(), run_dir: folder.path().join("runs/one"), compnodes: 1 };
        assert_eq!(checked(&spec).home(Path::new("")).scratch, folder.path());
        let volume = folder.path().join("volume");
        std::fs::create_dir(&volume).unwrap();
        spec.checkpoint.to = Some(volume.join("a/b"));
        assert_eq!(checked(&spec).home(Path::new("")).scratch, volume);
    }
}
