//! A shard as safetensors bytes: parameters under their Hugging Face names, optimizer state beside them.

use std::borrow::Cow;

use safetensors::tensor::{Dtype, View};
use safetensors::{SafeTensors, serialize};

use crate::ShardError;
use crate::executor::NamedTensor;

struct F32View<'a> {
    shape: &'a [usize],
    bytes: Vec<u8>,
}

impl View for &F32View<'_> {
    fn dtype(&self) -> Dtype {
        Dtype::F32
    }

    fn shape(&self) -> &[usize] {
        self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        Cow::Borrowed(&self.bytes)
    }

    fn data_len(&self) -> usize {
        self.bytes.len()
    }
}

/// The tensors as a safetensors file, all F32, in the order of their names.
///
/// # Errors
/// [`ShardError::Format`] if two tensors have one name.
pub fn write_shard(tensors: &[NamedTensor]) -> Result<Vec<u8>, ShardError> {
    let views: Vec<F32View<'_>> = tensors
        .iter()
        .map(|t| F32View { shape: &t.shape, bytes: t.values.iter().flat_map(|v| v.to_le_bytes()).collect() })
        .collect();
    let named = tensors.iter().map(|t| t.name.as_str()).zip(&views);
    serialize(named, None).map_err(|e| ShardError::Format { reason: e.to_string() })
}

/// The tensors of a safetensors file; F16 and BF16 are widened.
///
/// # Errors
/// [`ShardError`] for every byte string that is not such a file.
pub fn read_shard(bytes: &[u8]) -> Result<Vec<NamedTensor>, ShardError> {
    let file = SafeTensors::deserialize(bytes).map_err(|e| ShardError::Format { reason: e.to_string() })?;
    file.iter()
        .map(|(name, view)| {
            let data = view.data();
            let values = match view.dtype() {
                Dtype::F32 => data.as_chunks().0.iter().map(|&c| f32::from_le_bytes(c)).collect(),
                Dtype::F16 => data.as_chunks().0.iter().map(|&c| half::f16::from_le_bytes(c).to_f32()).collect(),
                Dtype::BF16 => data.as_chunks().0.iter().map(|&c| half::bf16::from_le_bytes(c).to_f32()).collect(),
                other => {
                    let reason = format!("element type {other:?}, expected F32, F16 or BF16");
                    return Err(ShardError::Tensor { name: name.to_owned(), reason });
                }
            };
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
