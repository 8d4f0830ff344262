//! Machines of one organisation count as one onlooker.
//!
//! Under `data.private` no two CompNodes of one organisation are neighbours, since together they would see a longer piece of the
//! model; and no organisation holds both ends of what the data owner gives away, since it would see what goes in and what
//! comes out. The owner's own machines may lie as they like, and a machine without an organisation stands for itself alone.

use crate::{Cluster, NodeIndex, PlanError, Segment};

/// Whether two CompNodes belong to one organisation, which is not that of `owner`. All are places in the cluster.
pub(super) fn collude(cluster: &Cluster, owner: usize, a: usize, b: usize) -> bool {
    let org = |at: usize| cluster.compnodes.get(at).and_then(|compnode| compnode.org.as_deref());
    org(a).is_some_and(|of_a| org(b) == Some(of_a) && org(owner) != Some(of_a))
}

/// Whether neighbours in a line of CompNodes, the data owner first, belong to different organisations.
fn are_neighbours_apart(cluster: &Cluster, order: &[usize]) -> bool {
    let Some((&owner, others)) = order.split_first() else { return true };
    others.windows(2).all(|pair| !collude(cluster, owner, pair[0], pair[1]))
}

/// Whether the second and the last of a line may both have the data owner beside them.
pub(super) fn may_close(cluster: &Cluster, order: &[usize]) -> bool {
    match order {
        [owner, first, .., last] => !collude(cluster, *owner, *first, *last),
        [owner, only] => !collude(cluster, *owner, *only, *only),
        _ => true,
    }
}

/// Whether a line of CompNodes keeps organisations apart. The data owner comes first, and holds the end too.
pub(super) fn are_apart(cluster: &Cluster, order: &[usize]) -> bool {
    are_neighbours_apart(cluster, order) && may_close(cluster, order)
}

/// The same line without those that would have one of their own organisation before them, as long as others can take their
/// place.
pub(super) fn with_neighbours_apart(cluster: &Cluster, line: &[usize]) -> Vec<usize> {
    let Some((&owner, rest)) = line.split_first() else { return Vec::new() };
    let (mut order, mut left) = (vec![owner], rest.to_vec());
    while let Some(&last) = order.last() {
        let next = left.iter().position(|&at| order.len() == 1 || !collude(cluster, owner, last, at));
        let Some(next) = next else { break };
        order.push(left.remove(next));
    }
    order
}

/// All CompNodes in a line that keeps organisations apart, the first one first; in their own order if that does. Nothing if
/// there is none.
pub(crate) fn all_apart(cluster: &Cluster) -> Option<Vec<usize>> {
    let own: Vec<usize> = (0..cluster.compnodes.len()).collect();
    if are_apart(cluster, &own) {
        return Some(own);
    }
    let (&owner, others) = own.split_first()?;
    let mut groups: Vec<Vec<usize>> = Vec::new();
    for &at in others {
        match groups.iter_mut().find(|group| collude(cluster, owner, group[0], at)) {
            Some(group) => group.push(at),
            None => groups.push(vec![at]),
        }
    }
    // The line is a ring but for the owner, in which nobody has one of its own beside it: every other place first, the
    // largest organisation first.
    groups.sort_by_key(|group| std::cmp::Reverse(group.len()));
    let count = others.len();
    let places = (0..count).step_by(2).chain((1..count).step_by(2));
    let mut ring = vec![owner; count];
    for (place, at) in places.zip(groups.into_iter().flatten()) {
        ring[place] = at;
    }
    let line: Vec<usize> = std::iter::once(owner).chain(ring).collect();
    are_apart(cluster, &line).then_some(line)
}

/// Holds stages that the job lists itself against the same rule.
///
/// # Errors
/// [`PlanError::Orgs`] with the two that would see too much.
pub(crate) fn check_stages(cluster: &Cluster, segments: &[Segment]) -> Result<(), PlanError> {
    let owner = NodeIndex::DATA_OWNER;
    let colludes = |a: NodeIndex, b: NodeIndex| collude(cluster, owner.index(), a.index(), b.index());
    let others: Vec<NodeIndex> = segments.iter().map(|s| s.compnode).filter(|&at| at != owner).collect();
    let beside = segments.windows(2).map(|pair| (pair[0].compnode, pair[1].compnode));
    let is_u = segments.len() > 1 && segments.last().is_some_and(|s| s.compnode == owner);
    let ends = others.first().copied().zip(others.last().copied()).filter(|_| is_u);
    let mut met = beside.filter(|(a, b)| a != b).chain(ends);
    match met.find(|&(a, b)| colludes(a, b)) {
        Some((a, _)) => Err(refused(cluster, cluster.compnodes.get(a.index()).and_then(|c| c.org.as_deref()))),
        None => Ok(()),
    }
}

/// Nothing keeps the organisations apart: that of the name, or else the largest one, is too large.
pub(crate) fn refused(cluster: &Cluster, org: Option<&str>) -> PlanError {
    let owners = cluster.compnodes.first().and_then(|c| c.org.as_deref());
    let foreign =
        || cluster.compnodes.iter().skip(1).filter_map(|c| c.org.as_deref()).filter(move |org| Some(*org) != owners);
    let count = |org: &str| foreign().filter(|other| *other == org).count();
    let largest = foreign().fold(None, |largest: Option<&str>, org| match largest {
        Some(largest) if count(largest) >= count(org) => Some(largest),
        _ => Some(org),
    });
    let org = org.or(largest).unwrap_or_default();
    PlanError::Orgs { org: org.to_owned(), of_org: count(org), others: cluster.compnodes.len().saturating_sub(1) }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::CompNodeProfile;

    /// A cluster of these organisations, `-` being none.
    fn cluster(orgs: &str) -> Cluster {
        let profile = |(at, org): (usize, char)| CompNodeProfile {
            org: (org != '-').then(|| org.to_string()),
            ..CompNodeProfile::unit(format!("n{at}"))
        };
        Cluster { compnodes: orgs.chars().enumerate().map(profile).collect(), links: Vec::new() }
    }

    #[test]
    fn neighbours_and_ends_are_of_different_organisations() {
        for (orgs, apart) in [
            ("o", true),
            ("oo", true),
            ("oa", false),
            ("o-", true),
            ("oab", true),
            ("oaba", false),
            ("oaab", false),
            ("oabab", true),
            ("oa-b", true),
            ("o--", true),
            ("-ab", true),
            ("oaoob", true),
            ("oaob-a", false),
        ] {
            let cluster = cluster(orgs);
            let own: Vec<usize> = (0..orgs.len()).collect();
            assert_eq!(are_apart(&cluster, &own), apart, "{orgs}");
        }
    }

    #[test]
    fn a_line_leaves_out_whom_it_cannot_place() {
        let cluster = cluster("oaaab");
        assert_eq!(with_neighbours_apart(&cluster, &[0, 1, 2, 3, 4]), [0, 1, 4, 2]);
        assert_eq!(all_apart(&cluster), None);
    }

    #[test]
    fn stages_that_are_listed_are_held_against_the_same_rule() {
        let check = |orgs: &str, stages: &[u32]| {
            let segment = |(at, &node): (usize, &u32)| Segment { compnode: NodeIndex(node), ops: at..at + 1 };
            check_stages(&cluster(orgs), &stages.iter().enumerate().map(segment).collect::<Vec<_>>())
        };
        check("oab", &[0, 1, 2, 0]).unwrap();
        check("oa", &[0]).unwrap();
        check("oa-", &[0, 1, 2, 0]).unwrap();
        let error = check("oaa", &[0, 1, 2, 0]).unwrap_err();
        assert!(matches!(&error, PlanError::Orgs { org, of_org: 2, others: 2 } if org == "a"), "{error}");
        check("oa", &[0, 1, 0]).unwrap_err();
        check("oab", &[0, 1, 0, 2, 1, 0]).unwrap_err();
    }

    proptest! {
        #[test]
        fn all_are_placed_wherever_that_can_be(orgs in prop::collection::vec(0u8..4, 1..8)) {
            let text: String = std::iter::once('o').chain(orgs.iter().map(|&o| ['-', 'a', 'b', 'c'][o as usize])).collect();
            let cluster = cluster(&text);
            let largest = (1..4).map(|org| orgs.iter().filter(|&&o| o == org).count()).max().unwrap();
            // Nobody may have more than half of a ring.
            let can_be = if orgs.len() == 1 { largest == 0 } else { largest <= orgs.len() / 2 };
            let line = all_apart(&cluster);
            prop_assert_eq!(line.is_some(), can_be, "{}", text);
            if let Some(mut line) = line {
                prop_assert!(are_apart(&cluster, &line) && line[0] == 0, "{}: {:?}", text, line);
                line.sort_unstable();
                prop_assert_eq!(line, (0..text.len()).collect::<Vec<_>>());
            }
        }
    }
}
