//! Cosines and sines of rotary position embedding, on the device.

use std::collections::BTreeMap;
use std::sync::Arc;

use fusionllm_graph::{OpDag, OpId, OpKind};

use super::gpu::{Buffer, Gpu, bytes_of_f32};
use crate::ExecutorError;

/// The angles of rotary ops as their kernels take them, [2, S, K / 2]: cosines and sines. Equal ones are there once.
#[derive(Debug, Default)]
pub(super) struct Angles(BTreeMap<OpId, Arc<Buffer>>);

impl Angles {
    /// Those that `ops` need.
    ///
    /// # Errors
    /// [`ExecutorError::Device`] if memory lacks.
    pub(super) fn new(
        gpu: &Arc<dyn Gpu>,
        dag: &OpDag,
        ops: impl IntoIterator<Item = OpId>,
    ) -> Result<Self, ExecutorError> {
        let mut made: BTreeMap<OpId, Arc<Buffer>> = BTreeMap::new();
        for op in ops {
            let OpKind::Rotary { head_dim, base, scaling } = &dag.op(op).kind else { continue };
            let equal = made.iter().find(|(other, _)| are_alike(dag, **other, op));
            let equal = equal.map(|(_, buffer)| Arc::clone(buffer));
            let buffer = match equal {
                Some(buffer) => buffer,
                None => {
                    let (cosines, sines) = scaling.table(*head_dim, *base, positions(dag, op));
                    let bytes = [bytes_of_f32(&cosines), bytes_of_f32(&sines)].concat();
                    let buffer = Buffer::take(gpu, bytes.len())?;
                    gpu.upload(buffer.address(), &bytes)?;
                    Arc::new(buffer)
                }
            };
            made.insert(op, buffer);
        }
        Ok(Self(made))
    }

    /// Bytes of those that `ops` need.
    pub(super) fn bytes(dag: &OpDag, ops: impl IntoIterator<Item = OpId>) -> usize {
        let (mut counted, mut bytes): (Vec<OpId>, usize) = (Vec::new(), 0);
        for op in ops {
            let OpKind::Rotary { head_dim, .. } = &dag.op(op).kind else { continue };
            if !counted.iter().any(|&other| are_alike(dag, other, op)) {
                // Two tables of half a head's width.
                bytes += positions(dag, op) * head_dim * 4;
                counted.push(op);
            }
        }
        bytes
    }

    /// Where those of an op begin; 0 for an op that has none.
    pub(super) fn address(&self, op: OpId) -> u64 {
        self.0.get(&op).map_or(0, |buffer| buffer.address())
    }
}

fn positions(dag: &OpDag, op: OpId) -> usize {
    dag.op(op).output.shape.resolve(1).get(1).copied().unwrap_or(1)
}

/// Whether two rotary ops turn by the same angles.
fn are_alike(dag: &OpDag, one: OpId, other: OpId) -> bool {
    dag.op(one).kind == dag.op(other).kind && positions(dag, one) == positions(dag, other)
}
