//! OP-Fence, first half: CompNodes in a line, such that the slowest hop is as fast as can be.
//!
//! Communities by bandwidth come first; between them lie the fences. Communities are ordered into a path by the
//! crossing that is worst, then by the sum of crossings; CompNodes within one follow each other over their best links.

use super::louvain::communities;
use crate::Cluster;

/// Up to here the best order of communities is found exactly, beyond by nearest neighbours from every start.
const EXACT_COMMUNITIES: usize = 10;

/// Communities of CompNodes that are joined by fast links: for each CompNode its community's number.
pub fn clusters_by_bandwidth(cluster: &Cluster) -> Vec<usize> {
    let n = cluster.compnodes.len();
    let finite = |bytes_per_s: f64| if bytes_per_s.is_finite() { bytes_per_s } else { 1e15 };
    let weight = |a: usize, b: usize| {
        let slower = cluster.link(a, b).bytes_per_s.min(cluster.link(b, a).bytes_per_s);
        if a == b { 0.0 } else { finite(slower) }
    };
    let weights: Vec<Vec<f64>> = (0..n).map(|a| (0..n).map(|b| weight(a, b)).collect()).collect();
    communities(&weights)
}

/// All CompNodes in a line, beginning with `first` if that is given. `bytes` is the size of a typical message.
pub(crate) fn line(cluster: &Cluster, bytes: f64, first: Option<usize>) -> Vec<usize> {
    let n = cluster.compnodes.len();
    let hop = |a: usize, b: usize| cluster.link(a, b).transfer_s(bytes).max(cluster.link(b, a).transfer_s(bytes));
    let community = clusters_by_bandwidth(cluster);
    let count = community.iter().max().map_or(0, |m| m + 1);
    let mut members: Vec<Vec<usize>> = vec![Vec::new(); count];
    for (node, &c) in community.iter().enumerate() {
        members[c].push(node);
    }
    let crossing = |a: usize, b: usize| {
        let pairs = members[a].iter().flat_map(|&x| members[b].iter().map(move |&y| (x, y)));
        pairs.map(|(x, y)| hop(x, y)).fold(f64::INFINITY, f64::min)
    };
    let table: Vec<Vec<f64>> = (0..count).map(|a| (0..count).map(|b| crossing(a, b)).collect()).collect();
    let path = path(&table, first.map(|f| community[f]));
    let mut line: Vec<usize> = Vec::with_capacity(n);
    for (place, &c) in path.iter().enumerate() {
        let next = path.get(place + 1).map(|&c| members[c].as_slice());
        let entry = match (line.last(), first) {
            (None, Some(first)) => Some(first),
            (None, None) => None,
            (Some(&last), _) => nearest(&members[c], |x| hop(last, x)),
        };
        line.extend(within(&members[c], entry, next, hop));
    }
    line
}

fn nearest(of: &[usize], distance: impl Fn(usize) -> f64) -> Option<usize> {
    of.iter().copied().min_by(|&a, &b| distance(a).total_cmp(&distance(b)))
}

/// The CompNodes of one community from `entry` over best links to the one nearest to the next community.
fn within(
    members: &[usize],
    entry: Option<usize>,
    next: Option<&[usize]>,
    hop: impl Fn(usize, usize) -> f64 + Copy,
) -> Vec<usize> {
    let mut left: Vec<usize> = members.to_vec();
    let to_next = |x: usize| next.into_iter().flatten().map(|&y| hop(x, y)).fold(f64::INFINITY, f64::min);
    let exit = next.and_then(|_| {
        let others: Vec<usize> = left.iter().copied().filter(|x| Some(*x) != entry || members.len() == 1).collect();
        nearest(&others, to_next)
    });
    let mut line = Vec::with_capacity(members.len());
    let begin = entry.or_else(|| left.iter().copied().find(|x| Some(*x) != exit)).or(exit);
    left.retain(|x| Some(*x) != begin && Some(*x) != exit);
    line.extend(begin);
    while let Some(&last) = line.last() {
        let Some(next) = nearest(&left, |x| hop(last, x)) else { break };
        left.retain(|&x| x != next);
        line.push(next);
    }
    line.extend(exit.filter(|x| Some(*x) != begin));
    line
}

/// The order of communities whose worst crossing, and then whose sum of crossings, is least.
fn path(crossing: &[Vec<f64>], first: Option<usize>) -> Vec<usize> {
    let n = crossing.len();
    if n <= EXACT_COMMUNITIES { exact(crossing, first) } else { greedy(crossing, first) }
}

/// The length of a line of communities.
#[derive(Clone, Copy)]
struct Length {
    /// Seconds of its longest crossing.
    worst: f64,
    /// Seconds of all its crossings.
    sum: f64,
}

impl Length {
    const ZERO: Self = Self { worst: 0.0, sum: 0.0 };
}

fn longer(length: Length, hop: f64) -> Length {
    Length { worst: length.worst.max(hop), sum: length.sum + hop }
}

fn is_less(a: Length, b: Length) -> bool {
    a.worst.total_cmp(&b.worst).then(a.sum.total_cmp(&b.sum)).is_lt()
}

/// By dynamic programming over sets (Held and Karp).
fn exact(crossing: &[Vec<f64>], first: Option<usize>) -> Vec<usize> {
    let n = crossing.len();
    let worst = Length { worst: f64::INFINITY, sum: f64::INFINITY };
    let mut best = vec![vec![(worst, usize::MAX); n]; 1 << n];
    for start in (0..n).filter(|s| first.is_none_or(|f| f == *s)) {
        best[1 << start][start] = (Length::ZERO, usize::MAX);
    }
    for set in 1usize..1 << n {
        for last in (0..n).filter(|l| set >> l & 1 == 1) {
            let (length, _) = best[set][last];
            if length.worst.is_infinite() {
                continue;
            }
            for next in (0..n).filter(|x| set >> x & 1 == 0) {
                let length = longer(length, crossing[last][next]);
                let place = &mut best[set | 1 << next][next];
                if is_less(length, place.0) {
                    *place = (length, last);
                }
            }
        }
    }
    let mut set = (1usize << n) - 1;
    let ends = (0..n).fold(None, |end: Option<usize>, x| match end {
        Some(e) if !is_less(best[set][x].0, best[set][e].0) => Some(e),
        _ => Some(x),
    });
    let mut path = Vec::with_capacity(n);
    let mut at = ends;
    while let Some(node) = at {
        path.push(node);
        let before = best[set][node].1;
        set &= !(1 << node);
        at = (before != usize::MAX).then_some(before);
    }
    path.reverse();
    path
}

fn greedy(crossing: &[Vec<f64>], first: Option<usize>) -> Vec<usize> {
    let n = crossing.len();
    let from = |start: usize| {
        let (mut path, mut length) = (vec![start], Length::ZERO);
        let mut left: Vec<usize> = (0..n).filter(|x| *x != start).collect();
        while let Some(&last) = path.last() {
            let Some(next) = nearest(&left, |x| crossing[last][x]) else { break };
            length = longer(length, crossing[last][next]);
            left.retain(|&x| x != next);
            path.push(next);
        }
        (length, path)
    };
    let starts = (0..n).filter(|s| first.is_none_or(|f| f == *s)).map(from);
    let best = starts.fold(None, |best: Option<(Length, Vec<usize>)>, next| match best {
        Some(best) if !is_less(next.0, best.0) => Some(best),
        _ => Some(next),
    });
    best.map(|(_, path)| path).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{CompNodeProfile, LinkProfile};

    /// CompNodes at places on a line of sites; links get slower with distance.
    fn cluster(site: &[usize]) -> Cluster {
        let link = |a: usize, b: usize| {
            let distance = site[a].abs_diff(site[b]) as i32;
            LinkProfile { latency_s: 0.0, bytes_per_s: 1e9 / 10f64.powi(distance) }
        };
        let n = site.len();
        Cluster {
            compnodes: (0..n).map(|i| CompNodeProfile::unit(format!("n{i}"))).collect(),
            links: (0..n).map(|a| (0..n).map(|b| link(a, b)).collect()).collect(),
        }
    }

    #[test]
    fn sites_follow_each_other_and_nobody_crosses_twice() {
        let site = [2, 0, 1, 0, 2, 1, 0];
        let line = line(&cluster(&site), 1e6, None);
        let order: Vec<usize> = line.iter().map(|&i| site[i]).collect();
        assert!(order == [0, 0, 0, 1, 1, 2, 2] || order == [2, 2, 1, 1, 0, 0, 0], "{order:?}");
    }

    #[test]
    fn the_line_can_begin_with_a_given_compnode() {
        let site = [0, 0, 1, 1, 2, 2];
        for first in 0..6 {
            let line = line(&cluster(&site), 1e6, Some(first));
            assert_eq!(line[0], first);
            let mut sorted = line.clone();
            sorted.sort_unstable();
            assert_eq!(sorted, [0, 1, 2, 3, 4, 5]);
            let crossings = line.windows(2).filter(|w| site[w[0]] != site[w[1]]).count();
            assert_eq!(crossings, 2, "{line:?}");
        }
    }

    #[test]
    fn the_exact_path_is_the_best_of_all() {
        let crossing = [[0.0, 9.0, 1.0, 5.0], [9.0, 0.0, 2.0, 4.0], [1.0, 2.0, 0.0, 8.0], [5.0, 4.0, 8.0, 0.0]];
        let crossing: Vec<Vec<f64>> = crossing.iter().map(|r| r.to_vec()).collect();
        let path = exact(&crossing, None);
        let worst = path.windows(2).map(|w| crossing[w[0]][w[1]]).fold(0.0, f64::max);
        assert_eq!(worst, 4.0);
        let greedy = greedy(&crossing, Some(3));
        assert_eq!((greedy[0], greedy.len()), (3, 4));
    }
}
