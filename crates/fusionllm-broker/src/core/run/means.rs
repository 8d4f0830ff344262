//! What several CompNodes say of their micro-batches, as one number.

/// The mean over all micro-batches, where each value is the mean over so many. Who has computed none says nothing, if
/// another one has; what one says alone stays as it is, bit for bit.
pub(super) fn mean_of(said: &[(u64, f64)]) -> Option<f64> {
    let computed: Vec<(u64, f64)> = said.iter().copied().filter(|(times, _)| *times > 0).collect();
    match (&computed[..], said) {
        ([(_, value)], _) | ([], [(_, value)]) => Some(*value),
        ([], _) => None,
        (several, _) => {
            let count: u64 = several.iter().map(|(times, _)| times).sum();
            Some(several.iter().map(|&(times, value)| times as f64 * value).sum::<f64>() / count as f64)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_counts_as_its_micro_batches_and_one_alone_as_it_is() {
        for alone in (1..100).map(|i| f64::from(i).sqrt()) {
            for times in [0, 1, 3, 49] {
                assert_eq!(mean_of(&[(times, alone)]), Some(alone));
                assert_eq!(mean_of(&[(0, 7.0), (times, alone)]), Some(alone).filter(|_| times > 0));
            }
        }
        assert!((1..100).map(|i| f64::from(i).sqrt()).any(|x| x * 49.0 / 49.0 != x), "a mean of one would round it");
        assert_eq!(mean_of(&[(3, 2.0), (1, 6.0)]), Some(3.0));
        assert_eq!(mean_of(&[(0, f64::NAN), (2, 1.0), (2, 4.0)]), Some(2.5));
        assert_eq!((mean_of(&[]), mean_of(&[(0, 1.0), (0, 2.0)])), (None, None));
    }
}
