//! Initial parameters: a function of a seed and the parameter's name, so any placement starts alike.

use fusionllm_graph::{Init, Param};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use rand_distr::{Distribution, Normal, Uniform};

use crate::ExecutorError;

/// Row-major initial values of a parameter, drawn from the stream of this seed.
pub(crate) fn initial_values(param: &Param, stream: [u8; 32]) -> Result<Vec<f32>, ExecutorError> {
    let count: usize = param.shape.iter().product();
    match param.init {
        Init::Zeros => Ok(vec![0.0; count]),
        Init::Ones => Ok(vec![1.0; count]),
        Init::Uniform { bound } => {
            let uniform = Uniform::new_inclusive(-bound, bound).map_err(|e| ExecutorError::Param {
                name: param.name.clone(),
                reason: format!("initial bound {bound}: {e}"),
            })?;
            let mut rng = ChaCha8Rng::from_seed(stream);
            Ok((0..count).map(|_| uniform.sample(&mut rng)).collect())
        }
        Init::Normal { std } => {
            let normal = Normal::new(0.0f32, std).map_err(|e| ExecutorError::Param {
                name: param.name.clone(),
                reason: format!("initial standard deviation {std}: {e}"),
            })?;
            let mut rng = ChaCha8Rng::from_seed(stream);
            Ok((0..count).map(|_| normal.sample(&mut rng)).collect())
        }
    }
}

/// Mixes a seed with what a random stream is for (64-bit FNV-1a over the parts, each ended by its length).
pub(crate) fn seed_for(seed: u64, parts: &[&[u8]]) -> u64 {
    let mut hash = fnv1a(0xcbf2_9ce4_8422_2325, &seed.to_le_bytes());
    for part in parts {
        hash = fnv1a(hash, part);
        hash = fnv1a(hash, &(part.len() as u64).to_le_bytes());
    }
    hash
}

fn fnv1a(hash: u64, bytes: &[u8]) -> u64 {
    bytes.iter().fold(hash, |h, &b| (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn param(name: &str) -> Param {
        Param {
            name: name.to_owned(),
            shape: vec![64, 64],
            init: Init::Normal { std: 0.02 },
            decay: true,
            frozen: false,
        }
    }

    #[test]
    fn initial_values_depend_on_the_seed_alone() {
        let a = initial_values(&param("a"), [1; 32]).unwrap();
        assert_eq!(a, initial_values(&param("a"), [1; 32]).unwrap());
        assert_ne!(a, initial_values(&param("a"), [2; 32]).unwrap());
    }

    #[test]
    fn initial_values_have_the_standard_deviation_asked_for() {
        let values = initial_values(&param("a"), [7; 32]).unwrap();
        let variance = values.iter().map(|v| v * v).sum::<f32>() / values.len() as f32;
        assert!((variance.sqrt() - 0.02).abs() < 0.001, "{}", variance.sqrt());
    }

    #[test]
    fn uniform_values_fill_their_bounds_and_pass_neither() {
        let uniform = Param { init: Init::Uniform { bound: 0.125 }, ..param("a") };
        let values = initial_values(&uniform, [7; 32]).unwrap();
        let (least, most) = values.iter().fold((0.0f32, 0.0f32), |(least, most), &v| (least.min(v), most.max(v)));
        assert!((-0.125..-0.124).contains(&least) && (0.124..=0.125).contains(&most), "{least} {most}");
        let mean = values.iter().sum::<f32>() / values.len() as f32;
        assert!(mean.abs() < 0.005, "{mean}");
    }
}
