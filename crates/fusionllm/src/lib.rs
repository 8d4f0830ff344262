//! FusionLLM trains one large model on geo-distributed, mismatched GPUs.
//!
//! This is the facade: each room under its own name. The binary `fusionllm` is made of the same parts.

pub use fusionllm_broker as broker;
pub use fusionllm_codec as codec;
pub use fusionllm_compnode as compnode;
pub use fusionllm_graph as graph;
pub use fusionllm_planner as planner;
pub use fusionllm_protocol as protocol;
pub use fusionllm_transport as transport;
