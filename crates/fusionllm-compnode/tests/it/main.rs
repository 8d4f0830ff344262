//! Whole training runs of CompNodes inside one process.

mod golden;
mod memory;
mod parity;
mod run;
