//! How the tensors of a checkpoint are named: one spelling for those who write shards and those who read them.

use std::fmt;

use fusionllm_planner::{GroupId, Way};
use serde::{Deserialize, Serialize};

const OPTIMIZER: &str = "optimizer.";
const RESIDUAL: &str = "residual.";

/// What an optimizer keeps of a parameter, a tensor of its shape.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StateKind {
    /// AdamW's running mean of gradients.
    ExpAvg,
    /// AdamW's running mean of squared gradients.
    ExpAvgSq,
    /// SGD's running sum of gradients.
    Momentum,
}

impl StateKind {
    /// All there are.
    pub const ALL: [Self; 3] = [Self::ExpAvg, Self::ExpAvgSq, Self::Momentum];

    /// Its name, as PyTorch's optimizers have it.
    pub fn name(self) -> &'static str {
        match self {
            Self::ExpAvg => "exp_avg",
            Self::ExpAvgSq => "exp_avg_sq",
            Self::Momentum => "momentum",
        }
    }
}

/// The name of a tensor in a shard: its [`Display`](fmt::Display) form.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TensorName<'a> {
    /// A parameter, under its Hugging Face name.
    Param(&'a str),
    /// What the optimizer keeps of a parameter: `optimizer.KIND.PARAMETER`.
    State {
        /// What the optimizer keeps there.
        kind: StateKind,
        /// Of which parameter.
        param: &'a str,
    },
    /// What error feedback holds back along an edge: `residual.gradient.PRODUCER>CONSUMER`, and `#GROUP` in all groups but
    /// the first.
    Residual {
        /// The group whose edge it is.
        group: GroupId,
        /// Of what goes this way.
        way: Way,
        /// The op whose output flows along the edge.
        producer: &'a str,
        /// The first op of the stage that consumes it.
        consumer: &'a str,
    },
    /// What error feedback holds back of a shared parameter's gradient: `residual.tied.PARAMETER@OP`, as checkpoints have
    /// named it from the beginning, and `#GROUP` in all groups but the first.
    SharedResidual {
        /// The group of the op.
        group: GroupId,
        /// Name of the parameter.
        param: &'a str,
        /// The first op of the sender that uses it.
        op: &'a str,
    },
}

impl TensorName<'_> {
    /// Whether a tensor of this name is what error feedback holds back.
    pub fn is_residual(name: &str) -> bool {
        name.starts_with(RESIDUAL)
    }
}

impl fmt::Display for TensorName<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Param(name) => f.write_str(name),
            Self::State { kind, param } => write!(f, "{OPTIMIZER}{}.{param}", kind.name()),
            Self::Residual { group, way, producer, consumer } => {
                let way = match way {
                    Way::Activation => "activation",
                    Way::Gradient => "gradient",
                };
                write!(f, "{RESIDUAL}{way}.{producer}>{consumer}")?;
                of_group(f, *group)
            }
            Self::SharedResidual { group, param, op } => {
                write!(f, "{RESIDUAL}tied.{param}@{op}")?;
                of_group(f, *group)
            }
        }
    }
}

fn of_group(f: &mut fmt::Formatter<'_>, group: GroupId) -> fmt::Result {
    if group == GroupId::FIRST { Ok(()) } else { write!(f, "#{}", group.0) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_those_of_the_files() {
        let state = TensorName::State { kind: StateKind::ExpAvgSq, param: "transformer.wte.weight" };
        assert_eq!(state.to_string(), "optimizer.exp_avg_sq.transformer.wte.weight");
        let residual = TensorName::Residual {
            group: GroupId::FIRST,
            way: Way::Gradient,
            producer: "h.0.add_2",
            consumer: "h.1.ln_1",
        };
        assert_eq!(residual.to_string(), "residual.gradient.h.0.add_2>h.1.ln_1");
        let of_group = |group| TensorName::SharedResidual { group, param: "transformer.wte.weight", op: "lm_head" };
        let shared = of_group(GroupId::FIRST);
        assert_eq!(shared.to_string(), "residual.tied.transformer.wte.weight@lm_head");
        assert_eq!(of_group(GroupId(1)).to_string(), "residual.tied.transformer.wte.weight@lm_head#1");
        assert!(TensorName::is_residual(&shared.to_string()) && !TensorName::is_residual(&state.to_string()));
        assert_eq!(TensorName::Param("transformer.wte.weight").to_string(), "transformer.wte.weight");
    }
}
