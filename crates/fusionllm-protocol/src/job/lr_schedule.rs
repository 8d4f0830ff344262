//! How the learning rate moves after the warm-up.

use serde::{Deserialize, Serialize};

/// Learning rate after warm-up, by the names that `transformers` has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LrSchedule {
    /// Half a cosine from `lr` down to `lr * min_lr_ratio` at the last step.
    #[default]
    Cosine,
    /// A straight line from `lr` down to `lr * min_lr_ratio` at the last step.
    Linear,
    /// `lr` times the square root of warm-up steps over steps; without a warm-up, as after one of 10,000 steps.
    #[serde(rename = "inverse_sqrt")]
    InverseSqrt,
    /// `lr` after the warm-up, to the end.
    Constant,
}

impl LrSchedule {
    /// Every schedule with its name in job files.
    pub const ALL: [(&'static str, Self); 4] = [
        ("cosine", Self::Cosine),
        ("linear", Self::Linear),
        ("inverse_sqrt", Self::InverseSqrt),
        ("constant", Self::Constant),
    ];
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stored_jobs_and_job_files_name_a_schedule_alike() {
        for (name, schedule) in LrSchedule::ALL {
            assert_eq!(serde_json::to_value(schedule).unwrap(), name);
        }
    }
}
