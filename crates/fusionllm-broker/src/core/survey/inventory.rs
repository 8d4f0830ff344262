//! What is known of machines and links, for people.

use std::time::Duration;

use fusionllm_graph::OpDag;
use fusionllm_planner::Measured;
use fusionllm_protocol::{Inventory, JobSpec, LinkReport, MachineReport};

use super::{Pair, Survey, WorkKey};
use crate::core::registry::Registry;
use crate::core::{ConnectionId, StartPoint};

impl Survey {
    /// Measurements that are still to come, and do not wait for jobs to end.
    fn pending(&self, registry: &Registry) -> usize {
        let is_free = |at: &ConnectionId| registry.is_idle(*at);
        let ops: usize =
            self.wanted.values().map(|wanted| wanted.members.iter().filter(|&at| is_free(at)).count()).sum();
        let is_soon = |pair: &&Pair| is_free(&pair.0) && is_free(&pair.1) || self.beside_work.contains(*pair);
        self.due.iter().filter(is_soon).count() + self.active.len() + ops
    }

    /// What is known of these CompNodes, with what the ops of a job take if one is given.
    pub(in crate::core) fn inventory(
        &self,
        members: &[ConnectionId],
        registry: &Registry,
        job: Option<(&JobSpec, &StartPoint)>,
        now: Duration,
    ) -> Inventory {
        // The key hashes the whole OP-DAG: once, not for each machine.
        let key = job.map(|(spec, start)| WorkKey::of(spec, start));
        let machine = |&at: &ConnectionId| {
            let measured = key.and_then(|key| self.ops.get(&(at, key))?.clone());
            let mut report = registry.report(at)?;
            report.efficiency = job.zip(measured.as_ref()).and_then(|((spec, start), measured)| {
                efficiency(&start.dag, spec.micro_batch_size() as usize, measured, report.profile.flop_per_s)
            });
            report.measured = measured;
            Some(report)
        };
        let machines: Vec<MachineReport> = members.iter().filter_map(machine).collect();
        let mut links = Vec::new();
        for (&(a, b), state) in &self.pairs {
            if !members.contains(&a) || !members.contains(&b) {
                continue;
            }
            let (a, b) = (registry.name(a), registry.name(b));
            let age_s = now.saturating_sub(state.at).as_secs_f64();
            let relayed = state.result.is_some_and(|pair| pair.relayed);
            let report = |from: &str, to: &str, link| LinkReport {
                from: from.to_owned(),
                to: to.to_owned(),
                link,
                relayed,
                age_s,
            };
            links.push(report(&a, &b, state.result.map(|r| r.there)));
            links.push(report(&b, &a, state.result.map(|r| r.back)));
        }
        Inventory { machines, links, pending: u32::try_from(self.pending(registry)).unwrap_or(u32::MAX), relay: false }
    }
}

/// λ: the share of S that the ops of an OP-DAG reach together.
fn efficiency(dag: &OpDag, batch: usize, measured: &Measured, flop_per_s: f64) -> Option<f64> {
    let (mut flops, mut seconds) = (0.0, 0.0);
    for op in dag.op_ids() {
        let cost = dag.cost(op, batch);
        if let Some(op) = measured.ops.get(&dag.work(op, batch)) {
            flops += (cost.fp_flops + cost.bp_flops) as f64;
            seconds += op.fp_s + op.bp_s;
        }
    }
    let share = flops / seconds / flop_per_s;
    (share.is_finite() && share > 0.0).then_some(share.min(1.0))
}
