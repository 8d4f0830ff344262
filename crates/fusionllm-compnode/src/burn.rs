//! All that knows Burn: kernels, tapes, gradients, the optimizer, and what measures them.

pub(crate) mod executor;
mod gradients;
mod host;
mod kernels;
pub(crate) mod measure;
pub(crate) mod optimizer;
mod owed;
mod segment;

pub use executor::BurnExecutor;
pub use optimizer::OptimizerSpec;
