//! Between host memory and device tensors.

use std::sync::Arc;

use burn_tensor::{Device, Int, Tensor, TensorData};
use fusionllm_codec::{HostTensor, Values};

use crate::ExecutorError;
use crate::border::{BorderTensor, DeviceTensor};
pub(crate) use crate::burn::kernels::to_vec;
use crate::burn::kernels::{IntegerValue, RealValue, Value, fused};

/// Copies a host tensor to the device.
pub(crate) fn upload(tensor: HostTensor, device: &Device) -> Value {
    let (shape, values) = tensor.into_parts();
    match values {
        Values::F32(values) => {
            let (rows, columns) = rows_and_columns(&shape);
            let tensor = Tensor::<2>::from_data(TensorData::new(values, [rows, columns]), device);
            Value::Real(RealValue { tensor, shape })
        }
        Values::I32(values) => {
            let count = values.len();
            let tensor = Tensor::<1, Int>::from_data(TensorData::new(values, [count]), device);
            Value::Integer(IntegerValue { tensor, shape })
        }
    }
}

/// Copies a real tensor of any rank to the host, under the shape it stands for.
pub(crate) fn download<const D: usize>(tensor: Tensor<D>, shape: &[usize]) -> Result<HostTensor, ExecutorError> {
    let values = to_vec(tensor)?;
    HostTensor::new(shape.to_vec(), Values::F32(values))
        .map_err(|e| ExecutorError::Internal { what: format!("device tensor: {e}") })
}

/// A tensor at the border of a stage, as its executor keeps it.
#[derive(Debug)]
struct BurnTensor {
    tensor: Tensor<2>,
    shape: Vec<usize>,
}

impl DeviceTensor for BurnTensor {
    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn to_host(&self) -> Result<HostTensor, ExecutorError> {
        download(self.tensor.clone(), &self.shape)
    }
}

/// A tensor outside autodiff that leaves a stage.
pub(crate) fn at_border(tensor: Tensor<2>, shape: &[usize]) -> BorderTensor {
    BorderTensor::Device(Arc::new(BurnTensor { tensor, shape: shape.to_vec() }))
}

/// A tensor that enters a stage.
///
/// # Errors
/// [`ExecutorError`] if it comes from another device, which fails.
pub(crate) fn value_of(tensor: BorderTensor, device: &Device) -> Result<Value, ExecutorError> {
    match tensor.of_kind::<BurnTensor>() {
        Some(BurnTensor { tensor, shape }) if tensor.device() == *device => {
            Ok(Value::Real(RealValue { tensor: tensor.clone(), shape: shape.clone() }))
        }
        _ => Ok(upload(tensor.into_host()?, device)),
    }
}

/// Shows the values of a flat tensor outside autodiff, on the CPU where they are.
pub(crate) fn look(tensor: Tensor<1>, see: &mut dyn FnMut(&[f32])) -> Result<(), ExecutorError> {
    match fused::into_cpu(tensor) {
        Ok(tensor) => see(tensor.to_contiguous().storage()),
        Err(tensor) => see(&to_vec(*tensor)?),
    }
    Ok(())
}

/// The one number of a scalar tensor.
pub(crate) fn to_scalar<const D: usize>(tensor: Tensor<D>) -> Result<f64, ExecutorError> {
    let values = to_vec(tensor)?;
    values.first().map(|&v| f64::from(v)).ok_or_else(|| ExecutorError::Internal { what: "empty scalar".to_owned() })
}

/// A logical shape as the two dimensions that kernels work on: everything but the last, and the last.
pub(crate) fn rows_and_columns(shape: &[usize]) -> (usize, usize) {
    match shape.split_last() {
        Some((&columns, rows)) => (rows.iter().product(), columns),
        None => (1, 1),
    }
}
