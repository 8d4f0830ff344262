//! The `fusionllm` binary.
fn main() {}
