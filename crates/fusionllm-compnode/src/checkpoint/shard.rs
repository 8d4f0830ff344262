//! A shard as safetensors bytes: parameters under their Hugging Face names, optimizer state beside them.

use std::io::Write;
use std::path::Path;

use fusionllm_protocol::{TensorHeader, TensorHeaderError};
use safetensors::SafeTensors;
use safetensors::tensor::Dtype;

use crate::ShardError;
use crate::executor::{LazyTensor, NamedTensor};

/// Values turned into bytes at a time.
const VALUES_AT_ONCE: usize = 1 << 16;

/// Writes tensors as a safetensors file, all F32, in the order of their names, and each is made only when it is its
/// turn. Gives the bytes of the file, which errors call `path`.
///
/// # Errors
/// [`ShardError`] if two tensors have one name, one cannot be made, or `out` does not take them.
pub fn write_shard_to(out: &mut impl Write, path: &Path, mut tensors: Vec<LazyTensor<'_>>) -> Result<u64, ShardError> {
    let io = |source| ShardError::Io { path: path.to_owned(), source };
    tensors.sort_by(|x, y| x.name.cmp(&y.name));
    let infos = tensors.iter().map(|t| (t.name.clone(), Dtype::F32, t.shape.clone()));
    let header = TensorHeader::write(out, infos).map_err(|e| header_error(e, io))?;
    let mut bytes = Vec::with_capacity(VALUES_AT_ONCE * size_of::<f32>());
    for tensor in tensors {
        let (name, shape) = (tensor.name.clone(), tensor.shape.clone());
        let (mut count, mut written) = (0, Ok(()));
        tensor.look(|values| {
            count += values.len();
            for values in values.chunks(VALUES_AT_ONCE) {
                bytes.clear();
                bytes.extend(values.iter().flat_map(|v| v.to_le_bytes()));
                if written.is_ok() {
                    written = out.write_all(&bytes);
                }
            }
        })?;
        written.map_err(io)?;
        if count != shape.iter().product::<usize>() {
            let reason = format!("has {count} values, expected those of shape {shape:?}");
            return Err(ShardError::Tensor { name, reason });
        }
    }
    Ok(header.file_bytes())
}

/// The tensors as a safetensors file, all F32, in the order of their names.
///
/// # Errors
/// [`ShardError::Format`] if two tensors have one name.
pub fn write_shard(tensors: &[NamedTensor]) -> Result<Vec<u8>, ShardError> {
    let mut bytes = Vec::new();
    let lazy = tensors.iter().map(|t| {
        LazyTensor::new(t.name.clone(), t.shape.clone(), |see| {
            see(&t.values);
            Ok(())
        })
    });
    write_shard_to(&mut bytes, Path::new("memory"), lazy.collect())?;
    Ok(bytes)
}

/// What is wrong with the header of a shard.
pub(super) fn header_error(error: TensorHeaderError, io: impl FnOnce(std::io::Error) -> ShardError) -> ShardError {
    match error {
        TensorHeaderError::Io(source) => io(source),
        other => ShardError::Format { reason: other.to_string() },
    }
}

/// The values of a tensor of this type.
pub(super) fn values(name: &str, dtype: Dtype, data: &[u8]) -> Result<Vec<f32>, ShardError> {
    Ok(match dtype {
        Dtype::F32 => data.as_chunks().0.iter().map(|&c| f32::from_le_bytes(c)).collect(),
        Dtype::F16 => data.as_chunks().0.iter().map(|&c| half::f16::from_le_bytes(c).to_f32()).collect(),
        Dtype::BF16 => data.as_chunks().0.iter().map(|&c| half::bf16::from_le_bytes(c).to_f32()).collect(),
        other => {
            let reason = format!("element type {other:?}, expected F32, F16 or BF16");
            return Err(ShardError::Tensor { name: name.to_owned(), reason });
        }
    })
}

/// The tensors of a safetensors file; F16 and BF16 are widened.
///
/// # Errors
/// [`ShardError`] for every byte string that is not such a file.
pub fn read_shard(bytes: &[u8]) -> Result<Vec<NamedTensor>, ShardError> {
    let file = SafeTensors::deserialize(bytes).map_err(|e| ShardError::Format { reason: e.to_string() })?;
    file.iter()
        .map(|(name, view)| {
            let values = values(name, view.dtype(), view.data())?;
            Ok(NamedTensor { name: name.to_owned(), shape: view.shape().to_vec(), values })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shard_round_trips() {
        let tensors = vec![
            NamedTensor { name: "a".to_owned(), shape: vec![2, 2], values: vec![1.0, -2.5, f32::MIN_POSITIVE, 4.0] },
            NamedTensor { name: "optimizer.exp_avg.a".to_owned(), shape: vec![2, 2], values: vec![0.0; 4] },
        ];
        let mut back = read_shard(&write_shard(&tensors).unwrap()).unwrap();
        back.sort_by(|x, y| x.name.cmp(&y.name));
        assert_eq!(back, tensors);
    }

    #[test]
    fn damaged_bytes_are_an_error() {
        let bytes = write_shard(&[NamedTensor { name: "a".to_owned(), shape: vec![3], values: vec![1.0; 3] }]).unwrap();
        for end in 0..bytes.len() {
            assert!(read_shard(&bytes[..end]).is_err(), "cut to {end} bytes");
        }
    }
}
