//! Which CompNodes a waiting job gets, and what they are told.

use std::sync::Arc;
use std::time::Duration;

use fusionllm_planner::{NodeIndex, Placement, Plan, PlanError, format_bytes};
use fusionllm_protocol::{
    Assignment, FromBroker, Generation, JobEvent, JobId, JobSpec, JobState, JobView, PeerRecord, RunKey,
    SnapshotSource, WeightSource,
};

use super::detector::SUSPECT;
use super::drift::slowed;
use super::notices::of_recompute;
use super::recovery::KeptAs;
use super::run::{Run, owner_of, param_names};
use super::snapshot_book::RecoveryPoint;
use super::snapshots::Sources;
use super::survey::WorkKey;
use super::{Action, ConnectionId, Core, Job, OpenRun, PlanInput, StartPoint, Unread, WEIGHTS};
use crate::run_dir::PlacementFile;
use crate::store::PlacedWork;

/// For so long a job that must wait holds back those behind it in any case.
const PATIENCE: Duration = Duration::from_secs(10);
/// After that it holds them back in every other period of this length, if there are enough CompNodes for it at all.
const TURN: Duration = Duration::from_secs(600);

impl Core {
    /// Gives waiting jobs, oldest first, the CompNodes they need. A job that must wait holds back those behind it, but
    /// never for ever while CompNodes are idle: see [`Self::holds_back`].
    pub(super) fn schedule(&mut self, now: Duration) -> Vec<Action> {
        let mut actions = Vec::new();
        // Nothing is placed that a restart would not know of.
        if self.trouble().is_some() {
            return self.survey.advance(&self.compnodes, now);
        }
        let is_waiting = |job: &Job| matches!(job.record.state, JobState::Waiting { .. }) && job.planning.is_none();
        let waiting: Vec<JobId> = self.jobs.iter().filter(|(_, job)| is_waiting(job)).map(|(&id, _)| id).collect();
        let mut held_back_by = None;
        for job in waiting {
            let too_large = self.too_large(job);
            let goes_on = self.jobs.get(&job).is_some_and(|job| job.recoveries.goes_on);
            if let Some(reason) = too_large.clone().filter(|_| !goes_on) {
                actions.extend(self.end(job, JobState::Failed { reason, bad_input: true }, "no device holds it"));
                continue;
            }
            let chosen = match (held_back_by, too_large) {
                // One that has been at work waits for a device that holds it.
                (None, Some(reason)) => Err(reason),
                (None, None) => self.choose(job).and_then(|members| self.surveyed(job, members)),
                (Some(first), _) => Err(format!("{first} comes first")),
            };
            match chosen {
                Ok(members) => {
                    if let Some(known) = self.jobs.get_mut(&job) {
                        known.around = None;
                    }
                    actions.extend(self.plan(job, members, now));
                }
                Err(reason) => {
                    if held_back_by.is_none() && self.holds_back(job, now) {
                        held_back_by = Some(job);
                    }
                    let state = JobState::Waiting { reason };
                    if let Some(known) = self.jobs.get_mut(&job).filter(|j| j.record.state != state) {
                        // What it waits for is found out anew after a restart: it need not be written.
                        known.record.state = state.clone();
                        actions.push(Action::Emit(JobEvent::State { job, state }));
                    }
                }
            }
        }
        actions.extend(self.survey.advance(&self.compnodes, now));
        actions
    }

    /// Why no device that is here can hold one op of a job. Found out before ops are measured: measuring one that does not
    /// fit may end the process.
    fn too_large(&self, job: JobId) -> Option<String> {
        let Job { record, start: Some(start), .. } = self.jobs.get(&job)? else { return None };
        let most = self.compnodes.largest_memory()?;
        let (dag, batch) = (&start.dag, record.spec.micro_batch_size() as usize);
        // At least its output, and its parameters with the gradients of those that are trained.
        let needs = |op: &fusionllm_graph::Op| {
            let params = op.params.iter().filter_map(|p| dag.params().get(p.index()));
            let copies = |p: &fusionllm_graph::Param| if p.frozen { 1 } else { 2 };
            let params = params.fold(0u64, |sum, p| sum.saturating_add(p.bytes().saturating_mul(copies(p))));
            op.output.bytes(batch).saturating_add(params)
        };
        let (bytes, op) = dag.ops().iter().map(|op| (needs(op), op)).max_by_key(|(bytes, _)| *bytes)?;
        (bytes > most).then(|| {
            format!(
                "op {} needs at least {} on one device, and the largest device here has {}: lower train.batch or the \
                 model's sizes, raise train.micro_batches, or let a larger machine join",
                op.name,
                format_bytes(bytes as f64),
                format_bytes(most as f64)
            )
        })
    }

    /// What only this job, which ends, wanted to have measured is not needed any more.
    pub(super) fn measure_no_more(&mut self, job: JobId) -> Vec<Action> {
        let key = |job: &Job| job.start.as_ref().map(|start| WorkKey::of(&job.record.spec, start));
        let Some(ended) = self.jobs.get(&job).and_then(key) else { return Vec::new() };
        let is_open = |job: &Job| !job.record.state.is_final();
        let is_wanted = self.jobs.iter().any(|(&id, other)| id != job && is_open(other) && key(other) == Some(ended));
        if is_wanted { Vec::new() } else { self.survey.cancel(ended) }
    }

    /// Whether a job that must wait holds back those behind it. At first it does, since what it waits for may be about to
    /// come. Later only one for which there are enough CompNodes, though others work on them now, and only half of the
    /// time: in turns of [`TURN`] smaller jobs may pass it, and may not, so that neither waits for ever.
    fn holds_back(&mut self, job: JobId, now: Duration) -> bool {
        let Some(known) = self.jobs.get_mut(&job) else { return false };
        let waited = now.saturating_sub(*known.waits_since.get_or_insert(now));
        let is_read = known.start.is_none() && known.in_use.is_none();
        if known.recoveries.goes_on && (is_read || known.recoveries.awaits_others(now)) {
            return true;
        }
        let Some(known @ Job { record, start: Some(start), .. }) = self.jobs.get(&job) else {
            return waited < PATIENCE;
        };
        let is_enough = self.compnodes.all().count() >= least_compnodes(&record.spec, start);
        let is_owner_here = known.owner().is_none_or(|owner| self.is_connected(owner));
        let turn = waited.as_secs() / TURN.as_secs();
        waited < PATIENCE || is_enough && is_owner_here && turn % 2 == 1
    }

    fn is_connected(&self, name: &str) -> bool {
        self.compnodes.all().any(|c| self.compnodes.name(c) == name)
    }

    /// The CompNodes again, once all is known of them that a plan needs.
    fn surveyed(&mut self, job: JobId, members: Vec<ConnectionId>) -> Result<Vec<ConnectionId>, String> {
        let now = self.ticked.unwrap_or_default();
        let Some(Job { record, start: Some(start), recoveries, .. }) = self.jobs.get(&job) else {
            return Err("it is not known".to_owned());
        };
        if recoveries.goes_on && start.cluster.is_none() {
            // A link that was cut long ago may have healed.
            self.survey.measure_cut_ones(&members, now);
        }
        if start.cluster.is_some() || self.survey.is_complete(&members, WorkKey::of(&record.spec, start)) {
            return Ok(members);
        }
        self.survey.want(&record.spec, start, &members);
        Err("machines and links are being measured".to_owned())
    }

    /// The CompNodes for a job, data owner first, or what it waits for.
    fn choose(&self, job: JobId) -> Result<Vec<ConnectionId>, String> {
        let Some(known @ Job { record, start: Some(start), recoveries, .. }) = self.jobs.get(&job) else {
            let in_use = self.jobs.get(&job).and_then(|job| job.in_use.as_ref());
            return Err(in_use.map_or_else(|| "what it starts from is being read".to_owned(), |(why, _)| why.clone()));
        };
        if let Some(takeback) = &known.takeback {
            return Err(takeback.waits());
        }
        let (spec, now) = (&record.spec, self.ticked.unwrap_or_default());
        if let Some(reason) = recoveries.no_files(now) {
            return Err(reason);
        }
        if let Some(unread) = start.unread.as_ref().filter(|_| known.snapshots.newest().is_none()) {
            // It is read again.
            return Err(unread.reason.clone());
        }
        let mut idle = self.compnodes.idle();
        if recoveries.goes_on {
            // One that has died with another is silent, and not lost yet.
            idle.retain(|&c| self.compnodes.phi(c, now) < SUSPECT);
            // One on which it has just failed is left out for a while, if it can be.
            let others: Vec<ConnectionId> =
                idle.iter().copied().filter(|&c| !recoveries.avoids(&self.compnodes.name(c), now)).collect();
            let owner_is_left =
                known.owner().is_none_or(|owner| others.iter().any(|&c| self.compnodes.name(c) == *owner));
            if others.len() >= needed(spec, start, true) && owner_is_left {
                idle = others;
            } else if idle.iter().any(|&c| recoveries.avoids(&self.compnodes.name(c), now)) {
                return Err(recoveries.avoided_for(now).unwrap_or_default());
            }
        }
        if let Some(owner) = known.owner() {
            let at = idle.iter().position(|&c| self.compnodes.name(c) == *owner);
            let at = at.ok_or_else(|| self.without_owner(owner))?;
            let owner = idle.remove(at);
            idle.insert(0, owner);
        }
        let most = least_compnodes(spec, start);
        let needed = needed(spec, start, recoveries.goes_on);
        if let Some(reason) = recoveries.waits(idle.len(), now) {
            return Err(reason);
        }
        if idle.len() < needed {
            return Err(format!("{} of {needed} CompNodes are idle", idle.len()));
        }
        if recoveries.goes_on
            && let Some((step, worth)) = known.snapshots.missing(start.step, |c| self.compnodes.is_here(c))
            && now.saturating_sub(known.waits_since.unwrap_or(now)) < worth
        {
            let minutes = worth.as_secs().div_ceil(60);
            return Err(format!(
                "a part of the snapshots of step {step} is with nobody who is here: its CompNode is waited for, up to {minutes} min"
            ));
        }
        if spec.placement.compnodes.is_some() || !spec.placement.stages.is_empty() || start.cluster.is_some() {
            idle.truncate(most);
        }
        recoveries.no_plan_on(&idle).map_or(Ok(idle), Err)
    }

    fn without_owner(&self, owner: &str) -> String {
        if self.is_connected(owner) {
            return format!("CompNode `{owner}`, the data's owner, is not idle");
        }
        let names: Vec<String> = self.compnodes.all().map(|c| format!("`{}`", self.compnodes.name(c))).collect();
        let known = if names.is_empty() { "none".to_owned() } else { names.join(", ") };
        format!("CompNode `{owner}`, the data's owner, has not joined; joined are {known}")
    }

    /// Asks for a placement on these CompNodes and keeps them for it.
    pub(super) fn plan(&mut self, job: JobId, members: Vec<ConnectionId>, now: Duration) -> Vec<Action> {
        let Some(Job { record, start: Some(start), drift, .. }) = self.jobs.get_mut(&job) else { return Vec::new() };
        let cluster = match &start.cluster {
            Some(cluster) => self.compnodes.as_if(cluster, &members),
            None => {
                let inventory = self.survey.inventory(&members, &self.compnodes, Some((&record.spec, start)), now);
                slowed(inventory.cluster(), &drift.plans(now))
            }
        };
        self.plans += 1;
        let number = self.plans;
        let input = PlanInput { number, dag: Arc::clone(&start.dag), cluster, spec: record.spec.plan_spec() };
        let key = RunKey { job, generation: Generation(record.generation.0 + 1) };
        for &member in &members {
            self.compnodes.take(member, key);
        }
        let state = JobState::Waiting { reason: "its placement is being worked out".to_owned() };
        if let Some(known) = self.jobs.get_mut(&job) {
            known.planning = Some((number, members));
            known.record.state = state.clone();
        }
        vec![Action::Plan { job, input: Box::new(input) }, Action::Emit(JobEvent::State { job, state })]
    }

    /// A placement that is being worked out is not wanted any more. Whether there was one.
    pub(super) fn plan_no_more(&mut self, job: JobId) -> bool {
        let Some((_, members)) = self.jobs.get_mut(&job).and_then(|j| j.planning.take()) else { return false };
        for member in members {
            self.release(member);
        }
        true
    }

    /// A placement was worked out.
    pub(super) fn planned(
        &mut self,
        job: JobId,
        number: u64,
        result: Result<Plan, PlanError>,
        now: Duration,
    ) -> Vec<Action> {
        let is_wanted = |j: &&mut Job| j.planning.as_ref().is_some_and(|(wanted, _)| *wanted == number);
        let Some(known) = self.jobs.get_mut(&job).filter(is_wanted) else { return Vec::new() };
        let members = known.planning.as_ref().map(|(_, members)| members.clone()).unwrap_or_default();
        // Whether one that broke off meanwhile comes back is not known: others are chosen, and it is not kept for this.
        let is_whole = members.iter().all(|&member| !self.compnodes.is_away(member));
        self.plan_no_more(job);
        if !is_whole {
            return self.schedule(now);
        }
        let mut actions = match result {
            Ok(plan) => match self.cut_in(job, &plan.placement, &members) {
                Some(cut) => self.plan_around(job, cut, members, now),
                None => self.assign(job, plan, members, now),
            },
            Err(error) => match self.plan_next_around(job, now) {
                Some(actions) => actions,
                None => self.not_placed(job, &error, members),
            },
        };
        actions.extend(self.schedule(now));
        actions
    }

    /// There is no placement on these: the input is at fault, unless the job has been at work before on others.
    fn not_placed(&mut self, job: JobId, error: &PlanError, members: Vec<ConnectionId>) -> Vec<Action> {
        match self.jobs.get_mut(&job) {
            Some(known) if known.recoveries.goes_on => {
                known.recoveries.cannot_be_placed(members, format!("it waits for more CompNodes: {error}"));
                Vec::new()
            }
            _ => {
                let state = JobState::Failed { reason: error.to_string(), bad_input: true };
                self.end(job, state, "no placement")
            }
        }
    }

    fn assign(&mut self, job: JobId, plan: Plan, members: Vec<ConnectionId>, now: Duration) -> Vec<Action> {
        let Some(Job { record, start: Some(start), .. }) = self.jobs.get(&job) else { return Vec::new() };
        let (mut start, spec) = (start.clone(), record.spec.clone());
        let checkpoint = (start.step > 0 && start.run.from.is_none()).then_some(start.step);
        let point = self.recovery_point(job, start.step);
        if let Some(RecoveryPoint { set, .. }) = &point {
            (start.step, start.loss, start.weights) = (set.step, set.loss, None);
            // What the checkpoint has is not used.
            start.notices.retain(|notice| !notice.starts_with(WEIGHTS));
        }
        if let Some(Unread { reason, bad_input }) = start.unread.take().filter(|_| point.is_none()) {
            return self.end(job, JobState::Failed { reason, bad_input }, "what it starts from cannot be read");
        }
        let Plan { placement, prediction, simulated: predicted, .. } = plan;
        let predicted_s = prediction.step_s;
        let planned: Vec<u64> = prediction.compnodes.iter().map(|compnode| compnode.memory_bytes as u64).collect();
        // The strategy may leave some out, and has its own order.
        let named = |name: &String| members.iter().copied().find(|&m| self.compnodes.name(m) == *name);
        let all = members.clone();
        let members: Vec<ConnectionId> = placement.compnodes.iter().filter_map(named).collect();
        let Some(known) = self.jobs.get_mut(&job) else { return Vec::new() };
        known.record.generation = Generation(known.record.generation.0 + 1);
        known.record.placed = None;
        known.record.members = u32::try_from(members.len()).unwrap_or(u32::MAX);
        let goes_on = known.placed(&members, &all);
        (known.record.step, known.record.loss) = (start.step, start.loss);
        known.record.snapshots = known.snapshots.to_store();
        let kept = if point.is_some() { KeptAs::Snapshots } else { KeptAs::Checkpoint };
        start.notices.splice(0..0, known.recoveries.take_told(start.step, kept));
        let key = RunKey { job, generation: known.record.generation };
        let file = PlacementFile::of(&placement, &start.dag, key.generation, prediction);
        known.record.work = Some(Arc::new(PlacedWork {
            placement: file.clone(),
            graph: start.graph.clone(),
            carried: start.origin.carried.as_ref().clone(),
            run: start.run.clone(),
            hashes: PlacedWork::hashes_with(known.record.work.as_deref(), &file),
        }));
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
            placement: file,
            hashes: Vec::new(),
            predicted: Some(predicted),
            start_step: start.step,
            goes_on,
            takes_back: false,
        }))];
        actions.extend(self.notices(job, start.notices.iter().cloned().chain(of_recompute(&placement)).collect()));
        let owner = owner_of(&members).map(|owner| self.compnodes.name(owner)).unwrap_or_default();
        let kept = point.map(|point| self.sources(job, &point, &start.dag, &placement, &members));
        let Sources { of_members, loans, lends } = kept.unwrap_or_default();
        let assignments = self.assignments(key, &spec, &start, of_members, (&placement, &planned), &members);
        let mut run = Run::new(key, members, placement, &start, &spec, predicted_s, now);
        run.goes_on(checkpoint, loans);
        if let Some(known) = self.jobs.get_mut(&job) {
            known.record.owner = Some(owner);
            known.comeback.iter_mut().for_each(|comeback| comeback.placed(run.members.len(), now));
            known.run = Some(run);
            known.persisted = now;
            known.waits_since = None;
        }
        // The number of the placement is on disk before anybody hears it.
        actions.extend(self.set_state(job, JobState::Preparing));
        actions.extend(lends);
        actions.extend(assignments);
        actions
    }

    fn assignments(
        &self,
        key: RunKey,
        spec: &JobSpec,
        start: &StartPoint,
        sources: Vec<Vec<SnapshotSource>>,
        (placement, planned): (&Placement, &[u64]),
        members: &[ConnectionId],
    ) -> Vec<Action> {
        let peers: Vec<PeerRecord> = members.iter().map(|&m| self.compnodes.addr(m)).collect();
        let mut actions = Vec::new();
        let mut sources = sources.into_iter();
        for (node, &to) in (0..).map(NodeIndex).zip(members) {
            let weights = match (sources.next(), &start.weights) {
                (Some(sources), _) => WeightSource::Snapshots(sources),
                (None, Some(_)) => WeightSource::Broker,
                (None, None) => WeightSource::Seed,
            };
            let holds = |op| placement.stages_of(node).any(|stage| stage.ops.contains(&op));
            let reads_data = [start.dag.input(), start.dag.label()].into_iter().flatten().any(holds);
            let assignment = Assignment {
                key,
                node,
                job: if reads_data { start.owners_view(spec) } else { JobView::of(spec) },
                graph: start.graph.clone(),
                placement: placement.clone(),
                peers: peers.clone(),
                start_step: start.step,
                planned_bytes: planned.get(node.index()).copied().unwrap_or(0),
                weights,
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

/// How many CompNodes a job needs now: once it has been at work, fewer than it asked for may do, unless it says what each
/// holds.
pub(super) fn needed(spec: &JobSpec, start: &StartPoint, goes_on: bool) -> usize {
    let asked = least_compnodes(spec, start);
    let is_fixed = !spec.placement.stages.is_empty() || start.cluster.is_some();
    let least = spec.survive.min_compnodes as usize;
    match spec.placement.compnodes {
        _ if is_fixed || !goes_on => asked,
        Some(_) => asked.min(least),
        None => asked.max(least),
    }
}

/// How many CompNodes a job needs at least.
pub(super) fn least_compnodes(spec: &JobSpec, start: &StartPoint) -> usize {
    let listed = spec.placement.stages.iter().map(|s| s.compnode as usize + 1).max().unwrap_or(1);
    let stood_for = start.cluster.as_ref().map_or(listed, |cluster| cluster.compnodes.len());
    spec.placement.compnodes.map_or(stood_for, |n| n as usize)
}
