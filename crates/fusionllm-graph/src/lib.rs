//! The model as a DAG of operators (the OP-DAG).
//!
//! This crate knows which ops exist, what shapes they take and give, which parameters they carry, what they cost,
//! and how they are joined. It must not know tensors, files, networks or machines: kernels live with the CompNode,
//! placements with the planner, and the JSON form goes to and from `&str`.
//!
//! Shape legend used throughout: B batch, S sequence, D model width, H heads, V vocabulary.
//!
//! ```
//! use fusionllm_graph::{Gpt2Config, OpDag, gpt2};
//!
//! let config = Gpt2Config::named("gpt2").ok_or("no such model")?;
//! let dag = gpt2(&config, 64)?;
//! assert_eq!(dag.param_elements(), 124_439_808);
//! assert_eq!(OpDag::from_json(&dag.to_json())?, dag);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod builder;
mod cost;
mod dag;
mod dtype;
mod error;
mod json;
mod kind;
mod lora;
mod models;
mod op;
mod ops;
mod param;
mod plain;
mod print;
#[cfg(test)]
mod properties;
mod rotary;
mod rule;
mod shape;
mod validate;

pub use builder::{DagBuilder, MAX_ELEMENTS, MAX_NAME_BYTES, MAX_OPS};
pub use cost::{Cost, Kernels};
pub use dag::{Op, OpDag, OpId, ParamId};
pub use dtype::DType;
pub use error::{GraphError, Misfit};
pub use json::{JSON_FORMAT, JSON_VERSION};
pub use kind::{ActivationFunction, OpClass, ParamRole, WeightLayout};
pub use lora::{Adapter, Lora};
pub use models::{
    DecoderConfig, DecoderFamily, Gpt2Config, HuggingFaceModel, MAX_LAYERS, Model, ResnetBlock, ResnetConfig,
    ResnetStem, decoder, gpt2, resnet,
};
pub use op::OpKind;
pub use param::{Init, Param};
pub use plain::{BYTE_ORDER_MARK, in_plain_words, read_json, read_value, without_byte_order_mark};
pub use rotary::RotaryScaling;
pub use shape::{Dim, Shape, TensorType};
