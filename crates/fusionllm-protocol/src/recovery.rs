//! What a job's recoveries took, and what is said of one that stands still.

use std::fmt;

use serde::{Deserialize, Serialize};

/// What a job had to recover from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Fault {
    /// CompNodes were gone.
    Lost,
    /// A CompNode said that it could not go on.
    Failed,
    /// CompNodes were there, and nothing went on.
    Stalled,
    /// The broker was gone, and was started again.
    BrokerRestart,
    /// CompNodes were to leave, and their work moved to others.
    Left,
    /// CompNodes were there again, and the work moved to them, too.
    Joined,
    /// CompNodes computed slower or faster than planned, and the work was divided anew.
    Drifted,
}

impl Fault {
    /// The same in a word or two.
    pub fn name(self) -> &'static str {
        match self {
            Self::Lost => "lost",
            Self::Failed => "failed",
            Self::Stalled => "stalled",
            Self::BrokerRestart => "broker restart",
            Self::Left => "left",
            Self::Joined => "joined",
            Self::Drifted => "speed changed",
        }
    }
}

/// How a job came back from a fault, in seconds of the broker's clock: nothing is counted twice, so that the phases add up
/// to the time for which it stood still.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Recovery {
    /// What the job had to recover from.
    pub kind: Fault,
    /// Names of the CompNodes that it was about, also of those that were lost before it was back.
    pub who: Vec<String>,
    /// Updates that were done when it happened.
    pub step: u64,
    /// Of these, those that are done again.
    pub lost_steps: u64,
    /// CompNodes with which it goes on.
    pub compnodes: u32,
    /// Silence before it was known: 0 where a connection was closed or somebody said so; after a restart of the broker, the
    /// time since it had last written a step.
    pub detect_s: f64,
    /// Until it was placed again: reading the checkpoint, waiting for processes that are started again, planning.
    pub decide_s: f64,
    /// Until all CompNodes were ready, with their weights.
    pub build_s: f64,
    /// From the start until the first step was reported by all.
    pub refill_s: f64,
}

impl Recovery {
    /// Seconds for which the job stood still.
    pub fn total_s(&self) -> f64 {
        self.detect_s + self.decide_s + self.build_s + self.refill_s
    }

    /// Names of the CompNodes for people, and nothing where there are none.
    pub fn names(&self) -> String {
        names(&self.who)
    }

    /// What has happened, for people.
    pub fn cause(&self) -> String {
        cause(self.kind, &self.who, self.step)
    }
}

/// What has happened to a job after `step`, for people.
pub fn cause(kind: Fault, who: &[String], step: u64) -> String {
    let compnodes = if who.len() == 1 { "CompNode" } else { "CompNodes" };
    let names = names(who);
    match kind {
        Fault::Lost => format!("{compnodes} {names} vanished after step {step}"),
        Fault::Failed => format!("{compnodes} {names} failed after step {step}"),
        Fault::Stalled if who.is_empty() => format!("nothing went on after step {step}"),
        Fault::Stalled => format!("nothing came from {compnodes} {names} after step {step}"),
        Fault::BrokerRestart => format!("the broker restarted after step {step}"),
        Fault::Joined => format!("{compnodes} {names} came to the job after step {step}"),
        Fault::Drifted => format!("the work was divided anew after step {step}, by the speeds of {compnodes} {names}"),
        Fault::Left => format!("{compnodes} {names} left after step {step}"),
    }
}

fn names(who: &[String]) -> String {
    who.iter().map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ")
}

/// Why a job that is at work does no step at present.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Standstill {
    /// For how many seconds.
    pub for_s: f64,
    /// Whether it is on its way back; else it only waits.
    pub is_recovering: bool,
    /// Why, in one line.
    pub reason: String,
}

impl fmt::Display for Standstill {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { for_s, is_recovering, reason } = self;
        match is_recovering {
            true => write!(f, "recovering for {for_s:.0} s: {reason}"),
            false => write!(f, "running, no step for {for_s:.0} s: {reason}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_has_happened_is_said_in_words() {
        let who = |names: &[&str]| names.iter().map(|&n| n.to_owned()).collect::<Vec<_>>();
        assert_eq!(cause(Fault::Lost, &who(&["a"]), 5), "CompNode `a` vanished after step 5");
        assert_eq!(cause(Fault::Lost, &who(&["a", "b"]), 5), "CompNodes `a`, `b` vanished after step 5");
        assert_eq!(cause(Fault::BrokerRestart, &[], 5), "the broker restarted after step 5");
        let standstill = Standstill { for_s: 12.4, is_recovering: true, reason: "reading".to_owned() };
        assert_eq!(standstill.to_string(), "recovering for 12 s: reading");
    }
}
