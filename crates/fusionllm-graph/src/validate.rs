//! What can only be checked on the whole OP-DAG: order and cycles, dangling ops, unused parameters.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use crate::dag::{OpDag, OpId};
use crate::error::GraphError;
use crate::kind::OpClass;

/// Checks an OP-DAG whose ops fit each by itself.
pub(crate) fn whole(dag: &OpDag) -> Result<(), GraphError> {
    if dag.ops().is_empty() {
        return Err(GraphError::Empty);
    }
    at_most_one_of_each(dag)?;
    nothing_dangling(dag)?;
    no_unused_param(dag)?;
    no_shared_running(dag)
}

/// One input, one label, one loss: data and BP have one place to start from.
fn at_most_one_of_each(dag: &OpDag) -> Result<(), GraphError> {
    let mut first: [(&'static str, Option<OpId>); 3] = [("input", None), ("label", None), ("loss", None)];
    for op in dag.op_ids() {
        let kind = &dag.op(op).kind;
        let role = match kind.class() {
            OpClass::Placeholder => kind.family(),
            OpClass::Loss => "loss",
            OpClass::Parameter | OpClass::ParameterFree => continue,
        };
        for (family, seen) in first.iter_mut().filter(|(family, _)| *family == role) {
            if let Some(before) = seen.replace(op) {
                let name = |op| dag.op(op).name.clone();
                return Err(GraphError::Several { family, first: name(before), second: name(op) });
            }
        }
    }
    Ok(())
}

/// Each op is read, except the loss, which is not; without a loss the last op is the output and takes its place.
fn nothing_dangling(dag: &OpDag) -> Result<(), GraphError> {
    let loss = dag.loss();
    if let Some(loss) = loss
        && let Some(&reader) = dag.consumers(loss).first()
    {
        return Err(GraphError::AfterLoss { op: dag.op(reader).name.clone(), loss: dag.op(loss).name.clone() });
    }
    let end = loss.or_else(|| dag.op_ids().next_back());
    match dag.op_ids().find(|&op| dag.consumers(op).is_empty() && Some(op) != end) {
        Some(op) => Err(GraphError::Dangling { op: dag.op(op).name.clone(), has_loss: loss.is_some() }),
        None => Ok(()),
    }
}

fn no_unused_param(dag: &OpDag) -> Result<(), GraphError> {
    let mut used = vec![false; dag.params().len()];
    for param in dag.ops().iter().flat_map(|op| &op.params) {
        used[param.index()] = true;
    }
    match dag.params().iter().zip(used).find(|(_, used)| !used) {
        Some((param, _)) => Err(GraphError::UnusedParam { param: param.name.clone() }),
        None => Ok(()),
    }
}

/// What FP makes belongs to one op: two would each make other values.
fn no_shared_running(dag: &OpDag) -> Result<(), GraphError> {
    let shared = dag.param_ids().filter(|&param| dag.is_running(param)).find(|&param| dag.users_of(param).len() > 1);
    shared.map_or(Ok(()), |param| {
        let (param, got) = (dag.param(param).name.clone(), dag.users_of(param).len().to_string());
        Err(GraphError::Param { param, what: "number of ops that make its values", expected: "1".to_owned(), got })
    })
}

/// A topological order of nodes that read the nodes in `inputs`; the given order is kept wherever it can be.
///
/// # Errors
/// The nodes of a cycle, each read by the next and the last by the first.
pub(crate) fn topological_order(inputs: &[Vec<usize>]) -> Result<Vec<usize>, Vec<usize>> {
    let mut readers: Vec<Vec<usize>> = vec![Vec::new(); inputs.len()];
    for (node, of_node) in inputs.iter().enumerate() {
        for &input in of_node {
            readers[input].push(node);
        }
    }
    let mut waits_for: Vec<usize> = inputs.iter().map(Vec::len).collect();
    let mut ready: BinaryHeap<Reverse<usize>> =
        (0..inputs.len()).filter(|&node| waits_for[node] == 0).map(Reverse).collect();
    let mut order = Vec::with_capacity(inputs.len());
    while let Some(Reverse(node)) = ready.pop() {
        order.push(node);
        for &reader in &readers[node] {
            waits_for[reader] -= 1;
            if waits_for[reader] == 0 {
                ready.push(Reverse(reader));
            }
        }
    }
    if order.len() == inputs.len() { Ok(order) } else { Err(cycle(inputs, &waits_for)) }
}

/// Each node still waiting reads a node still waiting, so going from input to input must come round.
fn cycle(inputs: &[Vec<usize>], waits_for: &[usize]) -> Vec<usize> {
    let waiting = |node: &usize| waits_for[*node] > 0;
    let mut path: Vec<usize> = Vec::new();
    let mut place: Vec<Option<usize>> = vec![None; inputs.len()];
    let mut next = (0..inputs.len()).find(waiting);
    while let Some(node) = next {
        if let Some(start) = place[node] {
            let mut on_cycle = path.split_off(start);
            on_cycle.reverse();
            return on_cycle;
        }
        place[node] = Some(path.len());
        path.push(node);
        next = inputs[node].iter().copied().find(waiting);
    }
    path
}

#[cfg(test)]
mod tests {
    use crate::{DType, DagBuilder, Init, OpKind, Param, Shape};

    use super::*;

    fn features(builder: &mut DagBuilder) -> OpId {
        let kind = OpKind::Input { dtype: DType::F32, shape: Shape::batched(&[4, 6]) };
        builder.op("x", kind, &[], &[]).unwrap()
    }

    fn labels() -> OpKind {
        OpKind::Label { shape: Shape::batched(&[4]) }
    }

    #[test]
    fn the_order_is_kept_where_it_is_one() {
        assert_eq!(topological_order(&[vec![], vec![0], vec![], vec![1, 2]]), Ok(vec![0, 1, 2, 3]));
        assert_eq!(topological_order(&[vec![2], vec![], vec![1], vec![1, 1]]), Ok(vec![1, 2, 0, 3]));
        assert_eq!(topological_order(&[]), Ok(vec![]));
    }

    #[test]
    fn a_cycle_is_given_in_the_direction_of_data() {
        // 1 -> 2 -> 3 -> 1, and 4 hangs off it.
        assert_eq!(topological_order(&[vec![], vec![0, 3], vec![1], vec![2], vec![3]]), Err(vec![2, 3, 1]));
        assert_eq!(topological_order(&[vec![0]]), Err(vec![0]));
    }

    #[test]
    fn a_dangling_op_is_named() {
        let mut builder = DagBuilder::new("m");
        let x = features(&mut builder);
        let y = builder.op("y", labels(), &[], &[]).unwrap();
        builder.op("side", OpKind::Add, &[x, x], &[]).unwrap();
        let without_loss = builder.clone().build().unwrap_err();
        assert_eq!(without_loss.to_string(), "op `y` is dangling: no op reads it, expected a path to the one output");
        builder.op("loss", OpKind::CrossEntropy, &[x, y], &[]).unwrap();
        let error = builder.build().unwrap_err();
        assert_eq!(error.to_string(), "op `side` is dangling: no op reads it, expected a path to the loss");
    }

    #[test]
    fn a_second_loss_or_placeholder_and_a_reader_of_the_loss_are_named() {
        let mut builder = DagBuilder::new("m");
        let x = features(&mut builder);
        let y = builder.op("y", labels(), &[], &[]).unwrap();
        let loss = builder.op("loss", OpKind::CrossEntropy, &[x, y], &[]).unwrap();
        let mut after = builder.clone();
        after.op("after", OpKind::Add, &[loss, loss], &[]).unwrap();
        assert_eq!(
            after.build().unwrap_err().to_string(),
            "op `after` reads the loss `loss`, expected nothing after the loss"
        );
        let mut again = builder.clone();
        again.op("again", OpKind::CrossEntropy, &[x, y], &[]).unwrap();
        assert_eq!(
            again.build().unwrap_err().to_string(),
            "ops `loss` and `again` are both loss, expected at most one"
        );
        builder.op("z", labels(), &[], &[]).unwrap();
        assert_eq!(builder.build().unwrap_err().to_string(), "ops `y` and `z` are both label, expected at most one");
    }

    #[test]
    fn an_empty_dag_and_an_unused_parameter_are_refused() {
        assert_eq!(DagBuilder::new("m").build().unwrap_err(), GraphError::Empty);
        let mut builder = DagBuilder::new("m");
        features(&mut builder);
        builder
            .param(Param { name: "w".to_owned(), shape: vec![2], init: Init::Ones, decay: false, frozen: false })
            .unwrap();
        let error = builder.build().unwrap_err();
        assert_eq!(error.to_string(), "parameter `w` is not used, expected an op that uses it");
    }
}
