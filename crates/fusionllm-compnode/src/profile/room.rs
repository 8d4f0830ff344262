//! Whether the ops of a job find room to be measured.

use fusionllm_graph::{OpDag, OpId};

use crate::CompNodeError;

/// Whether each op by itself finds room to be measured.
///
/// # Errors
/// [`CompNodeError::Memory`] with the op that needs most.
pub(crate) fn check_room(dag: &OpDag, batch: usize, room: u64) -> Result<(), CompNodeError> {
    let Some((needed, op)) = dag.op_ids().map(|op| (bytes_to_measure(dag, op, batch), op)).max() else { return Ok(()) };
    if needed <= room {
        return Ok(());
    }
    let what = format!("FP and BP of op `{}` over micro-batches of {batch} samples", dag.op(op).name);
    Err(CompNodeError::Memory { what, needed, room })
}

/// Bytes of what FP and BP of one op hold at once, at the least: inputs and parameters with their gradients, the output
/// with its gradient and the product of both.
fn bytes_to_measure(dag: &OpDag, id: OpId, batch: usize) -> u64 {
    let op = dag.op(id);
    let of_output = |id: OpId| dag.op(id).output.shape.elements(batch).saturating_mul(4);
    let inputs = op.inputs.iter().map(|&input| of_output(input)).fold(0u64, u64::saturating_add);
    let params = op.params.iter().map(|&param| dag.param(param).bytes()).fold(0u64, u64::saturating_add);
    inputs.saturating_add(params).saturating_mul(2).saturating_add(of_output(id).saturating_mul(3))
}

#[cfg(test)]
mod tests {
    use fusionllm_graph::{Gpt2Config, gpt2};

    use super::*;

    #[test]
    fn an_op_without_room_is_refused_with_the_numbers() {
        let mut config = Gpt2Config::named("gpt2").unwrap();
        (config.n_layer, config.n_embd, config.n_head) = (1, 32, 2);
        config.vocab_size = 200_000_000;
        let dag = gpt2(&config, 16).unwrap();
        let error = check_room(&dag, 1, 1 << 30).unwrap_err().to_string();
        // Its table of 200,000,000 rows of 32 numbers is 25.6 GB, and so is the table's gradient.
        assert!(
            error.starts_with("FP and BP of op `") && error.contains("micro-batches of 1 samples take "),
            "{error}"
        );
        assert!(error.contains("GB here, jobs may fill 1.07 GB") && error.contains("--memory-gb"), "{error}");
        check_room(&dag, 1, 1 << 40).unwrap();
        assert!(check_room(&dag, usize::MAX / 1_000_000_000, 1 << 40).is_err(), "nothing overflows");
    }
}
