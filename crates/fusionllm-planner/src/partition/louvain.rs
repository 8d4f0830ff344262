//! Communities by modularity: the Louvain method (Blondel et al., "Fast unfolding of communities in large networks",
//! 2008), deterministic: nodes are visited in order, and of equal gains the first wins.

/// Gains below this are rounding.
const LEAST_GAIN: f64 = 1e-12;

/// The community of each node, numbered from 0 in order of first appearance. `weights` is symmetric; its diagonal is
/// not looked at.
pub(crate) fn communities(weights: &[Vec<f64>]) -> Vec<usize> {
    let mut of_node: Vec<usize> = (0..weights.len()).collect();
    let mut level: Vec<Vec<f64>> = weights.to_vec();
    for (i, row) in level.iter_mut().enumerate() {
        row[i] = 0.0;
    }
    loop {
        let moved = move_nodes(&level);
        let count = moved.iter().max().map_or(0, |m| m + 1);
        for community in &mut of_node {
            *community = moved[*community];
        }
        if count == level.len() {
            return renumber(&of_node);
        }
        level = merge(&level, &moved, count);
    }
}

/// One level: each node moves to the neighbouring community that gains the most modularity, until none does.
fn move_nodes(weights: &[Vec<f64>]) -> Vec<usize> {
    let n = weights.len();
    let degree: Vec<f64> = weights.iter().map(|row| row.iter().sum()).collect();
    let total: f64 = degree.iter().sum();
    let mut community: Vec<usize> = (0..n).collect();
    if total <= 0.0 {
        return community;
    }
    let mut community_degree = degree.clone();
    let mut to_community = vec![0.0; n];
    loop {
        let mut moved = false;
        for node in 0..n {
            to_community.fill(0.0);
            for (other, &weight) in weights[node].iter().enumerate().filter(|(other, _)| *other != node) {
                to_community[community[other]] += weight;
            }
            let old = community[node];
            community_degree[old] -= degree[node];
            let gain = |c: usize| to_community[c] - community_degree[c] * degree[node] / total;
            let mut best = (old, gain(old));
            for c in (0..n).filter(|&c| to_community[c] > 0.0) {
                if gain(c) > best.1 + LEAST_GAIN * total {
                    best = (c, gain(c));
                }
            }
            community_degree[best.0] += degree[node];
            community[node] = best.0;
            moved |= best.0 != old;
        }
        if !moved {
            return renumber(&community);
        }
    }
}

fn merge(weights: &[Vec<f64>], community: &[usize], count: usize) -> Vec<Vec<f64>> {
    let mut merged = vec![vec![0.0; count]; count];
    for (a, row) in weights.iter().enumerate() {
        for (b, weight) in row.iter().enumerate() {
            merged[community[a]][community[b]] += weight;
        }
    }
    merged
}

fn renumber(community: &[usize]) -> Vec<usize> {
    let mut names = std::collections::BTreeMap::new();
    let mut number = |c: usize| {
        let next = names.len();
        *names.entry(c).or_insert(next)
    };
    community.iter().map(|&c| number(c)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Sites of the given sizes: fast within, slow between.
    fn sites(sizes: &[usize], fast: f64, slow: f64) -> (Vec<Vec<f64>>, Vec<usize>) {
        let site: Vec<usize> = sizes.iter().enumerate().flat_map(|(i, &n)| std::iter::repeat_n(i, n)).collect();
        let weight = |a: usize, b: usize| if site[a] == site[b] { fast } else { slow };
        (site.iter().enumerate().map(|(a, _)| (0..site.len()).map(|b| weight(a, b)).collect()).collect(), site)
    }

    #[test]
    fn sites_are_found() {
        for sizes in [vec![4, 4], vec![3, 5, 2], vec![8, 8, 8, 8], vec![2, 12, 3]] {
            let (weights, site) = sites(&sizes, 1000.0, 10.0);
            assert_eq!(communities(&weights), site, "{sizes:?}");
        }
    }

    #[test]
    fn equals_are_one_community() {
        let (weights, _) = sites(&[6], 1.0, 1.0);
        assert_eq!(communities(&weights), [0; 6]);
    }

    #[test]
    fn the_ends_are_harmless() {
        assert_eq!(communities(&[]), [0usize; 0]);
        assert_eq!(communities(&[vec![5.0]]), [0]);
        assert_eq!(communities(&[vec![0.0, 0.0], vec![0.0, 0.0]]), [0, 1]);
    }

    #[test]
    fn a_ring_of_cliques_falls_into_its_cliques() {
        let (cliques, size) = (10, 3);
        let n = cliques * size;
        let weight = |a: usize, b: usize| if a / size == b / size && a != b { 1.0 } else { 0.0 };
        let mut weights: Vec<Vec<f64>> = (0..n).map(|a| (0..n).map(|b| weight(a, b)).collect()).collect();
        for clique in 0..cliques {
            let (a, b) = (clique * size, ((clique + 1) % cliques) * size + 1);
            weights[a][b] = 0.1;
            weights[b][a] = 0.1;
        }
        let expected: Vec<usize> = (0..n).map(|i| i / size).collect();
        assert_eq!(communities(&weights), expected);
    }
}
