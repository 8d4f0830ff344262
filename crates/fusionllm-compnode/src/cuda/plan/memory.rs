//! Places for tensors that are needed only for a while: those that never live at the same time share memory.

use super::{ALIGNMENT, Argument, Place, Region, Step};

/// Tensors that wait for a place.
#[derive(Debug, Default)]
pub(super) struct Temporaries {
    bytes: Vec<usize>,
}

/// The steps that use a tensor, the first and the last.
#[derive(Clone, Copy, Debug)]
struct Life {
    tensor: usize,
    first: usize,
    last: usize,
}

impl Temporaries {
    pub(super) fn take(&mut self, bytes: usize) -> Place {
        self.bytes.push(bytes.max(1).next_multiple_of(ALIGNMENT));
        Place { region: Region::Temporary(self.bytes.len() - 1), offset: 0 }
    }

    /// Decides the places of all tensors that `steps` use, one step after the other, and gives the bytes they take.
    /// Those of `before` are written before the first step, those of `after` read after the last.
    pub(super) fn place<'a>(
        &self,
        steps: &mut [Step],
        before: impl IntoIterator<Item = &'a mut Place>,
        after: impl IntoIterator<Item = &'a mut Place>,
    ) -> usize {
        let mut lives: Vec<Option<Life>> = vec![None; self.bytes.len()];
        let mut used = |place: &Place, at: usize| {
            if let Region::Temporary(tensor) = place.region {
                let life = lives[tensor].get_or_insert(Life { tensor, first: at, last: at });
                life.last = life.last.max(at);
            }
        };
        let (before, after): (Vec<_>, Vec<_>) = (before.into_iter().collect(), after.into_iter().collect());
        before.iter().for_each(|place| used(place, 0));
        for (at, step) in steps.iter_mut().enumerate() {
            each_place(step, &mut |place| used(place, at + 1));
        }
        after.iter().for_each(|place| used(place, steps.len() + 1));
        let (offsets, bytes) = self.first_fit(lives.into_iter().flatten().collect());
        let decide = |place: &mut Place| {
            if let Region::Temporary(tensor) = place.region {
                *place = Place { region: Region::Scratch, offset: offsets[tensor] + place.offset };
            }
        };
        steps.iter_mut().for_each(|step| each_place(step, &mut |place| decide(place)));
        before.into_iter().chain(after).for_each(decide);
        bytes
    }

    /// The largest first, each at the lowest offset that is free while it lives.
    fn first_fit(&self, mut lives: Vec<Life>) -> (Vec<usize>, usize) {
        let mut offsets = vec![0; self.bytes.len()];
        let mut end = 0;
        lives.sort_by_key(|life| (std::cmp::Reverse(self.bytes[life.tensor]), life.first));
        let mut placed: Vec<Life> = Vec::new();
        for life in lives {
            let meets = |other: &&Life| other.first <= life.last && life.first <= other.last;
            let mut taken: Vec<(usize, usize)> = placed
                .iter()
                .filter(meets)
                .map(|other| (offsets[other.tensor], offsets[other.tensor] + self.bytes[other.tensor]))
                .collect();
            taken.sort_unstable();
            let mut offset = 0;
            for (start, stop) in taken {
                if offset + self.bytes[life.tensor] <= start {
                    break;
                }
                offset = offset.max(stop);
            }
            offsets[life.tensor] = offset;
            end = end.max(offset + self.bytes[life.tensor]);
            placed.push(life);
        }
        (offsets, end)
    }
}

/// Visits every place of a step.
fn each_place(step: &mut Step, visit: &mut dyn FnMut(&mut Place)) {
    match step {
        Step::Launch { arguments, .. } | Step::LaunchRows { arguments, .. } => {
            for argument in arguments {
                if let Argument::At(place) = argument {
                    visit(place);
                }
            }
        }
        Step::Multiply { a, b, c, d, bias, .. } => {
            visit(a);
            visit(b);
            visit(d);
            c.iter_mut().chain(bias).for_each(visit);
        }
        Step::Copy { from, to, .. } => {
            visit(from);
            visit(to);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn copy(from: Place, to: Place) -> Step {
        Step::Copy { from, to, bytes: 1 }
    }

    #[test]
    fn tensors_share_memory_unless_they_live_together() {
        let mut temporaries = Temporaries::default();
        let [a, b, c] = [1000, 300, 600].map(|bytes| temporaries.take(bytes));
        let mut steps = [copy(a, a), copy(a, b), copy(b, c), copy(c, c)];
        assert_eq!(temporaries.place(&mut steps, [], []), 1024 + 512, "b lives with a and with c, which never meet");
        let scratch = |offset| Place { region: Region::Scratch, offset };
        let (a, b, c) = (scratch(0), scratch(1024), scratch(0));
        assert_eq!(steps, [copy(a, a), copy(a, b), copy(b, c), copy(c, c)]);
    }

    #[test]
    fn what_comes_before_and_goes_after_has_its_place_so_long() {
        let mut temporaries = Temporaries::default();
        let [mut seed, b, mut result] = [256, 256, 256].map(|bytes| temporaries.take(bytes));
        let mut steps = [copy(b, b), copy(seed, result), copy(b, b)];
        assert_eq!(temporaries.place(&mut steps, [&mut seed], [&mut result]), 3 * 256);
        assert!(seed.region == Region::Scratch && result.region == Region::Scratch);
    }
}
