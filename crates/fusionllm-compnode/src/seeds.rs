//! What is drawn from which seed: initial parameters and dropout from the job's, or under `data.private` those of the ops that
//! stay with the data owner, and the order of samples, from a seed of the owner's own.

mod own;

use std::sync::Arc;

use fusionllm_graph::{OpDag, OpId, ParamId};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

use crate::executor::MicroBatch;
use crate::params::seed_for;
pub use own::OwnSeed;
pub(crate) use own::{Found, find_or_make};

/// Seed of one random stream.
pub(crate) type StreamSeed = [u8; 32];

/// The seeds of a job on one CompNode.
#[derive(Clone, Debug)]
pub struct Seeds {
    job: u64,
    own: Option<Arc<Kept>>,
}

/// What is drawn from the owner's own seed.
#[derive(Debug)]
struct Kept {
    seed: OwnSeed,
    /// By op, whether it stays with the owner.
    ops: Vec<bool>,
}

impl From<u64> for Seeds {
    /// All is drawn from the job's.
    fn from(job: u64) -> Self {
        Self { job, own: None }
    }
}

impl Seeds {
    /// Those of the data owner, which draws what belongs to the ops that stay with it from a seed of its own. `kept` says of
    /// each op of the OP-DAG whether it does.
    pub fn with_own(job: u64, seed: OwnSeed, kept: Vec<bool>) -> Self {
        Self { job, own: Some(Arc::new(Kept { seed, ops: kept })) }
    }

    /// For the initial values of a parameter: a function of the seed and its name. It is the owner's if all ops that use
    /// it are.
    pub(crate) fn of_param(&self, dag: &OpDag, param: ParamId) -> StreamSeed {
        let is_kept = |own: &&Arc<Kept>| dag.users_of(param).iter().all(|&op| own.has(op));
        let name = dag.param(param).name.as_bytes();
        match self.own.as_ref().filter(is_kept) {
            Some(own) => own.seed.stream(&[b"parameter", name]),
            None => expanded(seed_for(self.job, &[name])),
        }
    }

    /// For what is random in an op and micro-batch.
    pub(crate) fn of_op(&self, dag: &OpDag, op: OpId, at: MicroBatch) -> StreamSeed {
        let parts = [at.step.to_le_bytes(), u64::from(at.index).to_le_bytes()];
        let name = dag.op(op).name.as_bytes();
        match self.own.as_ref().filter(|own| own.has(op)) {
            Some(own) => own.seed.stream(&[b"op", name, &parts[0], &parts[1]]),
            None => expanded(seed_for(self.job, &[name, &parts[0], &parts[1]])),
        }
    }

    /// For the order of samples, and for how images are changed.
    pub(crate) fn of_samples(&self) -> u64 {
        self.own.as_ref().map_or(self.job, |own| {
            let stream = own.seed.stream(&[b"samples"]);
            let first = stream.first_chunk().copied();
            u64::from_le_bytes(first.unwrap_or_default())
        })
    }
}

impl Kept {
    fn has(&self, op: OpId) -> bool {
        self.ops.get(op.index()).copied().unwrap_or(false)
    }
}

/// What `seed_from_u64` begins with.
fn expanded(seed: u64) -> StreamSeed {
    ChaCha8Rng::seed_from_u64(seed).get_seed()
}

#[cfg(test)]
mod tests {
    use fusionllm_graph::{Gpt2Config, gpt2};
    use fusionllm_protocol::Pass;
    use rand::RngExt;

    use super::*;

    #[test]
    fn only_what_stays_with_the_owner_is_drawn_from_its_own_seed() {
        let config =
            Gpt2Config { n_layer: 2, n_embd: 16, n_head: 2, dropout: 0.1, ..Gpt2Config::named("gpt2").unwrap() };
        let dag = gpt2(&config, 8).unwrap();
        let kept = fusionllm_planner::kept_ops(&dag, [0, 0]).unwrap();
        let seeds = |own: u8| Seeds::with_own(3, OwnSeed::from_bytes([own; 32]), kept.clone());
        let (job, one, other) = (Seeds::from(3), seeds(1), seeds(2));
        for id in dag.param_ids() {
            let name = &dag.param(id).name;
            let of = |seeds: &Seeds| seeds.of_param(&dag, id);
            assert_eq!(of(&one) == of(&job), name.contains(".h."), "{name}");
            assert_eq!(of(&one) == of(&other), name.contains(".h."), "{name}");
        }
        for name in ["embd.drop", "h.0.attn.drop", "h.1.mlp.drop"] {
            let op = dag.find(name).unwrap_or_else(|| panic!("{name}"));
            let at = MicroBatch { step: 4, pass: Pass::Train, index: 1 };
            let of = |seeds: &Seeds| seeds.of_op(&dag, op, at);
            assert_eq!(of(&one) == of(&job), name.starts_with("h."), "{name}");
            assert_ne!(of(&one), one.of_op(&dag, op, MicroBatch { step: 5, ..at }));
        }
        assert!(one.of_samples() != other.of_samples() && one.of_samples() != job.of_samples());
        assert_eq!(job.of_samples(), 3);
    }

    #[test]
    fn the_jobs_seed_gives_the_streams_that_it_always_gave() {
        let mut plain = ChaCha8Rng::seed_from_u64(77);
        let mut expanded = ChaCha8Rng::from_seed(expanded(77));
        assert_eq!(plain.random::<u64>(), expanded.random::<u64>());
    }
}
