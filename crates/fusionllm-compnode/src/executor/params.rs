//! Parameters and optimizer state of an executor: how they are read and replaced by name, wherever they lie.

use std::sync::Arc;

use fusionllm_graph::{OpDag, Param, ParamId};
use fusionllm_protocol::{StateKind, TensorName};

use super::{LazyTensor, NamedTensor, TensorSource};
use crate::{CompNodeError, ExecutorError};

/// The parameters that an executor holds, and what its optimizer keeps of those that are trained.
pub trait Params {
    /// The whole OP-DAG.
    fn dag(&self) -> &Arc<OpDag>;

    /// The parameters that are held, in the order in which they are exported.
    fn held(&self) -> Vec<ParamId>;

    /// Whether a parameter is held.
    fn holds(&self, param: ParamId) -> bool;

    /// What the optimizer keeps of each parameter that is trained, once there was an UPDATE.
    fn states(&self) -> &'static [StateKind];

    /// Whether there is this state of a parameter that is trained.
    fn has_state(&self, param: ParamId, kind: StateKind) -> bool;

    /// Shows the row-major values of a parameter that is held, or of a state that there is.
    ///
    /// # Errors
    /// [`ExecutorError`] if there is no such thing, or the device fails.
    fn look(&self, param: ParamId, state: Option<StateKind>, see: &mut dyn FnMut(&[f32])) -> Result<(), ExecutorError>;

    /// Lets go of all state, and of what would keep the memory of values that are about to be replaced.
    ///
    /// # Errors
    /// [`ExecutorError`] if the device fails.
    fn begin_import(&mut self) -> Result<(), ExecutorError>;

    /// Replaces the values of a parameter that is held, row-major and of its shape.
    ///
    /// # Errors
    /// [`ExecutorError`] if the device fails.
    fn put(&mut self, param: ParamId, values: Vec<f32>) -> Result<(), ExecutorError>;

    /// Replaces one of [`Self::states`] of a parameter that is held and trained, row-major and of its shape.
    ///
    /// # Errors
    /// [`ExecutorError`] if the device fails.
    fn put_state(&mut self, param: ParamId, kind: StateKind, values: Vec<f32>) -> Result<(), ExecutorError>;

    /// All parameters have their new values.
    fn end_import(&mut self) {}

    /// Replaces parameters and optimizer state by what `tensors` holds; every parameter held here must be in it.
    ///
    /// # Errors
    /// [`ExecutorError::Param`] if one is missing or has another shape, [`ShardError`](crate::ShardError) if one cannot
    /// be read.
    fn import(&mut self, tensors: &mut dyn TensorSource) -> Result<(), CompNodeError> {
        let dag = Arc::clone(self.dag());
        self.begin_import()?;
        for id in self.held() {
            let Param { name, shape, frozen, .. } = dag.param(id);
            let missing = || ExecutorError::Param { name: name.clone(), reason: "not among the weights".to_owned() };
            let tensor = tensors.take(name)?.ok_or_else(missing)?;
            self.put(id, checked(tensor, shape)?)?;
            if *frozen {
                continue;
            }
            // What the optimizer does not use would be stored on and on.
            for &kind in self.states() {
                if let Some(tensor) = tensors.take(&TensorName::State { kind, param: name }.to_string())? {
                    self.put_state(id, kind, checked(tensor, shape)?)?;
                }
            }
        }
        self.end_import();
        Ok(())
    }

    /// All parameters and optimizer state.
    fn export(&self) -> Vec<LazyTensor<'_>> {
        let mut tensors = Vec::new();
        for id in self.held() {
            let Param { name, shape, frozen, .. } = self.dag().param(id);
            let lazy = |name: String, state: Option<StateKind>| {
                LazyTensor::new(name, shape.clone(), move |see| self.look(id, state, see))
            };
            for &kind in self.states().iter().filter(|&&kind| !frozen && self.has_state(id, kind)) {
                tensors.push(lazy(TensorName::State { kind, param: name }.to_string(), Some(kind)));
            }
            tensors.push(lazy(name.clone(), None));
        }
        tensors
    }
}

/// The values of a tensor from outside, held against a parameter's shape; all must be finite.
///
/// # Errors
/// [`ExecutorError::Param`] says what would be right.
fn checked(tensor: NamedTensor, shape: &[usize]) -> Result<Vec<f32>, ExecutorError> {
    let fail = |reason: String| Err(ExecutorError::Param { name: tensor.name.clone(), reason });
    if tensor.shape != shape || tensor.values.len() != shape.iter().product::<usize>() {
        return fail(format!("shape {:?}, expected {shape:?}", tensor.shape));
    }
    match tensor.values.iter().enumerate().find(|(_, value)| !value.is_finite()) {
        None => Ok(tensor.values),
        Some((at, value)) => {
            fail(format!("element {at} is {value}, expected finite numbers: these weights cannot be trained"))
        }
    }
}
