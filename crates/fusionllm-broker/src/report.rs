//! What came out of a run: `report.md`, the end of `train`, and `--json`.

mod recoveries;

use std::collections::{BTreeMap, VecDeque};
use std::path::{Path, PathBuf};

use fusionllm_planner::{format_bytes, format_perplexity, format_seconds};
use fusionllm_protocol::{DataReport, JobId, JobState, Notice, Recovery, StepMetrics};
use serde::Serialize;

use crate::BrokerError;
use crate::metrics::{Thinned, each_step};
use crate::run_dir::{PlacementFile, RunDir, RunFile, StageSummary, read_notices};
use crate::store::JobRecord;
use recoveries::Recoveries;

/// Training losses are averaged over this many last steps, since a single batch says little.
const LAST_STEPS: usize = 20;

/// What one link carried over the whole run.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct LinkTotal {
    /// Name of the CompNode that sent.
    pub from: String,
    /// Name of the CompNode that received.
    pub to: String,
    /// Bytes sent, as encoded, with headers.
    pub bytes: u64,
    /// Bytes of the same tensors as dense fp32.
    pub dense_bytes: u64,
    /// The codec, in the text form of job files.
    pub codec: String,
}

/// What came out of a run.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct RunReport {
    /// Number of the job.
    pub job: JobId,
    /// Name of the job.
    pub name: String,
    /// How it ended.
    #[serde(flatten)]
    pub state: JobState,
    /// Its run directory.
    pub run_dir: PathBuf,
    /// Updates done.
    pub step: u64,
    /// Updates asked for.
    pub steps: u64,
    /// Mean training loss of the last steps, in nats per token or image.
    pub loss: Option<f64>,
    /// Last evaluation loss, in nats per token or image.
    pub eval_loss: Option<f64>,
    /// Share of images in it whose class is the likeliest one.
    pub eval_accuracy: Option<f64>,
    /// The evaluation loss per UTF-8 byte, in bits.
    pub eval_bits_per_byte: Option<f64>,
    /// Evaluation loss of a unigram model of the same text, in nats per token; of images, of a model that knows only how
    /// often each class comes.
    pub unigram_loss: Option<f64>,
    /// The same per UTF-8 byte, in bits.
    pub unigram_bits_per_byte: Option<f64>,
    /// Tokens or images trained on, repeated ones too.
    pub tokens: u64,
    /// Sum of the steps' wall times, in seconds.
    pub train_s: f64,
    /// Tokens or images in a second of the median step.
    pub tokens_per_s: Option<f64>,
    /// Seconds of the median step.
    pub step_s: Option<f64>,
    /// What the plan said that a step would take, in seconds.
    pub predicted_step_s: Option<f64>,
    /// What the data owner found in its data.
    pub data: Option<DataReport>,
    /// Which CompNode held which ops.
    pub stages: Vec<StageSummary>,
    /// What each direction of a link carried, by codec.
    pub links: Vec<LinkTotal>,
    /// Updates of which `metrics.jsonl` has no figures; nothing where it is not known after which step the run began.
    pub missing_steps: Option<u64>,
    /// What the user of the job must see, oldest first.
    pub notices: Vec<Notice>,
    /// What it recovered from, oldest first.
    pub recoveries: Vec<Recovery>,
    /// Share of the time since the first step that the steps would have taken one after another, each as long as the median
    /// one; nothing where it is not known when they were done.
    pub useful_share: Option<f64>,
}

/// What was read, or its default and why.
fn or_without<T: Default>(read: Result<T, BrokerError>, unread: &mut Vec<String>) -> Result<T, BrokerError> {
    read.or_else(|error| match error.is_shortage() {
        true => Err(error),
        false => {
            unread.push(format!("{error}: the report goes without it"));
            Ok(T::default())
        }
    })
}

impl RunReport {
    /// Reads a run directory and the file of its steps, step by step; `each` sees every step too. It goes without a file that
    /// is damaged or no file at all, with a notice.
    ///
    /// # Errors
    /// [`BrokerError::Io`] if a file cannot be opened for a reason that says nothing of it.
    pub(crate) fn read(
        record: &JobRecord,
        metrics: &Path,
        mut each: impl FnMut(&StepMetrics),
    ) -> Result<Self, BrokerError> {
        let dir = RunDir::new(&record.run_dir);
        let mut totals = Totals::default();
        let mut unread = Vec::new();
        let steps = each_step(metrics, |step| {
            totals.add(&step);
            each(&step);
        });
        let figures = or_without(steps, &mut unread)?;
        let missing_steps = RunFile::first_step(&record.run_dir).map(|first| figures.missing(first, record.step));
        let data: Option<DataReport> = or_without(dir.read_json(&dir.data()), &mut unread)?;
        let placement: Option<PlacementFile> = or_without(dir.read_json(&dir.placement()), &mut unread)?;
        let mut notices = read_notices(&dir.notices(), record.step);
        notices.extend(unread.into_iter().map(|text| Notice { step: record.step, text }));
        Ok(Self { missing_steps, notices, ..Self::of(record, totals, data, placement) })
    }

    fn of(record: &JobRecord, mut totals: Totals, data: Option<DataReport>, placement: Option<PlacementFile>) -> Self {
        let recoveries = std::mem::take(&mut totals.recoveries);
        let last = &totals.last_losses;
        let mean = last.iter().sum::<f64>() / last.len() as f64;
        let eval_loss = totals.eval_loss;
        let unigram_loss = data.as_ref().map(|d| d.unigram_loss);
        let bits = |loss: Option<f64>| data.as_ref()?.bits_per_byte(loss?);
        let median_step = median(totals.step_s.values().to_vec());
        Self {
            job: record.job,
            name: record.spec.name.clone(),
            state: record.state.clone(),
            run_dir: record.run_dir.clone(),
            step: record.step,
            steps: record.spec.train.steps,
            loss: (!last.is_empty()).then_some(mean),
            eval_loss,
            eval_accuracy: totals.eval_accuracy,
            eval_bits_per_byte: bits(eval_loss),
            unigram_loss,
            unigram_bits_per_byte: bits(unigram_loss),
            tokens: totals.tokens,
            train_s: totals.train_s,
            tokens_per_s: totals.tokens_per_step.zip(median_step).map(|(tokens, seconds)| tokens / seconds),
            step_s: median_step,
            predicted_step_s: placement.as_ref().map(|p| p.prediction.step_s),
            data,
            stages: placement.map(|p| p.stages).unwrap_or_default(),
            links: totals.links(),
            missing_steps: None,
            notices: Vec::new(),
            useful_share: recoveries.useful_share(median_step),
            recoveries: recoveries.all,
        }
    }

    fn of_images(&self) -> bool {
        self.data.as_ref().is_some_and(|data| data.classes.is_some())
    }

    /// What is trained on, one of it.
    fn unit(&self) -> &'static str {
        if self.of_images() { "image" } else { "token" }
    }

    /// The few lines that end a run on the terminal.
    pub fn summary(&self) -> String {
        let unit = self.unit();
        let mut lines = vec![format!("{} of {} steps, {} {unit}s", self.step, self.steps, self.tokens)];
        if let Some(speed) = self.tokens_per_s {
            lines.push(format!("{:<17}{speed:.0} {unit}s/s (median step)", "speed"));
        }
        if let Some((measured, predicted)) = self.step_s.zip(self.predicted_step_s) {
            let (took, expected) = (format_seconds(measured), format_seconds(predicted));
            let ratio = measured / predicted;
            lines.push(format!("{:<17}{took} measured (median), {expected} predicted: {ratio:.2} of it", "step"));
        }
        let sum = |bytes: fn(&LinkTotal) -> u64| self.links.iter().map(bytes).sum::<u64>() as f64;
        let (sent, dense) = (sum(|l| l.bytes), sum(|l| l.dense_bytes));
        if dense > 0.0 {
            let saved = 100.0 * (1.0 - sent / dense).max(0.0);
            lines.push(format!("{:<17}{} sent, {saved:.0} % less than dense f32", "links", format_bytes(sent)));
        }
        let with_bits = |what: &str, loss: Option<f64>, bits: Option<f64>| {
            let bits = bits.map_or_else(String::new, |b| format!(", {b:.3} bits per byte"));
            loss.map(|loss| format!("{what:<17}{loss:.4} nats per {unit}{bits}"))
        };
        let recovered = recoveries::line(&self.recoveries, self.useful_share);
        lines.extend(recovered.map(|said| format!("{:<17}{said}", "recoveries")));
        lines.extend(with_bits("training loss", self.loss, None));
        let evaluation = with_bits("evaluation loss", self.eval_loss, self.eval_bits_per_byte);
        let perplexity = || self.eval_loss.map(|loss| format!(", perplexity {}", format_perplexity(loss)));
        let accuracy = self.eval_accuracy.map(|share| format!(", accuracy {:.1} %", 100.0 * share));
        let beside = accuracy.or_else(perplexity).unwrap_or_default();
        lines.extend(evaluation.map(|line| line + &beside));
        let known = if self.of_images() { "by frequency" } else { "unigram model" };
        lines.extend(with_bits(known, self.unigram_loss, self.unigram_bits_per_byte));
        lines.join("\n")
    }

    /// `report.md`.
    pub(crate) fn markdown(&self) -> String {
        let state = match &self.state {
            JobState::Failed { reason, .. } => format!("failed: {reason}"),
            JobState::Stopped => "stopped".to_owned(),
            JobState::Done => "done".to_owned(),
            JobState::Waiting { .. } | JobState::Preparing | JobState::Running => "not ended".to_owned(),
        };
        let mut text = format!("# {} ({})\n\n{state}\n\n```text\n{}\n```\n", self.name, self.job, self.summary());
        if !self.notices.is_empty() {
            text.push_str("\n## Notices\n\n");
        }
        for notice in &self.notices {
            text.push_str(&format!("- step {}: {}\n", notice.step, notice.text));
        }
        text.push_str(&recoveries::section(&self.recoveries, self.useful_share));
        if let Some(data) = &self.data {
            // Of tokens alone, nobody knows the text.
            let per_token = match data.bytes_per_token {
                0.0 => String::new(),
                bytes => format!(", {bytes:.3} bytes per token"),
            };
            let unit = self.unit();
            text.push_str(&format!(
                "\n## Data\n\n{} files, {} {unit}s to train on, {} held out{per_token}\n",
                data.files, data.train_tokens, data.eval_tokens
            ));
        }
        text.push_str(
            "\n## Placement\n\n| stage | CompNode | ops | from | to | parameters |\n|---|---|---|---|---|---|\n",
        );
        for stage in &self.stages {
            let end = |op: Option<&String>| op.cloned().unwrap_or_default();
            let (first, last) = (end(stage.ops.first()), end(stage.ops.last()));
            let (number, compnode) = (stage.stage, &stage.compnode);
            let (ops, parameters) = (stage.ops.len(), stage.parameters);
            text.push_str(&format!("| {number} | {compnode} | {ops} | {first} | {last} | {parameters} |\n"));
        }
        if !self.links.is_empty() {
            text.push_str("\n## Links\n\n| from | to | MB | dense MB | saved | codec |\n|---|---|---|---|---|---|\n");
        }
        for link in &self.links {
            let (mb, dense) = (link.bytes as f64 / 1e6, link.dense_bytes as f64 / 1e6);
            let (from, to, codec, saved) =
                (&link.from, &link.to, &link.codec, 100.0 * (1.0 - mb / dense.max(1e-12)).max(0.0));
            text.push_str(&format!("| {from} | {to} | {mb:.3} | {dense:.3} | {saved:.1} % | {codec} |\n"));
        }
        if !self.links.is_empty() {
            text.push_str("\n![loss against bytes sent](loss-bytes.svg)\n");
        }
        let unit = self.unit();
        text.push_str(&match self.missing_steps {
            Some(0) => format!("\nEvery step is in `metrics.jsonl`; losses are in nats per {unit}.\n"),
            None => format!(
                "\nThe steps are in `metrics.jsonl`; whether all are is not known, as `run.json` cannot be read. Losses are in \
                 nats per {unit}.\n"
            ),
            Some(missing) => format!(
                "\n`metrics.jsonl` has no figures of {missing} of {} steps, and this report goes without them; losses are in \
                 nats per {unit}.\n",
                self.step
            ),
        });
        text
    }
}

/// Steps of which the median time is taken.
const TIMED_STEPS: usize = 1 << 16;

/// What is remembered of the steps while they are read.
#[derive(Debug)]
struct Totals {
    last_losses: VecDeque<f64>,
    eval_loss: Option<f64>,
    eval_accuracy: Option<f64>,
    tokens: u64,
    tokens_per_step: Option<f64>,
    train_s: f64,
    step_s: Thinned<f64>,
    links: BTreeMap<Flow, Carried>,
    recoveries: Recoveries,
}

/// What goes one way between two CompNodes by one codec; reports list them in this order.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Flow {
    from: String,
    to: String,
    codec: String,
}

/// How much of it went.
#[derive(Clone, Copy, Debug, Default)]
struct Carried {
    /// As encoded, with headers.
    bytes: u64,
    /// The same tensors as dense fp32.
    dense_bytes: u64,
}

impl Default for Totals {
    fn default() -> Self {
        Self {
            last_losses: VecDeque::with_capacity(LAST_STEPS),
            eval_loss: None,
            eval_accuracy: None,
            tokens: 0,
            tokens_per_step: None,
            train_s: 0.0,
            step_s: Thinned::new(TIMED_STEPS),
            links: BTreeMap::new(),
            recoveries: Recoveries::default(),
        }
    }
}

impl Totals {
    fn add(&mut self, step: &StepMetrics) {
        if self.last_losses.len() == LAST_STEPS {
            self.last_losses.pop_front();
        }
        self.last_losses.push_back(step.loss);
        self.eval_loss = step.eval_loss.or(self.eval_loss);
        self.eval_accuracy = step.eval_accuracy.or(self.eval_accuracy);
        self.tokens += step.tokens;
        self.tokens_per_step = Some(step.tokens as f64);
        self.train_s += step.step_s;
        self.step_s.push(step.step_s);
        self.recoveries.add(step);
        for link in &step.links {
            let flow = Flow { from: link.from.clone(), to: link.to.clone(), codec: link.codec.clone() };
            let carried = self.links.entry(flow).or_default();
            carried.bytes += link.bytes;
            carried.dense_bytes += link.dense_bytes;
        }
    }

    fn links(self) -> Vec<LinkTotal> {
        let link = |(flow, carried)| {
            let (Flow { from, to, codec }, Carried { bytes, dense_bytes }) = (flow, carried);
            LinkTotal { from, to, bytes, dense_bytes, codec }
        };
        self.links.into_iter().map(link).collect()
    }
}

fn median(mut values: Vec<f64>) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied()
}

#[cfg(test)]
mod tests {
    use std::f64::consts::LN_2;

    use fusionllm_protocol::Generation;

    use super::*;
    use crate::testing;

    fn totals(metrics: &[StepMetrics]) -> Totals {
        let mut totals = Totals::default();
        metrics.iter().for_each(|m| totals.add(m));
        totals
    }

    #[test]
    fn a_report_says_what_came_out() {
        let record = JobRecord {
            state: JobState::Done,
            step: 6,
            loss: Some(2.0),
            generation: Generation(1),
            ..JobRecord::new(JobId(3), testing::spec(&[]), PathBuf::from("/runs/x"))
        };
        let metrics: Vec<_> = (1..=6).map(|step| testing::metrics(step, 4.0 - step as f64 / 2.0)).collect();
        let data = DataReport {
            files: 2,
            train_tokens: 900,
            eval_tokens: 100,
            bytes_per_token: 2.0,
            unigram_loss: 4.0 * LN_2,
            ..DataReport::default()
        };
        let notice = Notice { step: 4, text: "a checkpoint could not be written".to_owned() };
        let report = RunReport {
            notices: vec![notice],
            missing_steps: Some(0),
            ..RunReport::of(&record, totals(&metrics), Some(data), None)
        };
        assert_eq!((report.tokens, report.tokens_per_s), (6 * 32, Some(32.0 / 2.0)));
        assert_eq!(report.eval_loss, Some(1.0));
        assert_eq!(report.unigram_bits_per_byte, Some(2.0));
        assert_eq!((report.links.len(), report.links[0].bytes), (1, 2100));
        let text = report.markdown();
        assert!(
            text.contains("# run (job 3)")
                && text.contains("unigram model")
                && text.contains("## Notices\n\n- step 4: a checkpoint could not be written\n")
                && text.contains("| a | b | 0.002 | 0.004 | 50.0 % |")
                && text.contains("Every step is in `metrics.jsonl`")
        );
        let text = RunReport { missing_steps: Some(2), ..report.clone() }.markdown();
        assert!(text.contains("no figures of 2 of 6 steps") && !text.contains("Every step"), "{text}");
        let text = RunReport { missing_steps: None, ..report.clone() }.markdown();
        assert!(text.contains("whether all are is not known") && !text.contains("Every step"), "{text}");
        let json = serde_json::to_value(&report).unwrap();
        assert_eq!((&json["state"], &json["step"]), (&"done".into(), &6.into()));
    }

    #[test]
    fn a_run_without_a_step_has_a_report_too() {
        let record = JobRecord {
            state: JobState::Stopped,
            generation: Generation(1),
            ..JobRecord::new(JobId(1), testing::spec(&[]), PathBuf::from("/runs/x"))
        };
        let report = RunReport::of(&record, Totals::default(), None, None);
        assert_eq!((report.loss, report.tokens_per_s), (None, None));
        assert!(report.markdown().contains("stopped") && report.summary().starts_with("0 of 6 steps"));
    }
}
