//! What error feedback holds back, in a checkpoint: under the names of ops and parameters, which outlive a placement.

use std::collections::BTreeSet;

use fusionllm_codec::{HostTensor, Values};
use fusionllm_graph::{OpDag, Param, ParamId};
use fusionllm_planner::{NodeIndex, Placement, SharedId, Way};
use fusionllm_protocol::{Channel, TensorName};

use crate::ShardError;
use crate::executor::{NamedTensor, TensorSource};

/// The name of what is held back for a channel along an edge; nothing for other channels.
fn name_of_edge(dag: &OpDag, placement: &Placement, channel: Channel) -> Option<String> {
    let (way, id) = match channel {
        Channel::Activation(id) => (Way::Activation, id),
        Channel::Gradient(id) => (Way::Gradient, id),
        Channel::Shared { .. } | Channel::NormPart { .. } | Channel::NormTotal { .. } => return None,
    };
    let edge = placement.edges.get(id.index())?;
    let stage = placement.stages.get(edge.to.index())?;
    let (group, producer, consumer) = (stage.group, &dag.op(edge.op).name, &dag.op(*stage.ops.first()?).name);
    Some(TensorName::Residual { group, way, producer, consumer }.to_string())
}

/// The name of what is held back of a shared parameter's gradient at a holder.
fn name_of_param(dag: &OpDag, placement: &Placement, param: ParamId, from: NodeIndex) -> Option<String> {
    let mut ops = placement.stages_of(from).flat_map(|stage| stage.ops.iter().map(|&op| (stage.group, op)));
    let (group, first) = ops.find(|(_, op)| dag.op(*op).params.contains(&param))?;
    let name = TensorName::SharedResidual { group, param: &dag.param(param).name, op: &dag.op(first).name };
    Some(name.to_string())
}

/// Residuals as tensors of a shard; of shared parameters one for each.
pub(crate) fn to_tensors(
    dag: &OpDag,
    placement: &Placement,
    residuals: Vec<(Channel, HostTensor)>,
) -> impl Iterator<Item = NamedTensor> {
    residuals.into_iter().flat_map(|(channel, residual)| {
        let (shape, Values::F32(values)) = residual.into_parts() else { return Vec::new() };
        if let Channel::Shared { id, from } = channel {
            return by_param(dag, placement, (id, from), values);
        }
        let name = name_of_edge(dag, placement, channel);
        name.map(|name| NamedTensor { name, shape, values }).into_iter().collect()
    })
}

/// What one holder of shared parameters holds back, a tensor for each parameter.
fn by_param(
    dag: &OpDag,
    placement: &Placement,
    (id, from): (SharedId, NodeIndex),
    values: Vec<f32>,
) -> Vec<NamedTensor> {
    let Some(shared) = placement.shared(id) else { return Vec::new() };
    let mut rest = values;
    let tensor = |&param: &ParamId| {
        let Param { shape, .. } = dag.param(param);
        let later = rest.split_off(shape.iter().product::<usize>().min(rest.len()));
        let values = std::mem::replace(&mut rest, later);
        Some(NamedTensor { name: name_of_param(dag, placement, param, from)?, shape: shape.clone(), values })
    };
    shared.params.iter().filter_map(tensor).collect()
}

/// What one holder of shared parameters held back, as one vector; nothing if there is nothing of any.
fn of_params(
    dag: &OpDag,
    placement: &Placement,
    (id, from): (SharedId, NodeIndex),
    tensors: &mut dyn TensorSource,
) -> Result<Option<HostTensor>, ShardError> {
    let Some(shared) = placement.shared(id) else { return Ok(None) };
    let (mut all, mut any) = (Vec::new(), false);
    for &param in &shared.params {
        let elements = dag.param(param).shape.iter().product::<usize>();
        let name = name_of_param(dag, placement, param, from);
        let taken = name.map_or(Ok(None), |name| tensors.take(&name))?;
        match taken.map(|tensor| tensor.values).filter(|values| values.len() == elements) {
            Some(values) if all.is_empty() => (all, any) = (values, true),
            Some(values) => {
                all.extend(values);
                any = true;
            }
            None => all.resize(all.len() + elements, 0.0),
        }
    }
    Ok(if any { HostTensor::new(vec![all.len()], Values::F32(all)).ok() } else { None })
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
        if let Channel::Shared { id, from } = channel {
            residuals.extend(of_params(dag, placement, (id, from), tensors)?.map(|t| (channel, t)));
            continue;
        }
        let Some(name) = name_of_edge(dag, placement, channel) else { continue };
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
    fn residuals_of_shared_parameters_are_each_senders_own() {
        let text = "[model]\nname=\"gpt2\"\n[data]\npath=\"/x\"\n[placement]\nstrategy=\"equal-compute\"";
        let spec = JobSpec::from_toml(text, &[]).unwrap();
        let mut config = Gpt2Config::named("gpt2").unwrap();
        (config.n_layer, config.n_embd, config.n_head, config.vocab_size) = (2, 8, 2, 64);
        let dag = gpt2(&config, 8).unwrap();
        let placement = place(&dag, &Cluster::uniform(2), &spec.placement_spec()).unwrap();
        let shared = &placement.shared[0];
        let elements = shared.elements as usize;
        let of = |from: NodeIndex| {
            let residual = HostTensor::new(vec![elements], Values::F32(vec![0.5 + from.0 as f32; elements])).unwrap();
            (Channel::Shared { id: shared.id, from }, residual)
        };
        let all = shared.holders.iter().map(|&from| of(from)).collect();
        let tensors = by_name(to_tensors(&dag, &placement, all));
        let names: Vec<&String> = tensors.keys().collect();
        assert!(names.iter().any(|n| n.starts_with("residual.tied.transformer.wte.weight@")), "{names:?}");
        for &node in &shared.holders {
            assert_eq!(take(&dag, &placement, node, &mut tensors.clone()).unwrap(), [of(node)]);
        }

        // Of several, each is a tensor under its own name, and of one that is missing nothing is held back.
        let (mut placement, node) = (placement.clone(), NodeIndex(0));
        let positions = dag.find_param("transformer.wpe.weight").unwrap();
        let count = dag.param(positions).elements() as usize;
        placement.shared[0].params.push(positions);
        placement.shared[0].elements += count as u64;
        let channel = Channel::Shared { id: SharedId(0), from: node };
        let values: Vec<f32> = (0..elements + count).map(|i| i as f32).collect();
        let residual = |values: &[f32]| HostTensor::new(vec![values.len()], Values::F32(values.to_vec())).unwrap();
        let mut tensors = by_name(to_tensors(&dag, &placement, vec![(channel, residual(&values))]));
        assert_eq!(tensors["residual.tied.transformer.wpe.weight@wpe"].values, values[elements..]);
        let taken = |mut tensors| take(&dag, &placement, node, &mut tensors).unwrap();
        assert_eq!(taken(tensors.clone()), [(channel, residual(&values))]);
        tensors.retain(|name, _| name.contains("wpe"));
        let rest = [vec![0.0; elements], values[elements..].to_vec()].concat();
        assert_eq!(taken(tensors), [(channel, residual(&rest))]);
    }
}
