//! What becomes of a placement by a fault, and what a status says of a job that stands still meanwhile.

use std::time::Duration;

use fusionllm_protocol::{Fault, JobState, RunKey, Standstill, cause};

use super::comeback::{Comeback, Phase};
use super::detector::SUSPECT;
use super::{Action, ConnectionId, Core, Job};

impl Core {
    /// A placement comes to nothing by a fault of these CompNodes, known after a silence. What comes before the job has done
    /// a step again belongs to the same recovery.
    pub(super) fn fault(&mut self, key: RunKey, kind: Fault, who: Vec<String>, silence: Duration, now: Duration) {
        let Some(job) = self.jobs.get_mut(&key.job) else { return };
        let Some(run) = job.run.as_ref().filter(|run| run.key == key) else { return };
        let begins = || Comeback::new(kind, Vec::new(), job.record.step, silence, now);
        let comeback = job.comeback.get_or_insert_with(begins);
        comeback.enter(Phase::Decide, now);
        comeback.add(who);
        comeback.members.clone_from(&run.members);
    }

    /// Names of the other members of a run that give no sign of life either.
    pub(super) fn silent_beside(&self, key: RunKey, gone: ConnectionId, now: Duration) -> Vec<String> {
        let run = self.jobs.get(&key.job).and_then(|job| job.run.as_ref()).filter(|run| run.key == key);
        let members = run.map(|run| run.members.as_slice()).unwrap_or_default();
        let is_silent = |&&m: &&ConnectionId| m != gone && self.compnodes.phi(m, now) >= SUSPECT;
        members.iter().filter(is_silent).map(|&m| self.compnodes.name(m)).collect()
    }

    /// Somebody has gone who had nothing to do any more: perhaps one of those with whom a job was lost.
    pub(super) fn gone_too(&mut self, gone: ConnectionId, name: &str) -> Vec<Action> {
        let was_member = |job: &Job| {
            job.comeback.as_ref().is_some_and(|c| c.members.contains(&gone) && !c.who.iter().any(|known| known == name))
        };
        let Some((&id, job)) = self.jobs.iter_mut().find(|(_, job)| was_member(job)) else { return Vec::new() };
        if let Some(comeback) = &mut job.comeback {
            comeback.add(vec![name.to_owned()]);
        }
        self.notices(id, vec![format!("CompNode `{name}` vanished, too")])
    }

    /// Why a job does no step at present, if it should.
    pub(super) fn standstill(&self, job: &Job) -> Option<Standstill> {
        let now = self.ticked.unwrap_or_default();
        let shown = |is_recovering, since: Duration, reason| {
            Some(Standstill { for_s: since.as_secs_f64(), is_recovering, reason })
        };
        if let Some(comeback) = &job.comeback {
            let doing = match &job.shown {
                JobState::Waiting { reason } => reason.as_str(),
                JobState::Preparing => "the CompNodes prepare their parts",
                JobState::Running => "its first step is under way",
                JobState::Done | JobState::Failed { .. } | JobState::Stopped => return None,
            };
            let cause = cause(comeback.kind, &comeback.who, comeback.step);
            let reason = if doing.starts_with(&cause) { doing.to_owned() } else { format!("{cause}; {doing}") };
            return shown(true, comeback.so_far(now), reason);
        }
        let run = job.run.as_ref().filter(|_| job.shown == JobState::Running)?;
        let is_silent = |&&m: &&ConnectionId| self.compnodes.is_away(m) || self.compnodes.phi(m, now) >= SUSPECT;
        let silent = run.members.iter().filter(is_silent);
        let names: Vec<String> = silent.map(|&m| format!("`{}`", self.compnodes.name(m))).collect();
        if names.is_empty() {
            return None;
        }
        let reason = format!("no sign of life of CompNode {}", names.join(", "));
        shown(false, now.saturating_sub(run.watchdog.moved), reason)
    }
}
