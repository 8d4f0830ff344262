//! How a job goes: a bar on a terminal, plain lines elsewhere, JSON lines on request.

use std::io::IsTerminal;
use std::time::Instant;

use fusionllm_planner::{format_perplexity, format_seconds};
use fusionllm_protocol::{DataReport, JobEvent, JobState, Recovery, StepMetrics};
use indicatif::{ProgressBar, ProgressStyle};

use crate::render;

/// Steps over which speed and time left are averaged.
const WINDOW: usize = 20;
/// Plain lines are written for about this many steps of a job.
const PLAIN_LINES: u64 = 20;

/// Shows the events of one job.
pub(crate) struct Progress {
    output: Output,
    steps: u64,
    recent: Vec<(f64, u64)>,
    began: Instant,
    /// The last evaluation.
    last_eval: Option<Evaluation>,
    /// What is trained on.
    unit: &'static str,
    /// Whether it was at work before: what it waits for then is how it comes back.
    has_trained: bool,
}

/// What an evaluation found.
#[derive(Clone, Copy)]
struct Evaluation {
    step: u64,
    loss: f64,
    accuracy: Option<f64>,
}

impl std::fmt::Display for Evaluation {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let loss = self.loss;
        match self.accuracy {
            Some(share) => write!(f, "{loss:.4} (accuracy {:.1} %)", 100.0 * share),
            None => write!(f, "{loss:.4} (perplexity {})", format_perplexity(loss)),
        }
    }
}

enum Output {
    Bar(ProgressBar),
    Plain,
    Json,
}

impl Progress {
    /// Progress towards `steps` updates.
    pub(crate) fn new(json: bool, steps: u64) -> Self {
        let output = if json {
            Output::Json
        } else if std::io::stderr().is_terminal() {
            let bar = ProgressBar::new(steps);
            if let Ok(style) = ProgressStyle::with_template("{bar:30.cyan/blue} {pos}/{len} {msg}") {
                bar.set_style(style);
            }
            Output::Bar(bar)
        } else {
            Output::Plain
        };
        Self {
            output,
            steps,
            recent: Vec::new(),
            began: Instant::now(),
            last_eval: None,
            unit: "tokens",
            has_trained: false,
        }
    }

    /// Shows one event.
    pub(crate) fn event(&mut self, event: &JobEvent) -> anyhow::Result<()> {
        if let Output::Json = self.output {
            return render::json(event, false);
        }
        match event {
            JobEvent::State { state, .. } => match state {
                JobState::Running => {
                    let text = if self.has_trained { "recovering: its first step is under way" } else { "training" };
                    self.has_trained = true;
                    self.note(text)
                }
                JobState::Waiting { reason } if self.has_trained => self.note(&format!("recovering: {reason}")),
                JobState::Preparing if self.has_trained => self.note("recovering: the CompNodes prepare their parts"),
                JobState::Waiting { .. } | JobState::Preparing => self.note(&render::state(state)),
                JobState::Done | JobState::Failed { .. } | JobState::Stopped => self.finish(),
            },
            JobEvent::Reading { done, total, .. } => self.note(&render::reading(*done, *total)),
            JobEvent::Data { data, .. } => {
                self.unit = if data.classes.is_some() { "images" } else { "tokens" };
                self.note(&of_data(data))
            }
            JobEvent::Step { metrics, .. } => self.step(metrics),
            JobEvent::Notice { text, .. } => self.note(&format!("note: {text}")),
            JobEvent::Checkpoint { step, .. } => self.note(&format!("checkpoint at step {step}")),
            _ => Ok(()),
        }
    }

    fn step(&mut self, metrics: &StepMetrics) -> anyhow::Result<()> {
        for recovery in &metrics.recoveries {
            self.note(&recovered(recovery))?;
        }
        self.recent.push((metrics.step_s, metrics.tokens));
        if self.recent.len() > WINDOW {
            self.recent.remove(0);
        }
        // One of steps that are done again does not count any more.
        let before = self.last_eval.filter(|last| last.step <= metrics.step);
        let accuracy = metrics.eval_accuracy;
        self.last_eval = metrics.eval_loss.map(|loss| Evaluation { step: metrics.step, loss, accuracy }).or(before);
        let seconds: f64 = self.recent.iter().map(|r| r.0).sum();
        let tokens: u64 = self.recent.iter().map(|r| r.1).sum();
        let left = seconds / self.recent.len() as f64 * self.steps.saturating_sub(metrics.step) as f64;
        let eval = self.last_eval.map_or_else(String::new, |last| format!(" eval {last}"));
        let (loss, speed, unit) = (metrics.loss, tokens as f64 / seconds, self.unit);
        let text = format!("loss {loss:.4}{eval} {speed:.0} {unit}/s, {} left", duration(left));
        match &self.output {
            Output::Bar(bar) => {
                bar.set_position(metrics.step);
                bar.set_message(text);
                Ok(())
            }
            Output::Plain if self.is_shown(metrics) => {
                render::line(&format!("step {}/{}: {text}", metrics.step, self.steps))
            }
            Output::Plain | Output::Json => Ok(()),
        }
    }

    fn is_shown(&self, metrics: &StepMetrics) -> bool {
        let every = (self.steps / PLAIN_LINES).max(1);
        metrics.step == 1 || metrics.step.is_multiple_of(every) || metrics.eval_loss.is_some()
    }

    fn note(&self, text: &str) -> anyhow::Result<()> {
        match &self.output {
            Output::Bar(bar) => {
                bar.println(text);
                Ok(())
            }
            Output::Plain => render::line(text),
            Output::Json => Ok(()),
        }
    }

    fn finish(&self) -> anyhow::Result<()> {
        if let Output::Bar(bar) = &self.output {
            bar.finish();
        }
        self.note(&format!("ended after {}", duration(self.began.elapsed().as_secs_f64())))
    }
}

/// What the data is, in one line.
fn of_data(data: &DataReport) -> String {
    let DataReport { files, train_tokens: train, eval_tokens: held_out, unigram_loss: loss, .. } = data;
    match data.classes {
        Some(classes) => format!(
            "data: {files} files, {train} training images of {classes} classes, {held_out} held out; by frequency alone, the \
             loss is {loss:.4}"
        ),
        None => format!(
            "data: {files} files, {train} training tokens, {held_out} held out; a unigram model's loss is {loss:.4}"
        ),
    }
}

/// What a recovery took, in one line.
fn recovered(recovery: &Recovery) -> String {
    let Recovery { lost_steps, compnodes, .. } = recovery;
    let [all, detect, decide, build, refill] =
        [recovery.total_s(), recovery.detect_s, recovery.decide_s, recovery.build_s, recovery.refill_s]
            .map(format_seconds);
    let on = if *compnodes == 1 { "1 CompNode".to_owned() } else { format!("{compnodes} CompNodes") };
    format!(
        "training again after {all}: noticed after {detect}, placed after {decide}, ready after {build}, first step after \
         {refill}; {lost_steps} steps are done again, on {on}"
    )
}

/// Seconds as people say them.
fn duration(seconds: f64) -> String {
    let seconds = seconds.max(0.0).round() as u64;
    match (seconds / 3600, seconds / 60 % 60, seconds % 60) {
        (0, 0, s) => format!("{s} s"),
        (0, m, s) => format!("{m} min {s:02} s"),
        (h, m, _) => format!("{h} h {m:02} min"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_read_well() {
        assert_eq!(duration(7.4), "7 s");
        assert_eq!(duration(187.0), "3 min 07 s");
        assert_eq!(duration(7300.0), "2 h 01 min");
    }
}
