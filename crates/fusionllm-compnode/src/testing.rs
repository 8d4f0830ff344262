//! What several unit tests need.

#[path = "../../../tests/histories.rs"]
mod histories;
pub(crate) use histories::{all_hold, each_is_one, histories, in_virtual_time};
