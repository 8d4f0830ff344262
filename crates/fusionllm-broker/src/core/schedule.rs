//! Which CompNodes a waiting job gets, and what they are told.

use std::sync::Arc;
use std::time::Duration;

use fusionllm_planner::{Cluster, NodeIndex, Placement, Plan, plan};
use fusionllm_protocol::{
    Assignment, DataSpec, FromBroker, Generation, JobId, JobSpec, JobState, PeerRecord, WeightSource,
};

use super::run::{Run, param_names};
use super::survey::WorkKey;
use super::{Action, ConnectionId, Core, Job, OpenRun, RunKey, StartPoint};
use crate::run_dir::PlacementFile;

impl Core {
    /// Gives waiting jobs, oldest first, the CompNodes they need. A job that must wait holds back those behind it.
    pub(super) fn schedule(&mut self, now: Duration) -> Vec<Action> {
        let mut actions = Vec::new();
        let is_waiting = |job: &Job| matches!(job.record.state, JobState::Waiting { .. });
        let waiting: Vec<JobId> = self.jobs.iter().filter(|(_, job)| is_waiting(job)).map(|(&id, _)| id).collect();
        let mut held_back_by = None;
        for job in waiting {
            let chosen = match held_back_by {
                None => self.choose(job).and_then(|members| self.surveyed(job, members)),
                Some(first) => Err(format!("{first} comes first")),
            };
            match chosen {
                Ok(members) => actions.extend(self.assign(job, members, now)),
                Err(reason) => {
                    held_back_by = held_back_by.or(Some(job));
                    let state = JobState::Waiting { reason };
                    if self.jobs.get(&job).is_some_and(|j| j.record.state != state) {
                        actions.extend(self.set_state(job, state));
                    }
                }
            }
        }
        actions.extend(self.survey.advance(&self.compnodes, now));
        actions
    }

    /// The CompNodes again, once all is known of them that a plan needs.
    fn surveyed(&mut self, job: JobId, members: Vec<ConnectionId>) -> Result<Vec<ConnectionId>, String> {
        let Some(Job { record, start: Some(start), .. }) = self.jobs.get(&job) else {
            return Err("it is not known".to_owned());
        };
        if start.cluster.is_some() || self.survey.is_complete(&members, WorkKey::of(&record.spec, start)) {
            return Ok(members);
        }
        self.survey.want(&record.spec, start, &members);
        Err("machines and links are being measured".to_owned())
    }

    /// The CompNodes for a job, data owner first, or what it waits for.
    fn choose(&self, job: JobId) -> Result<Vec<ConnectionId>, String> {
        let Some(Job { record, start: Some(start), .. }) = self.jobs.get(&job) else {
            return Err("it is not known".to_owned());
        };
        let spec = &record.spec;
        let mut idle = self.compnodes.idle();
        if let Some(owner) = &spec.data.owner {
            let at = idle.iter().position(|&c| self.compnodes.name(c) == *owner);
            let at = at.ok_or_else(|| format!("CompNode `{owner}`, the data's owner, is not idle"))?;
            let owner = idle.remove(at);
            idle.insert(0, owner);
        }
        let needed = least_compnodes(spec, start);
        if idle.len() < needed {
            return Err(format!("{} of {needed} CompNodes are idle", idle.len()));
        }
        if spec.placement.compnodes.is_some() || !spec.placement.stages.is_empty() || start.cluster.is_some() {
            idle.truncate(needed);
        }
        Ok(idle)
    }

    fn assign(&mut self, job: JobId, members: Vec<ConnectionId>, now: Duration) -> Vec<Action> {
        let Some(Job { record, start: Some(start), .. }) = self.jobs.get(&job) else { return Vec::new() };
        let (start, spec) = (start.clone(), record.spec.clone());
        let cluster = match &start.cluster {
            Some(cluster) => self.as_if(cluster, &members),
            None => self.survey.inventory(&members, &self.compnodes, Some((&spec, &start)), now).cluster(),
        };
        let Plan { placement, prediction, simulated: predicted, .. } =
            match plan(&start.dag, &cluster, &spec.plan_spec()) {
                Ok(plan) => plan,
                Err(error) => {
                    return self.end(
                        job,
                        JobState::Failed { reason: error.to_string(), bad_input: true },
                        "no placement",
                    );
                }
            };
        // The strategy may leave some out, and has its own order.
        let named = |name: &String| members.iter().copied().find(|&m| self.compnodes.name(m) == *name);
        let members: Vec<ConnectionId> = placement.compnodes.iter().filter_map(named).collect();
        let Some(known) = self.jobs.get_mut(&job) else { return Vec::new() };
        known.record.generation = Generation(known.record.generation.0 + 1);
        let key = RunKey { job, generation: known.record.generation };
        let run_dir = known.record.run_dir.clone();
        for &member in &members {
            self.compnodes.take(member, key);
        }
        let mut actions = vec![Action::OpenRun(Box::new(OpenRun {
            key,
            run_dir,
            run: start.run.clone(),
            spec: spec.clone(),
            graph: start.graph.clone(),
            placement: PlacementFile::of(&placement, &start.dag, key.generation, prediction),
            predicted,
            start_step: start.step,
        }))];
        actions.extend(self.notices(job, start.notices.clone()));
        actions.extend(self.assignments(key, &spec, &start, &placement, &members));
        let run = Run::new(key, members, placement, &start, &spec);
        if let Some(known) = self.jobs.get_mut(&job) {
            known.run = Some(run);
            known.persisted = now;
        }
        actions.extend(self.set_state(job, JobState::Preparing));
        actions
    }

    /// The cluster of a file, whose devices the CompNodes stand for in their order.
    fn as_if(&self, cluster: &Cluster, members: &[ConnectionId]) -> Cluster {
        let first: Vec<usize> = (0..members.len()).collect();
        let mut cluster = cluster.select(&first);
        for (profile, &member) in cluster.compnodes.iter_mut().zip(members) {
            profile.name = self.compnodes.name(member);
        }
        cluster
    }

    fn assignments(
        &self,
        key: RunKey,
        spec: &JobSpec,
        start: &StartPoint,
        placement: &Placement,
        members: &[ConnectionId],
    ) -> Vec<Action> {
        let peers: Vec<PeerRecord> = members.iter().map(|&m| self.compnodes.addr(m)).collect();
        let mut actions = Vec::new();
        for (node, &to) in (0..).map(NodeIndex).zip(members) {
            let weights = start.weights.as_ref().map_or(WeightSource::Seed(spec.train.seed), |_| WeightSource::Broker);
            let takes_models = spec.data.tokenizer == DataSpec::MODEL;
            let holds = |op| placement.stages_of(node).any(|stage| stage.ops.contains(&op));
            let reads_data = [start.dag.input(), start.dag.label()].into_iter().flatten().any(holds);
            let assignment = Assignment {
                job: key.job,
                generation: key.generation,
                node,
                spec: spec.clone(),
                graph: start.graph.clone(),
                placement: placement.clone(),
                peers: peers.clone(),
                start_step: start.step,
                weights,
                tokenizer: start.origin.tokenizer().filter(|_| takes_models && reads_data).map(str::to_owned),
            };
            actions.push(Action::Send { to, message: FromBroker::Assign(Box::new(assignment)) });
            if let Some(from) = &start.weights {
                let params = param_names(&start.dag, placement, node);
                actions.push(Action::SendWeights { to, key, params, from: Arc::clone(from) });
            }
        }
        actions
    }
}

/// How many CompNodes a job needs at least.
pub(super) fn least_compnodes(spec: &JobSpec, start: &StartPoint) -> usize {
    let listed = spec.placement.stages.iter().map(|s| s.compnode as usize + 1).max().unwrap_or(1);
    let stood_for = start.cluster.as_ref().map_or(listed, |cluster| cluster.compnodes.len());
    spec.placement.compnodes.map_or(stood_for, |n| n as usize)
}
