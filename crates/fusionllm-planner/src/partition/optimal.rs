//! The best chain there is, by trying all of them: for small cases, and to hold OP-Fence against.

use super::chain::Chain;
use crate::partition::pins::Pins;
use crate::{Cluster, Estimate, PlanError};

/// Beyond this many CompNodes the chains are too many.
pub(crate) const MOST_COMPNODES: usize = 6;
/// Beyond this many ops likewise.
pub(crate) const MOST_OPS: usize = 16;

/// Tries every order of every set of CompNodes with every cut, but those that a lower bound rules out. `best` is a
/// chain to begin with and its time.
pub(crate) fn optimal(
    best: (Chain, f64),
    estimate: &Estimate,
    cluster: &Cluster,
    pins: &Pins,
    owner: Option<usize>,
    micro_batches: u32,
    seconds: impl Fn(&Chain) -> f64,
) -> Result<Chain, PlanError> {
    let (devices, ops) = (cluster.compnodes.len(), estimate.ops());
    if devices > MOST_COMPNODES || ops > MOST_OPS {
        let (most_compnodes, most_ops) = (MOST_COMPNODES, MOST_OPS);
        return Err(PlanError::TooLargeForOptimal { compnodes: devices, ops, most_compnodes, most_ops });
    }
    let micro_batches = f64::from(micro_batches);
    let mut search = Search { best, estimate, cluster, pins, micro_batches, seconds };
    for first in (0..devices).filter(|d| owner.is_none_or(|o| o == *d)) {
        search.extend(&mut Chain { order: vec![first], ends: Vec::new() }, 0.0, 0);
    }
    Ok(search.best.0)
}

struct Search<'a, F> {
    best: (Chain, f64),
    estimate: &'a Estimate,
    cluster: &'a Cluster,
    pins: &'a Pins,
    micro_batches: f64,
    seconds: F,
}

impl<F: Fn(&Chain) -> f64> Search<'_, F> {
    /// The chain's last CompNode has no end yet; its piece begins at `start`. `way` is the time of one micro-batch
    /// through all stages before it, there and back.
    fn extend(&mut self, chain: &mut Chain, way: f64, start: usize) {
        let Some(&device) = chain.order.last() else { return };
        let (tail, ops) = (self.pins.tail, self.estimate.ops());
        let least = if start == 0 { self.pins.head.max(1) } else { start + 1 };
        for end in least..=tail {
            let piece = if chain.order.len() == 1 && end == tail { start..ops } else { start..end };
            let seconds = self.estimate.seconds(&self.cluster.compnodes[device], &piece);
            // The stage computes for every micro-batch; the first one must come here before, and the last one must
            // go back after.
            if way + self.micro_batches * seconds.both_s() >= self.best.1 {
                break;
            }
            chain.ends.push(end);
            if end == tail {
                let time = (self.seconds)(chain);
                if time < self.best.1 {
                    self.best = (chain.clone(), time);
                }
            } else {
                for next in 0..self.cluster.compnodes.len() {
                    if chain.order.contains(&next) {
                        continue;
                    }
                    chain.order.push(next);
                    self.extend(chain, way + seconds.both_s(), end);
                    chain.order.pop();
                }
            }
            chain.ends.pop();
        }
    }
}
