//! What the user of a job must see. What repeats is counted, and told again at ten times, a hundred times and so on.

use std::collections::BTreeMap;

use fusionllm_planner::Placement;
use fusionllm_protocol::{JobEvent, JobId, Notice};

use super::{Action, Core};

/// Kinds of which a job's notices are counted. It has far fewer.
const MOST_KINDS: usize = 1000;

/// How notices begin of which only steps tell one from the next. Of others no word is left out: they may say where a
/// file of the user's has gone.
const FOLDED: [&str; 2] = ["there is no checkpoint of step ", "an old checkpoint was not removed: "];

/// How often each kind of notice has come.
#[derive(Debug, Default)]
pub(super) struct Told(BTreeMap<String, Count>);

#[derive(Debug, Default)]
struct Count {
    times: u64,
    told: u64,
    last: String,
}

impl Told {
    /// One more notice: the text to tell now, if any is.
    fn take(&mut self, text: String) -> Option<String> {
        let is_folded = FOLDED.iter().any(|begins| text.starts_with(begins));
        let kind = if is_folded { without_steps(&text) } else { text.clone() };
        if !self.0.contains_key(&kind) && self.0.len() >= MOST_KINDS {
            return Some(text);
        }
        let count = self.0.entry(kind).or_default();
        count.times += 1;
        count.last = text;
        let is_due = count.times == count.told.saturating_mul(10).max(1);
        is_due.then(|| count.tell())
    }

    /// What has come more often than was told.
    fn rest(&mut self) -> Vec<String> {
        self.0.values_mut().filter(|count| count.times > count.told).map(Count::tell).collect()
    }
}

impl Count {
    fn tell(&mut self) -> String {
        self.told = self.times;
        match self.times {
            1 => self.last.clone(),
            times => format!("{} (the like {times} times so far)", self.last),
        }
    }
}

/// The text without the numbers of steps in it, by which repetitions differ.
fn without_steps(text: &str) -> String {
    let mut parts = text.split("step");
    let mut kind = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        let number = part.strip_prefix([' ', '-']).unwrap_or(part);
        kind.push_str("step ");
        kind.push_str(number.trim_start_matches(|c: char| c.is_ascii_digit()));
    }
    kind
}

impl Core {
    /// Notices: kept beside the job's metrics, and told to whoever follows.
    pub(super) fn notices(&mut self, job: JobId, texts: Vec<String>) -> Vec<Action> {
        let Some(known) = self.jobs.get_mut(&job) else { return Vec::new() };
        let due: Vec<String> = texts.into_iter().filter_map(|text| known.told.take(text)).collect();
        self.tell(job, due)
    }

    /// What was only counted of a job that ends. What the next start has to say is new again.
    pub(super) fn told_last(&mut self, job: JobId) -> Vec<Action> {
        let counted = self.jobs.get_mut(&job).map(|known| std::mem::take(&mut known.told));
        self.tell(job, counted.map(|mut told| told.rest()).unwrap_or_default())
    }

    fn tell(&self, job: JobId, texts: Vec<String>) -> Vec<Action> {
        let Some(record) = self.jobs.get(&job).map(|known| &known.record) else { return Vec::new() };
        let kept = |text: String| {
            let notice = Notice { step: record.step, text: text.clone() };
            [Action::Notice { run_dir: record.run_dir.clone(), notice }, Action::Emit(JobEvent::Notice { job, text })]
        };
        texts.into_iter().flat_map(kept).collect()
    }
}

/// Who of a placement makes activations anew.
pub(super) fn of_recompute(placement: &Placement) -> Option<String> {
    let names = placement.recompute.iter().filter_map(|node| placement.compnodes.get(node.index()));
    let names: Vec<&str> = names.map(String::as_str).collect();
    (!names.is_empty()).then(|| {
        format!(
            "{} in BP, to save memory: placement.recompute",
            match names[..] {
                [one] => format!("CompNode `{one}` makes activations anew"),
                _ => format!("CompNodes `{}` make activations anew", names.join("`, `")),
            }
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_repeats_is_counted() {
        let mut told = Told::default();
        let mut shown = Vec::new();
        for step in 1..=250 {
            shown.extend(told.take(format!("there is no checkpoint of step {step}: /ck/step-{step}.partial-1: full")));
            shown.extend(told.take(format!("CompNode `{step}`: slow")).filter(|_| step < 3));
        }
        shown.extend(told.rest());
        let of = |step: u32| format!("there is no checkpoint of step {step}: /ck/step-{step}.partial-1: full");
        let times = |step: u32| format!("{} (the like {step} times so far)", of(step));
        let names = [1, 2].map(|n| format!("CompNode `{n}`: slow"));
        assert_eq!(shown, [of(1), names[0].clone(), names[1].clone(), times(10), times(100), times(250)]);
        assert!(told.rest().is_empty());
    }

    #[test]
    fn where_files_have_gone_is_told_of_each() {
        let mut told = Told::default();
        let moved =
            |step: u64| format!("/ck/step-{step} holds files that are not of this run: it is step-{step}.leftover now");
        for step in [1, 2, 1] {
            assert_eq!(told.take(moved(step)).is_some(), told.0[&moved(step)].times == 1);
        }
    }
}
