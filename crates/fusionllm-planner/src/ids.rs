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
    /// A stage, counted along the pipeline.
    StageId,
    "stage"
);
index_type!(
    /// An edge between two stages.
    EdgeId,
    "edge"
);
index_type!(
    /// A CompNode, by its place in the placement's list.
    NodeIndex,
    "CompNode"
);
