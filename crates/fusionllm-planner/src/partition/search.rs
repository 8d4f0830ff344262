//! OP-Fence, last step: small changes of a chain, for as long as the simulator says that one helps.

use super::chain::Chain;
use crate::partition::pins::Pins;

/// How far a cut is moved at once.
const SHIFTS: [isize; 6] = [-1, 1, -2, 2, -4, 4];

/// Improves `chain` by the first of its neighbours that is faster, again and again, until none is or the budget of
/// evaluations is spent. `owner_is_fixed` keeps the first CompNode where it is.
pub(crate) fn improve(
    mut chain: Chain,
    devices: usize,
    pins: &Pins,
    owner_is_fixed: bool,
    budget: &mut usize,
    seconds: impl Fn(&Chain) -> f64,
) -> (Chain, f64) {
    let mut best = seconds(&chain);
    loop {
        let mut improved = false;
        for neighbour in neighbours(&chain, devices, pins, owner_is_fixed) {
            if *budget == 0 {
                return (chain, best);
            }
            *budget -= 1;
            let time = seconds(&neighbour);
            if time < best * (1.0 - 1e-9) {
                (chain, best, improved) = (neighbour, time, true);
                break;
            }
        }
        if !improved {
            return (chain, best);
        }
    }
}

/// Every chain that one change makes: a cut moved, a CompNode left out, taken in, exchanged, or two of them swapped.
fn neighbours(chain: &Chain, devices: usize, pins: &Pins, owner_is_fixed: bool) -> Vec<Chain> {
    let mut found = Vec::new();
    let used = chain.order.len();
    let movable = usize::from(owner_is_fixed);
    for cut in 0..used.saturating_sub(1) {
        for shift in SHIFTS {
            if let Some(end) = chain.ends[cut].checked_add_signed(shift) {
                let mut ends = chain.ends.clone();
                ends[cut] = end;
                found.push(Chain { order: chain.order.clone(), ends });
            }
        }
        // This cut and all after it: the stage before gives to the last one.
        for shift in [-1, 1] {
            let mut ends = chain.ends.clone();
            for end in ends.iter_mut().take(used - 1).skip(cut) {
                *end = end.saturating_add_signed(shift);
            }
            found.push(Chain { order: chain.order.clone(), ends });
        }
    }
    for place in movable..used {
        if used > 1 {
            // Its ops go to the one before, or to the one after.
            for to_next in [false, true] {
                let mut next = chain.clone();
                next.order.remove(place);
                next.ends.remove(if to_next || place == 0 { place } else { place - 1 });
                if let Some(last) = next.ends.last_mut() {
                    *last = pins.tail;
                }
                found.push(next);
            }
        }
        for other in place + 1..used {
            let mut next = chain.clone();
            next.order.swap(place, other);
            found.push(next);
        }
    }
    let unused: Vec<usize> = (0..devices).filter(|d| !chain.order.contains(d)).collect();
    for &device in &unused {
        for place in movable..used {
            let mut next = chain.clone();
            next.order[place] = device;
            found.push(next);
        }
        for place in movable..=used {
            let start = if place == 0 { 0 } else { chain.ends[place - 1] };
            // It takes half of the piece that begins where it is put in, or at the end half of the last one.
            let (low, high) = match chain.ends.get(place) {
                Some(&end) => (start, end),
                None => (if used > 1 { chain.ends[used - 2] } else { 0 }, pins.tail),
            };
            let mut next = chain.clone();
            next.order.insert(place, device);
            next.ends.insert(place.min(used), low + (high - low) / 2);
            if place == used {
                next.ends.swap(used - 1, used);
            }
            found.push(next);
        }
    }
    found.retain(|c| is_valid(c, pins));
    found
}

/// Every CompNode has an op, and the first one the pinned head.
pub(crate) fn is_valid(chain: &Chain, pins: &Pins) -> bool {
    let ascending = chain.ends.windows(2).all(|w| w[0] < w[1]);
    let head = chain.ends.first().is_some_and(|&end| end >= pins.head.max(1));
    ascending && head && chain.ends.last() == Some(&pins.tail) && chain.ends.len() == chain.order.len()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pins(ops: usize) -> Pins {
        Pins { head: 1, tail: ops, pinned: vec![false; ops] }
    }

    #[test]
    fn neighbours_are_valid_and_reach_everything() {
        let chain = Chain { order: vec![0, 2], ends: vec![4, 9] };
        let found = neighbours(&chain, 4, &pins(9), true);
        assert!(found.iter().all(|c| is_valid(c, &pins(9)) && c.order[0] == 0));
        let has = |order: &[usize], ends: &[usize]| found.iter().any(|c| c.order == order && c.ends == ends);
        assert!(has(&[0, 2], &[5, 9]) && has(&[0], &[9]) && has(&[0, 3], &[4, 9]));
        assert!(has(&[0, 1, 2], &[4, 6, 9]) && has(&[0, 2, 3], &[4, 6, 9]));
    }

    #[test]
    fn the_search_finds_the_even_cut() {
        let uneven = Chain { order: vec![0, 1, 2], ends: vec![1, 2, 12] };
        let seconds = |c: &Chain| {
            let starts = std::iter::once(0).chain(c.ends.iter().copied());
            let longest = starts.zip(&c.ends).map(|(s, e)| e - s).max().unwrap();
            let squares: usize =
                std::iter::once(0).chain(c.ends.iter().copied()).zip(&c.ends).map(|(s, e)| (e - s).pow(2)).sum();
            longest as f64 + squares as f64 * 1e-3
        };
        let (chain, _) = improve(uneven, 3, &pins(12), true, &mut 1000, seconds);
        assert_eq!(chain.ends, [4, 8, 12]);
    }
}
