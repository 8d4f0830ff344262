//! Which faults there are, when they come, and whom they hit: all from a seed.

use std::time::{Duration, Instant};

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rand_distr::{Distribution, Exp};
use serde::Serialize;

use crate::scene::Scene;

/// What may happen. A drain will be one more of these.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Kind {
    /// A CompNode is killed, and started again later.
    Kill,
    /// A CompNode stands still for two seconds.
    Pause,
    /// A CompNode stands still for so long that it counts as lost.
    LongPause,
    /// A new CompNode joins.
    Join,
    /// One that had joined meanwhile is killed, for good.
    Leave,
    /// The broker is killed, and started again later.
    Broker,
}

/// By kind: its name on the command line, and how often it comes.
const KINDS: [(Kind, &str, u32); 6] = [
    (Kind::Kill, "kill", 5),
    (Kind::Pause, "pause", 2),
    (Kind::LongPause, "long-pause", 1),
    (Kind::Join, "join", 1),
    (Kind::Leave, "leave", 1),
    (Kind::Broker, "broker", 2),
];

impl Kind {
    pub(crate) fn name(self) -> &'static str {
        KINDS.iter().find(|(kind, ..)| *kind == self).map_or("", |(_, name, _)| name)
    }
}

/// Most CompNodes that join meanwhile.
const MOST_SPARES: usize = 2;
const PAUSE_S: f64 = 2.0;
const LONG_PAUSE_S: std::ops::Range<f64> = 8.0..15.0;
/// Until a process is started again, on the average, and at the most.
const RESTART_S: (f64, f64) = (2.0, 8.0);

/// A fault that came.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Came {
    /// Seconds after the job had begun.
    pub(crate) at_s: f64,
    pub(crate) kind: Kind,
    pub(crate) who: String,
    /// For how long its victim was gone or stood still.
    pub(crate) for_s: f64,
    /// Steps that had been done.
    pub(crate) step: u64,
    /// Seconds until a step was done that had not been done before; nothing if none was left.
    pub(crate) back_s: Option<f64>,
}

/// What makes a fault good again.
enum Heal {
    Restart(String),
    Continue(String),
    Broker,
}

/// The faults of one run.
pub(crate) struct Faults {
    dice: ChaCha8Rng,
    gap: Exp<f64>,
    only: Vec<Kind>,
    next: Instant,
    heals: Vec<(Instant, Heal)>,
    spares: usize,
}

impl Faults {
    /// From now on, so many seconds apart on the average, of these kinds or of all.
    pub(crate) fn new(seed: u64, mean_s: f64, only: &[String]) -> Self {
        let only: Vec<Kind> = match only {
            [] => KINDS.map(|(kind, ..)| kind).to_vec(),
            names => names.iter().map(|name| kind_of(name)).collect(),
        };
        let gap = Exp::new(1.0 / mean_s).unwrap();
        let mut faults = Self {
            dice: ChaCha8Rng::seed_from_u64(seed),
            gap,
            only,
            next: Instant::now(),
            heals: Vec::new(),
            spares: 0,
        };
        let gap = faults.draw_gap();
        faults.next += gap;
        faults
    }

    fn draw_gap(&mut self) -> Duration {
        Duration::from_secs_f64(self.gap.sample(&mut self.dice))
    }

    /// Heals what is due, and lets happen what is due. Gives that: kind, victim, and for how long.
    pub(crate) fn act(&mut self, scene: &mut Scene) -> Option<(Kind, String, f64)> {
        self.heal(scene, |at| at <= Instant::now());
        if self.next > Instant::now() {
            return None;
        }
        let gap = self.draw_gap();
        self.next = Instant::now() + gap;
        // All is drawn in any case, so that a seed gives the same dice whatever is possible at the moment.
        let total: u32 = KINDS.iter().filter(|(kind, ..)| self.only.contains(kind)).map(|(.., weight)| weight).sum();
        let mut roll = self.dice.random_range(0..total);
        let victim: f64 = self.dice.random();
        let restart_s = Exp::new(1.0 / RESTART_S.0).unwrap().sample(&mut self.dice).min(RESTART_S.1) + 0.1;
        let long_s = self.dice.random_range(LONG_PAUSE_S);
        let kind = KINDS.iter().filter(|(kind, ..)| self.only.contains(kind)).find_map(|(kind, _, weight)| {
            let is_it = roll < *weight;
            roll = roll.saturating_sub(*weight);
            is_it.then_some(*kind)
        });
        self.happen(scene, kind?, victim, restart_s, long_s)
    }

    fn happen(
        &mut self,
        scene: &mut Scene,
        kind: Kind,
        victim: f64,
        restart_s: f64,
        long_s: f64,
    ) -> Option<(Kind, String, f64)> {
        let only_spares = kind == Kind::Leave;
        let is_there = |node: &&crate::scene::Node| {
            node.process.as_ref().is_some_and(|process| !process.is_stopped) && (node.is_spare || !only_spares)
        };
        let there: Vec<String> = scene.nodes.iter().filter(is_there).map(|node| node.name.clone()).collect();
        let victim = there.get((victim * there.len() as f64) as usize).cloned();
        let now = Instant::now();
        let after = |seconds: f64| now + Duration::from_secs_f64(seconds);
        match kind {
            Kind::Kill => {
                let name = victim?;
                scene.node(&name)?.process.take()?.kill();
                self.heals.push((after(restart_s), Heal::Restart(name.clone())));
                Some((kind, name, restart_s))
            }
            Kind::Pause | Kind::LongPause => {
                let name = victim?;
                let seconds = if kind == Kind::Pause { PAUSE_S } else { long_s };
                let process = scene.node(&name)?.process.as_mut()?;
                process.signal("STOP");
                process.is_stopped = true;
                self.heals.push((after(seconds), Heal::Continue(name.clone())));
                Some((kind, name, seconds))
            }
            Kind::Join => {
                if scene.nodes.iter().filter(|node| node.is_spare && node.process.is_some()).count() >= MOST_SPARES {
                    return None;
                }
                self.spares += 1;
                let name = format!("spare{}", self.spares);
                scene.join(&name, true);
                Some((kind, name, 0.0))
            }
            Kind::Leave => {
                let name = victim?;
                scene.node(&name)?.process.take()?.kill();
                Some((kind, name, 0.0))
            }
            Kind::Broker => {
                scene.broker.take()?.kill();
                self.heals.push((after(restart_s), Heal::Broker));
                Some((kind, "broker".to_owned(), restart_s))
            }
        }
    }

    fn heal(&mut self, scene: &mut Scene, is_due: impl Fn(Instant) -> bool) {
        let (due, later) = std::mem::take(&mut self.heals).into_iter().partition(|(at, _)| is_due(*at));
        self.heals = later;
        for (_, heal) in due {
            match heal {
                Heal::Restart(name) => {
                    let is_spare = scene.node(&name).is_some_and(|node| node.is_spare);
                    scene.join(&name, is_spare);
                }
                Heal::Continue(name) => {
                    let Some(process) = scene.node(&name).and_then(|node| node.process.as_mut()) else { continue };
                    process.signal("CONT");
                    process.is_stopped = false;
                }
                Heal::Broker => scene.start_broker(),
            }
        }
    }

    /// Makes all good again, and lets nothing happen any more.
    pub(crate) fn end(mut self, scene: &mut Scene) {
        self.heal(scene, |_| true);
    }
}

fn kind_of(name: &str) -> Kind {
    let found = KINDS.iter().find(|(_, known, _)| *known == name);
    found.unwrap_or_else(|| panic!("--only: there is no fault {name:?}")).0
}
