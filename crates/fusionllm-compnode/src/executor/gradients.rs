//! The accumulated gradients of an executor's parameters, as others than its own stages read and change them.

use std::ops::Range;

use fusionllm_graph::{Param, ParamId};

use super::Params;
use crate::ExecutorError;

/// The gradients of the parameters that an executor holds and trains, summed over the micro-batches of a step.
pub trait Gradients: Params {
    /// The rows of a table that lookups of this step have used, ascending: in all others the accumulated gradient of a
    /// table that is only looked up is zero.
    fn looked_up(&self, param: ParamId) -> Vec<u32>;

    /// Elements `range` of the accumulated gradient of a parameter (zeros if none came), row-major.
    ///
    /// # Errors
    /// [`ExecutorError`] if the parameter is not held here, is not trained, or has no such elements.
    fn gradient(&mut self, param: ParamId, range: Range<usize>) -> Result<Vec<f32>, ExecutorError>;

    /// These rows of the accumulated gradient of a parameter, one after the other.
    ///
    /// # Errors
    /// As [`Self::gradient`].
    fn gradient_of_rows(&mut self, param: ParamId, rows: &[u32]) -> Result<Vec<f32>, ExecutorError>;

    /// Replaces the elements of the accumulated gradient from `start` on.
    ///
    /// # Errors
    /// As [`Self::gradient`].
    fn set_gradient(&mut self, param: ParamId, start: usize, values: Vec<f32>) -> Result<(), ExecutorError>;

    /// Adds `values` to the elements of the accumulated gradient from `start` on.
    ///
    /// # Errors
    /// As [`Self::gradient`].
    fn add_gradient(&mut self, param: ParamId, start: usize, values: Vec<f32>) -> Result<(), ExecutorError>;

    /// Adds `values` to these rows of the accumulated gradient, each of which occurs once.
    ///
    /// # Errors
    /// As [`Self::gradient`].
    fn add_gradient_rows(&mut self, param: ParamId, rows: &[u32], values: Vec<f32>) -> Result<(), ExecutorError>;

    /// Sum of squares of the accumulated gradients of `params`.
    ///
    /// # Errors
    /// [`ExecutorError`] if the device fails.
    fn squared_norm(&mut self, params: &[ParamId]) -> Result<f64, ExecutorError>;
}

/// What becomes of the elements that were there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Write {
    /// Their sum with the new ones.
    Add,
    /// The new ones alone.
    Replace,
}

/// Holds elements of a parameter's gradient against what is held here.
///
/// # Errors
/// As [`Gradients::gradient`].
pub(crate) fn check_range(params: &impl Params, param: ParamId, range: &Range<usize>) -> Result<(), ExecutorError> {
    if !params.holds(param) {
        return Err(ExecutorError::param_not_held(param));
    }
    let Param { name, shape, frozen, .. } = params.dag().param(param);
    if *frozen {
        let what = format!("parameter {} is not trained, so it has no gradient", param.0);
        return Err(ExecutorError::Internal { what });
    }
    if range.start <= range.end && range.end <= shape.iter().product() {
        return Ok(());
    }
    Err(ExecutorError::Shape { op: name.clone(), expected: shape.clone(), got: vec![range.start, range.end] })
}

/// As [`check_range`], of rows. Gives the elements of a row.
///
/// # Errors
/// As [`Gradients::gradient`].
pub(crate) fn check_rows(params: &impl Params, param: ParamId, rows: &[u32]) -> Result<usize, ExecutorError> {
    if !params.holds(param) {
        return Err(ExecutorError::param_not_held(param));
    }
    let columns = params.dag().param(param).shape.iter().skip(1).product();
    let end = rows.iter().max().map_or(0, |&row| (row as usize + 1) * columns);
    check_range(params, param, &(0..end))?;
    Ok(columns)
}

/// As [`check_rows`], where so many values are to be added to the rows.
///
/// # Errors
/// As [`check_rows`], and [`ExecutorError::Shape`] if the values do not fill the rows.
pub(crate) fn check_filled_rows(
    params: &impl Params,
    param: ParamId,
    rows: &[u32],
    values: usize,
) -> Result<(), ExecutorError> {
    let columns = check_rows(params, param, rows)?;
    if values == rows.len() * columns {
        return Ok(());
    }
    let op = params.dag().param(param).name.clone();
    Err(ExecutorError::Shape { op, expected: vec![rows.len(), columns], got: vec![values] })
}
