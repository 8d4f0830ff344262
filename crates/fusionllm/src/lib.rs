//! FusionLLM trains one large model on geo-distributed, mismatched GPUs.
//!
//! This is the facade: each room under its own name. The binary `fusionllm` is made of the same parts.
//!
//! What would a step of GPT-2 take on two sites of two machines, and who would hold what?
//!
//! ```
//! use std::path::Path;
//!
//! use fusionllm::broker::read_cluster;
//! use fusionllm::graph::{Gpt2Config, gpt2};
//! use fusionllm::planner::plan;
//! use fusionllm::protocol::JobSpec;
//!
//! let job = r#"
//!     [model]
//!     name = "gpt2"
//!     [data]
//!     path = "text"
//!     [train]
//!     batch = 8
//! "#;
//! let job = JobSpec::from_toml(job, &[])?;
//! let dag = gpt2(&Gpt2Config::named("gpt2").ok_or("no such model")?, job.data.seq_len)?;
//! # let file = concat!(env!("CARGO_MANIFEST_DIR"), "/../../examples/clusters/slow-links.toml");
//! # let read_cluster = |_: &Path| read_cluster(Path::new(file));
//! let (_, cluster) = read_cluster(Path::new("examples/clusters/slow-links.toml"))?;
//! let plan = plan(&dag, &cluster, &job.plan_spec())?;
//! for compnode in &plan.prediction.compnodes {
//!     println!("{} holds {} ops in {}", compnode.name, compnode.ops, compnode.memory());
//! }
//! println!("{:.1} s a step; it waits for {}", plan.prediction.step_s, plan.prediction.critical_path[0]);
//! # assert_eq!(plan.prediction.compnodes[0].name, "berlin-0");
//! # assert!(plan.prediction.step_s > 0.0);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! One step of training on this machine's CPU, without broker and network:
//!
//! ```
//! use std::sync::Arc;
//!
//! use fusionllm::codec::{HostTensor, Values};
//! use fusionllm::compnode::{
//!     DeviceChoice, ExecutorSpec, FirstParams, MicroBatch, OptimizerSpec, StopFlag, UpdateSpec, open_device,
//! };
//! use fusionllm::graph::{Gpt2Config, gpt2};
//! use fusionllm::planner::{Cluster, NodeIndex, StageId, place};
//! use fusionllm::protocol::{JobSpec, Pass};
//!
//! let config = Gpt2Config { n_layer: 1, n_embd: 16, n_head: 2, vocab_size: 256, ..Gpt2Config::named("gpt2").unwrap() };
//! let dag = Arc::new(gpt2(&config, 8)?);
//! let job = JobSpec::from_toml("[model]\nname = \"gpt2\"\n[data]\npath = \"text\"", &[])?;
//! let placement = place(&dag, &Cluster::uniform(1), &job.placement_spec())?;
//!
//! let node = NodeIndex::DATA_OWNER;
//! let spec = ExecutorSpec::of_placement(
//!     Arc::clone(&dag), &placement, node, OptimizerSpec::of(&job.train.view()), job.train.seed, FirstParams::Drawn,
//! );
//! let mut executor = open_device(DeviceChoice::Cpu)?.build(spec, StopFlag::default())?;
//!
//! // Token ids and labels of one sequence: `[B, S] = [1, 8]`.
//! let ids = |first: i32| HostTensor::new(vec![1, 8], Values::I32((first..first + 8).collect()));
//! let mut losses = Vec::new();
//! for step in 0..5 {
//!     let at = MicroBatch { step, pass: Pass::Train, index: 0 };
//!     let (input, label) = (dag.input().unwrap(), dag.label().unwrap());
//!     let inputs = vec![(input, ids(97)?.into()), (label, ids(98)?.into())];
//!     losses.extend(executor.forward(StageId(0), at, inputs)?.loss);
//!     executor.backward(StageId(0), at, Vec::new(), 1.0)?;
//!     executor.update(UpdateSpec { step, lr: 1e-2, gradient_scale: 1.0 })?;
//! }
//! assert!(losses[4] < losses[0], "{losses:?}");
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

pub use fusionllm_broker as broker;
pub use fusionllm_codec as codec;
pub use fusionllm_compnode as compnode;
pub use fusionllm_graph as graph;
pub use fusionllm_planner as planner;
pub use fusionllm_protocol as protocol;
pub use fusionllm_transport as transport;
