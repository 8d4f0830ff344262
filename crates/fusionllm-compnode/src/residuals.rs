//! What error feedback holds back, in a checkpoint: under the names of ops and parameters, which outlive a placement.

use std::collections::BTreeSet;

use fusionllm_codec::{HostTensor, Values};
use fusionllm_graph::OpDag;
use fusionllm_planner::{NodeIndex, Placement, Way};
use fusionllm_protocol::{Channel, TensorName};

use crate::ShardError;
use crate::executor::{NamedTensor, TensorSource};

/// The name of what is held back for a channel; nothing if nothing is.
fn name(dag: &OpDag, placement: &Placement, channel: Channel) -> Option<String> {
    let (way, id) = match channel {
        Channel::Activation(id) => (Way::Activation, id),
        Channel::Gradient(id) => (Way::Gradient, id),
        Channel::Tied { param, from } => {
            let mut ops = placement.stages_of(from).flat_map(|stage| &stage.ops);
            let first = ops.find(|op| dag.op(**op).params.contains(&param))?;
            let name = TensorName::TiedResidual { param: &dag.param(param).name, op: &dag.op(*first).name };
            return Some(name.to_string());
        }
        Channel::NormPart { .. } | Channel::NormTotal { .. } => return None,
    };
    let edge = placement.edges.get(id.index())?;
    let first = placement.stages.get(edge.to.index())?.ops.first()?;
    let (producer, consumer) = (&dag.op(edge.op).name, &dag.op(*first).name);
    Some(TensorName::Residual { way, producer, consumer }.to_string())
}

/// Residuals as tensors of a shard.
pub(crate) fn to_tensors(
    dag: &OpDag,
    placement: &Placement,
    residuals: Vec<(Channel, HostTensor)>,
) -> impl Iterator<Item = NamedTensor> {
    residuals.into_iter().filter_map(|(channel, residual)| {
        let (shape, values) = residual.into_parts();
        match values {
            Values::F32(values) => Some(NamedTensor { name: name(dag, placement, channel)?, shape, values }),
            Values::I32(_) => None,
        }
    })
}

/// Takes the residuals out of `tensors` that `node` sends by in this placement. Those of other cuts are left.
///
/// # Errors
/// [`ShardError`] if one cannot be read.
pub(crate) fn take(
    dag: &OpDag,
    placement: &Placement,
    node: NodeIndex,
    tensors: &mut dyn TensorSource,
) -> Result<Vec<(Channel, HostTensor)>, ShardError> {
    let mut residuals = Vec::new();
    let sent = Channel::all(placement, false).filter(|(_, route)| route.from == node);
    let channels: BTreeSet<Channel> = sent.map(|(channel, _)| channel).collect();
    for channel in channels {
        let Some(name) = name(dag, placement, channel) else { continue };
        if let Some(tensor) = tensors.take(&name)? {
            let restored = HostTensor::new(tensor.shape, Values::F32(tensor.values));
            residuals.extend(restored.ok().map(|t| (channel, t)));
        }
    }
    Ok(residuals)
}

#[cfg(test)]
mod tests {
    use fusionllm_graph::{Gpt2Config, gpt2};
    use fusionllm_planner::{Cluster, place};
    use fusionllm_protocol::JobSpec;

    use super::*;
    use crate::executor::by_name;

    #[test]
    fn residuals_are_found_again_by_whoever_sends_over_their_edge() {
        let text = "[model]\nname=\"gpt2\"\n[data]\npath=\"/x\"\n[placement]\nstrategy=\"equal-compute\"";
        let spec = JobSpec::from_toml(text, &[]).unwrap();
        let mut config = Gpt2Config::named("gpt2").unwrap();
        (config.n_layer, config.n_embd, config.n_head) = (2, 8, 2);
        let dag = gpt2(&config, 8).unwrap();
        let placement = place(&dag, &Cluster::uniform(2), &spec.placement_spec()).unwrap();
        let edge = placement.edges.iter().find(|e| placement.is_boundary(e) && e.gradient).unwrap();
        let residual = HostTensor::new(vec![2], Values::F32(vec![1.0, 2.0])).unwrap();
        let channel = Channel::Gradient(edge.id);
        let mut tensors = by_name(to_tensors(&dag, &placement, vec![(channel, residual.clone())]));
        let sender = placement.compnode_of(edge.to).unwrap();
        let other = placement.compnode_of(edge.from).unwrap();
        assert_eq!(take(&dag, &placement, other, &mut tensors.clone()).unwrap(), []);
        assert_eq!(take(&dag, &placement, sender, &mut tensors).unwrap(), [(channel, residual)]);
    }

    #[test]
    fn residuals_of_tied_parameters_are_each_senders_own() {
        let text = "[model]\nname=\"gpt2\"\n[data]\npath=\"/x\"\n[placement]\nstrategy=\"equal-compute\"";
        let spec = JobSpec::from_toml(text, &[]).unwrap();
        let mut config = Gpt2Config::named("gpt2").unwrap();
        (config.n_layer, config.n_embd, config.n_head, config.vocab_size) = (2, 8, 2, 64);
        let dag = gpt2(&config, 8).unwrap();
        let placement = place(&dag, &Cluster::uniform(2), &spec.placement_spec()).unwrap();
        let tied = &placement.tied[0];
        let shape = dag.param(tied.param).shape.clone();
        let of = |from: NodeIndex| {
            let values = vec![0.5 + from.0 as f32; shape.iter().product()];
            let residual = HostTensor::new(shape.clone(), Values::F32(values)).unwrap();
            (Channel::Tied { param: tied.param, from }, residual)
        };
        let all = tied.holders.iter().map(|&from| of(from)).collect();
        let tensors = by_name(to_tensors(&dag, &placement, all));
        let names: Vec<&String> = tensors.keys().collect();
        assert!(names.iter().any(|n| n.starts_with("residual.tied.transformer.wte.weight@")), "{names:?}");
        for &node in &tied.holders {
            assert_eq!(take(&dag, &placement, node, &mut tensors.clone()).unwrap(), [of(node)]);
        }
    }
}
