//! What a run has recovered from, and which share of its time was useful.

use fusionllm_planner::format_seconds;
use fusionllm_protocol::{Recovery, StepMetrics};

/// So many recoveries are shown one by one, the newest; the sum has all.
const MOST_SHOWN: usize = 100;

/// What is remembered of recoveries and of the time while steps are read.
#[derive(Debug, Default)]
pub(super) struct Recoveries {
    pub(super) all: Vec<Recovery>,
    /// When the step before was written.
    last_unix_s: Option<f64>,
    /// Steps whose time is known, and seconds from the first one to the last, pauses by hand left out.
    timed: u64,
    wall_s: f64,
}

impl Recoveries {
    pub(super) fn add(&mut self, step: &StepMetrics) {
        self.all.extend(step.recoveries.iter().cloned());
        let Some(now) = step.unix_s else { return };
        let before = self.last_unix_s.replace(now).filter(|_| !step.starts);
        self.timed += 1;
        self.wall_s += match before {
            // Clocks may be set back.
            // Reports of several steps may come at once.
            Some(before) => (now - before).max(0.0),
            None => {
                // The lines before were dropped, as their steps are done again.
                let stood = |r: &Recovery| r.total_s() + r.lost_steps as f64 * step.step_s;
                step.step_s + step.recoveries.iter().map(stood).sum::<f64>()
            }
        };
    }

    /// The share of the time since the first step that a run of `step_s` seconds a step without any fault would have
    /// taken. Nothing where lines have no time.
    pub(super) fn useful_share(&self, step_s: Option<f64>) -> Option<f64> {
        (self.wall_s > 0.0).then_some((self.timed as f64 * step_s? / self.wall_s).min(1.0))
    }
}

/// The recoveries as a section of `report.md`; nothing if there were none.
pub(super) fn section(recoveries: &[Recovery], useful_share: Option<f64>) -> String {
    if recoveries.is_empty() {
        return String::new();
    }
    let mut text = String::from(
        "\n## Recoveries\n\n| what | CompNodes | after step | noticed after | placed after | ready after | first step after | in all | \
         steps done again | goes on with |\n|---|---|---|---|---|---|---|---|---|---|\n",
    );
    let older = recoveries.len().saturating_sub(MOST_SHOWN);
    for recovery in recoveries.iter().skip(older) {
        let Recovery { kind, step, lost_steps, compnodes, .. } = recovery;
        let (kind, names, seconds) = (kind.name(), recovery.names(), phases(std::slice::from_ref(recovery)));
        text.push_str(&format!("| {kind} | {names} | {step} | {seconds} | {lost_steps} | {compnodes} |\n"));
    }
    let (count, again): (usize, u64) = (recoveries.len(), recoveries.iter().map(|r| r.lost_steps).sum());
    text.push_str(&format!("| all {count} | | | {} | {again} | |\n", phases(recoveries)));
    if older > 0 {
        text.push_str(&format!("\nThe first {older} are not shown, and count in the last line.\n"));
    }
    if let Some(share) = useful_share {
        text.push_str(&format!(
            "\nUseful: {:.1} % of the time since the first step (steps × the median step; the rest are recoveries, steps done \
             again, evaluations and slower steps).\n",
            share * 100.0
        ));
    }
    text
}

/// In one line, for the end of a run.
pub(super) fn line(recoveries: &[Recovery], useful_share: Option<f64>) -> Option<String> {
    if recoveries.is_empty() {
        return None;
    }
    let seconds = recoveries.iter().map(Recovery::total_s).sum();
    let again: u64 = recoveries.iter().map(|r| r.lost_steps).sum();
    let useful =
        useful_share.map_or_else(String::new, |share| format!("; {:.1} % of the time was useful", share * 100.0));
    let (count, seconds) = (recoveries.len(), format_seconds(seconds));
    Some(format!("{count} in {seconds}, {again} steps were done again{useful}"))
}

/// The cells of the phases and of their sum.
fn phases(recoveries: &[Recovery]) -> String {
    let sum = |part: fn(&Recovery) -> f64| format_seconds(recoveries.iter().map(part).sum());
    let parts: [fn(&Recovery) -> f64; 5] =
        [|r| r.detect_s, |r| r.decide_s, |r| r.build_s, |r| r.refill_s, Recovery::total_s];
    parts.map(sum).join(" | ")
}

#[cfg(test)]
mod tests {
    use fusionllm_protocol::Fault;

    use super::*;
    use crate::testing;

    fn recovery(step: u64) -> Recovery {
        Recovery {
            kind: Fault::Lost,
            who: vec!["b".to_owned()],
            step,
            lost_steps: 2,
            compnodes: 1,
            detect_s: 4.0,
            decide_s: 5.0,
            build_s: 0.5,
            refill_s: 0.5,
        }
    }

    fn step(step: u64, unix_s: f64) -> StepMetrics {
        StepMetrics { unix_s: Some(unix_s), step_s: 1.0, ..testing::metrics(step, 1.0) }
    }

    fn share(steps: &[StepMetrics]) -> Option<f64> {
        let mut recoveries = Recoveries::default();
        steps.iter().for_each(|s| recoveries.add(s));
        recoveries.useful_share(Some(1.0))
    }

    #[test]
    fn time_without_steps_is_not_useful_but_pauses_by_hand_do_not_count() {
        assert_eq!(share(&[step(1, 10.0), step(2, 11.0)]), Some(1.0));
        let again = StepMetrics { recoveries: vec![recovery(3)], ..step(2, 17.0) };
        assert_eq!(share(&[step(1, 10.0), again]), Some(2.0 / 8.0));
        let by_hand = StepMetrics { starts: true, ..step(2, 9000.0) };
        assert_eq!(share(&[step(1, 10.0), by_hand]), Some(1.0));
        // It began anew: what came before the first line is known from the recovery.
        let anew = StepMetrics { recoveries: vec![recovery(3)], ..step(1, 50.0) };
        assert_eq!(share(&[anew]), Some(1.0 / 13.0));
        assert_eq!(share(&[testing::metrics(1, 1.0)]), None, "a line of an earlier build");
        assert_eq!(share(&[step(1, 10.0), step(2, 3.0)]), Some(1.0), "the clock was set back");
    }

    #[test]
    fn a_report_has_a_table_with_their_sum() {
        let text = section(&[recovery(5), recovery(9)], Some(0.5));
        let row = "| lost | `b` | 9 | 4.00 s | 5.00 s | 500.0 ms | 500.0 ms | 10.0 s | 2 | 1 |\n";
        let sum = "| all 2 | | | 8.00 s | 10.0 s | 1.00 s | 1.00 s | 20.0 s | 4 | |\n";
        assert!(text.contains(row) && text.contains(sum) && text.contains("Useful: 50.0 % of the time"), "{text}");
        assert_eq!(section(&[], Some(1.0)), "");
        let many = section(&vec![recovery(5); MOST_SHOWN + 3], None);
        assert!(many.contains("The first 3 are not shown") && !many.contains("Useful"), "{many}");
        let expected = "1 in 10.0 s, 2 steps were done again; 91.0 % of the time was useful";
        assert_eq!(line(&[recovery(5)], Some(0.91)).as_deref(), Some(expected));
    }
}
