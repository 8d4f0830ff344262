//! Targets that take no part in the loss, among labels.
//!
//! A label below 0 is no target. It tells what each target of its micro-batch weighs instead of one over their number, so
//! that the mean over the micro-batches of a step is the mean over the targets of the whole batch, wherever they lie: the
//! loss of a micro-batch is `weight · Σ -log p(target)`. Where a micro-batch may have such labels, the last label of each
//! sequence is one.

/// The label of a position without a target. `weight` is above 0: micro-batches of the batch over targets in all of them.
pub(crate) fn no_target(weight: f32) -> i32 {
    (-weight).to_bits().cast_signed()
}

/// What each target of a micro-batch weighs, if it has labels that are none.
pub(crate) fn target_weight(mut labels: impl DoubleEndedIterator<Item = i32>) -> Option<f32> {
    labels.next_back().filter(|&label| label < 0).map(|label| -f32::from_bits(label.cast_unsigned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_label_that_is_no_target_tells_the_weight_of_the_others() {
        for weight in [1.0, 0.25, 1.0 / 3.0, 65_536.0, 1e-9] {
            assert!(no_target(weight) < 0);
            assert_eq!(target_weight([7, no_target(weight)].into_iter()), Some(weight));
        }
        assert_eq!(target_weight([no_target(0.5), 7].into_iter()), None);
        assert_eq!(target_weight([].into_iter()), None);
    }
}
