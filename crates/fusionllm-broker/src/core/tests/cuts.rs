//! Links between CompNodes are cut, and all of them are alive.

use fusionllm_planner::PlanError;

use super::recovery::{notices, tick, waits_for};
use super::*;

fn lost(key: RunKey, peer: u32) -> FromCompNode {
    FromCompNode::LinkLost { key, peer: NodeIndex(peer), reason: "did not connect within 45 s".to_owned() }
}

/// A job at work on CompNodes `a`, `b`, ...
fn at_work(compnodes: u64, overrides: &[&str]) -> Core {
    let mut core = core(compnodes);
    submit(&mut core, overrides);
    starts(&mut core, KEY);
    core
}

/// All members are ready, and do a step.
fn starts(core: &mut Core, key: RunKey) {
    let members = core.run_mut(key).unwrap().members.clone();
    members.iter().for_each(|member| drop(say(core, member.0, ready(key))));
    let first = core.record(key.job).unwrap().step + 1;
    members.iter().for_each(|member| drop(say(core, member.0, step(key, first, Some(1.0)))));
    assert_eq!(state(core, 1), JobState::Running);
}

/// The placement that the job has now, by its CompNodes' connections.
fn placed(core: &Core) -> Option<(RunKey, Vec<u64>)> {
    let run = core.jobs[&JobId(1)].run.as_ref()?;
    Some((run.key, run.members.iter().map(|member| member.0).collect()))
}

/// No CompNode is kept for two jobs, and what it is said to be at work on is its job.
fn each_works_for_one(core: &Core) {
    let mut taken = BTreeSet::new();
    for (&id, job) in &core.jobs {
        let planned = job.planning.iter().flat_map(|(_, members)| members);
        for &member in planned.chain(job.run.iter().flat_map(|run| &run.members)) {
            assert!(taken.insert(member), "{member:?} is taken twice");
            assert_eq!(core.compnodes.run_of(member).map(|key| key.job), Some(id), "{member:?}");
        }
    }
}

fn hear(core: &mut Core, connection: u64, message: FromCompNode, now: Duration) -> Vec<Action> {
    let event = CoreEvent::Said { connection: ConnectionId(connection), message, at: now };
    let actions = core.handle(event, now);
    measure_at(core, actions, now)
}

#[test]
fn a_job_goes_on_without_one_end_of_a_link_that_is_cut() {
    let mut core = at_work(3, &["placement.compnodes=3"]);
    let actions = hear(&mut core, 2, lost(KEY, 2), NOW);
    let told = notices(&actions);
    let expected = "CompNode `b` does not reach `c`: did not connect within 45 s; the job begins anew";
    assert!(told.iter().any(|text| text.starts_with(expected)), "{told:?}");
    assert_eq!(placed(&core).unwrap().1, [1, 2], "nobody is left out who does not have to be");
    // The other end says it later, of a placement that has ended.
    assert_eq!(sent(&hear(&mut core, 3, lost(KEY, 1), NOW)), []);
    assert_eq!(placed(&core).unwrap().1, [1, 2]);
    // A cut to the data's owner leaves the other end out.
    let mut core = at_work(3, &["data.owner=b"]);
    let (key, members) = placed(&core).unwrap();
    assert_eq!(members[0], 2);
    hear(&mut core, members[1], lost(key, 0), NOW);
    let (_, rest) = placed(&core).unwrap();
    assert_eq!(rest, [2, members[2]]);
}

#[test]
fn a_search_for_a_plan_goes_by_the_links_that_are_there() {
    // Large enough to be worth more than one CompNode.
    let large = ["model.n_embd=512", "model.n_layer=6", "train.batch=64", "train.micro_batches=8"];
    let mut core = at_work(3, &[&["placement.strategy=op-fence", "train.clip=0"][..], &large].concat());
    let (key, members) = placed(&core).unwrap();
    assert!(members.len() > 1, "{members:?}");
    hear(&mut core, members[0], lost(key, 1), NOW);
    let (key, _) = placed(&core).unwrap();
    assert_eq!(key.generation, Generation(2), "it waits for nothing");
}

/// A set of CompNodes is tried that was put down before another job got one of them.
#[test]
fn a_compnode_that_another_job_got_meanwhile_is_not_taken_for_a_plan_around_a_cut() {
    let mut core = at_work(3, &["placement.compnodes=3"]);
    submit(&mut core, &["placement.compnodes=1"]);
    let said = CoreEvent::Said { connection: ConnectionId(2), message: lost(KEY, 2), at: NOW };
    let mut actions = core.handle(said, NOW);
    let mut plans: Vec<(JobId, u64)> = Vec::new();
    // The second plan of the first job fails, as for lack of memory.
    while let Some(action) = (!actions.is_empty()).then(|| actions.remove(0)) {
        match action {
            Action::Persist { number, .. } => actions.extend(core.handle(CoreEvent::Persisted { number }, NOW)),
            Action::Plan { job, input } => {
                let is_second = job == JobId(1) && plans.iter().filter(|(of, _)| *of == job).count() == 1;
                plans.push((job, input.number));
                let result = if is_second { Err(PlanError::NoCompNodes) } else { input.plan() };
                let planned = CoreEvent::Planned { job, number: input.number, result: Box::new(result) };
                actions.extend(core.handle(planned, NOW));
            }
            _ => {}
        }
        each_works_for_one(&core);
    }
    assert_eq!(plans.len(), 3, "the first job waits for the others for a moment: {plans:?}");
    for second in 1..10 {
        tick(&mut core, NOW + Duration::from_secs(second));
        each_works_for_one(&core);
    }
    let both = [JobId(1), JobId(2)].map(|job| core.jobs[&job].run.as_ref().map(|run| run.members.clone()));
    assert!(both.iter().all(Option::is_some), "{both:?} {plans:?}");
}

/// It must not go on with fewer.
#[test]
fn a_job_that_needs_the_link_waits_until_it_is_there_again() {
    let mut core = at_work(2, &["placement.compnodes=2", "survive.min_compnodes=2"]);
    hear(&mut core, 1, lost(KEY, 1), NOW);
    assert_eq!(placed(&core), None);
    assert_eq!(waits_for(&core), "`a` and `b` do not reach each other, and no plan does without that");
    for second in 1..30 {
        tick(&mut core, NOW + Duration::from_secs(second));
        assert_eq!(placed(&core), None);
    }
    // The link is measured again, and is there.
    (30..33).for_each(|second| drop(tick(&mut core, NOW + Duration::from_secs(second))));
    assert_eq!(placed(&core).unwrap().1, [1, 2]);
}

#[test]
fn a_compnode_that_is_silent_is_not_behind_a_cut_link() {
    let mut core = at_work(2, &[]);
    let later = NOW + Duration::from_secs(20);
    core.compnodes.seen(ConnectionId(1), later);
    hear(&mut core, 1, lost(KEY, 1), later);
    assert!(!core.survey.is_unreachable(ConnectionId(1), ConnectionId(2)));
}

/// Any links are cut, one after another and at once: the job is at work where no link that it uses is cut, or says what it
/// waits for.
#[test]
fn no_history_of_cuts_has_a_job_placed_over_one() {
    use rand::{RngExt, SeedableRng};
    let (mut without, mut waits) = (0, 0);
    for seed in 0..200 {
        let mut dice = rand_chacha::ChaCha8Rng::seed_from_u64(seed);
        let count = dice.random_range(2..6);
        let strategy = ["equal-compute", "equal-number", "op-fence"][dice.random_range(0..3)];
        let mut core = at_work(count, &[&format!("placement.strategy={strategy}")]);
        // A second job waits for those that the first one does without.
        let are_two = dice.random_range(0..2) == 1;
        if are_two {
            submit(&mut core, &["placement.compnodes=1"]);
        }
        for second in 1..8 {
            let Some((key, members)) = placed(&core).filter(|(_, members)| members.len() > 1) else { break };
            let now = NOW + Duration::from_secs(second);
            (1..=count).for_each(|connection| assert!(core.compnodes.seen(ConnectionId(connection), now)));
            let one = dice.random_range(0..members.len());
            let other = (one + dice.random_range(1..members.len())) % members.len();
            hear(&mut core, members[one], lost(key, other as u32), now);
            each_works_for_one(&core);
            let Some((next, rest)) = placed(&core) else {
                let reason = waits_for(&core);
                assert!(are_two || reason.contains("do not reach each other"), "seed {seed}: {reason}");
                waits += 1;
                break;
            };
            assert!(next.generation > key.generation, "seed {seed}");
            let run = core.jobs[&JobId(1)].run.as_ref().unwrap();
            let all: Vec<ConnectionId> = run.members.clone();
            let placement = core.jobs[&JobId(1)].record.work.as_ref().unwrap().placement.placement.clone();
            assert_eq!(core.cut_in(JobId(1), &placement, &all), None, "seed {seed}: {rest:?}");
            without += u32::from(rest.len() < members.len());
            starts(&mut core, next);
        }
    }
    assert!(without > 100, "{without} {waits}");
}
