//! How long a run may stand still.

use std::time::Duration;

use fusionllm_graph::OpDag;
use fusionllm_protocol::JobSpec;

/// Nothing goes on for this long: the job fails.
const STALL: Duration = Duration::from_secs(60);
/// Or for so many of its slowest steps.
const STALL_STEPS: u32 = 20;
/// The first step of a placement also compiles and tunes kernels, and fills what later ones find filled.
const FIRST_STEP: Duration = Duration::from_secs(300);
/// Reading data, or sending the last shards, may take this long.
const READING: Duration = Duration::from_secs(600);
/// Parameters take no longer than at this speed.
const LEAST_BYTES_PER_S: u64 = 100_000;
/// No step is taken for longer than this, whatever a CompNode says.
const LONGEST_STEP_S: f64 = 86_400.0;

/// When something last went on in a run, and what its waits are measured by.
#[derive(Debug)]
pub(super) struct Watchdog {
    /// When something last went on.
    pub(super) moved: Duration,
    /// Seconds of the slowest step so far, and before there is one of a predicted one.
    slowest_s: f64,
    has_stepped: bool,
    /// Seconds of all steps so far, and how many they are.
    sum_s: f64,
    count: u32,
    /// Bytes of parameters, and of what the optimizer keeps of them.
    state_bytes: u64,
    /// Batches of an evaluation.
    eval_batches: u64,
}

impl Watchdog {
    /// Of a run that begins now and whose steps were predicted to take `predicted_s` seconds.
    pub(super) fn new(dag: &OpDag, spec: &JobSpec, predicted_s: f64, now: Duration) -> Self {
        Self {
            moved: now,
            slowest_s: sane(predicted_s),
            has_stepped: false,
            sum_s: 0.0,
            count: 0,
            state_bytes: spec.train.state_bytes(dag.param_bytes(), dag.trained_bytes()),
            eval_batches: spec.train.eval_batches.into(),
        }
    }

    /// A step is done, which took so long.
    pub(super) fn stepped(&mut self, step_s: f64) {
        self.slowest_s = if self.has_stepped { self.slowest_s.max(sane(step_s)) } else { sane(step_s) };
        self.has_stepped = true;
        self.sum_s += sane(step_s);
        self.count = self.count.saturating_add(1);
    }

    /// How long so many steps take, by the mean of those so far.
    pub(super) fn time_of(&self, steps: u64) -> Duration {
        let mean_s = if self.count > 0 { self.sum_s / f64::from(self.count) } else { self.slowest_s };
        let step = Duration::from_secs_f64(mean_s);
        step.saturating_mul(u32::try_from(steps).unwrap_or(u32::MAX))
    }

    /// How long until all are ready. The data owner comes first and has its data to read, the others only their
    /// parameters to make.
    pub(super) fn until_ready(&self, owner_is_ready: bool) -> Duration {
        self.transfer() + if owner_is_ready { STALL } else { READING }
    }

    /// How long until the next step.
    pub(super) fn until_step(&self) -> Duration {
        let step = Duration::from_secs_f64(self.slowest_s);
        let evaluation = step.saturating_mul(u32::try_from(self.eval_batches).unwrap_or(u32::MAX));
        let least = if self.has_stepped { STALL } else { FIRST_STEP };
        least.max(step.saturating_mul(STALL_STEPS)).saturating_add(evaluation)
    }

    /// How long until all is over after the last step.
    pub(super) fn until_end(&self) -> Duration {
        READING + self.transfer()
    }

    fn transfer(&self) -> Duration {
        Duration::from_secs(self.state_bytes / LEAST_BYTES_PER_S)
    }
}

/// Seconds as a CompNode or a prediction gives them, as a time that can be reckoned with.
fn sane(seconds: f64) -> f64 {
    if seconds.is_nan() { 0.0 } else { seconds.clamp(0.0, LONGEST_STEP_S) }
}
