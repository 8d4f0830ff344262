//! Newtypes for what a placement numbers.

use std::fmt;

use serde::{Deserialize, Serialize};

macro_rules! index_type {
    ($(#[$doc:meta])* $name:ident, $word:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        pub struct $name(pub u32);

        impl $name {
            /// As an index into the placement's table.
            pub fn index(self) -> usize {
                self.0 as usize
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!($word, " {}"), self.0)
            }
        }
    };
}

index_type!(
    /// A stage, counted along the pipeline, those of a group after those of the group before.
    StageId,
    "stage"
);
index_type!(
    /// A group: one whole pipeline with its share of the micro-batches.
    GroupId,
    "group"
);
index_type!(
    /// An edge between two stages.
    EdgeId,
    "edge"
);
index_type!(
    /// Parameters that the same CompNodes hold, as one vector.
    SharedId,
    "shared parameter"
);
index_type!(
    /// A CompNode, by its place in the placement's list.
    NodeIndex,
    "CompNode"
);

impl GroupId {
    /// The first group, which is the only one where there are no others.
    pub const FIRST: Self = Self(0);
}

impl Default for GroupId {
    fn default() -> Self {
        Self::FIRST
    }
}

impl NodeIndex {
    /// The CompNode that has the data: every placement lists it first.
    pub const DATA_OWNER: Self = Self(0);
}

/// What goes along an edge.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Way {
    /// The output of its op, from the stage that makes it.
    Activation,
    /// Its gradient, back to that stage.
    Gradient,
}

impl Way {
    /// Both ways.
    pub const ALL: [Self; 2] = [Self::Activation, Self::Gradient];
}

/// One value for each way of an edge.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Ways<T> {
    /// For the activation.
    pub activation: T,
    /// For the gradient.
    pub gradient: T,
}

impl<T> Ways<T> {
    /// The values that `f` gives, asked for the activation first.
    pub fn from_fn(mut f: impl FnMut(Way) -> T) -> Self {
        Self { activation: f(Way::Activation), gradient: f(Way::Gradient) }
    }

    /// What `f` makes of each value.
    pub fn map<U>(self, mut f: impl FnMut(T) -> U) -> Ways<U> {
        Ways { activation: f(self.activation), gradient: f(self.gradient) }
    }
}

impl<T> std::ops::Index<Way> for Ways<T> {
    type Output = T;

    fn index(&self, way: Way) -> &T {
        match way {
            Way::Activation => &self.activation,
            Way::Gradient => &self.gradient,
        }
    }
}

/// Who sends a message, and who gets it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Route {
    /// The CompNode that sends.
    pub from: NodeIndex,
    /// The CompNode that receives.
    pub to: NodeIndex,
}

impl Route {
    /// Whether it crosses from one CompNode to another.
    pub fn crosses(self) -> bool {
        self.from != self.to
    }
}
