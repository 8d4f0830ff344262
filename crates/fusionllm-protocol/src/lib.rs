//! What two processes must agree on: ids, the job, control messages, the OP-Data header, the checkpoint
//! manifest, and the state machine of a resumable stream.
//!
//! Sans-IO: no sockets, files, clocks or tensors. Shells feed it messages and time, and do what it answers.

mod control;
mod data;
mod error;
mod event;
pub mod hugging_face;
mod ids;
mod inventory;
mod job;
mod job_view;
mod manifest;
mod op_data;
mod peer;
mod recovery;
mod snapshot;
mod step_rules;
mod tensor_header;
mod tensor_name;
mod text;
mod trace;
mod version;
mod window;
mod wire;

pub use control::{
    Assignment, BlobHeader, BlobKind, ClientRequest, CompNodeSummary, ControlStream, FromBroker, FromCompNode, Hello,
    JobSummary, LinkSpeed, MOST_UNCONFIRMED, Numbered, Role, Standing, StatusReport, StepReport, TicketRole,
    TicketState, TicketSummary, ToClient, WeightSource, Welcome, placement_hash,
};
pub use data::{ContentHasher, DataFingerprint, DataReport, FileFingerprint, TokenizerFingerprint, content_hash};
pub use error::{JobError, ProtocolError};
pub use event::{CodecNote, JobEvent, JobState, LinkBytes, Notice, StepMetrics};
pub use ids::{Generation, JobId, RunId, RunKey};
pub use inventory::{CpuShare, DeviceProfile, Inventory, LinkReport, MachineReport, PairProfile};
pub use job::{
    Cadence, CheckpointSpec, CompressionPolicy, CompressionSpec, DataFormat, DataSpec, JobSpec, LoraSpec, LrSchedule,
    Measuring, ModelSpec, OptimizerKind, PlacementSection, Precision, PrivateSeed, RowKind, SampleOrder, SizedFamily,
    SurviveSpec, TopKBackward, TrainSpec, ValueFormat, WeightsChoice, job_keys, lora_scaling,
};
pub use job_view::{CompressionView, JobView, OwnerView, TrainView};
pub use manifest::{CarriedFile, Manifest, ShardEntry};
pub use op_data::{Channel, OpDataHeader, Pass, PeerFrame};
pub use peer::PeerRecord;
pub use recovery::{Fault, Recovery, Standstill, cause};
pub use snapshot::{LoanFrame, Snapshot, SnapshotId, SnapshotSource};
pub use step_rules::{LearningRates, StepRules};
pub use tensor_header::{MAX_HEADER_BYTES, TensorHeader, TensorHeaderError};
pub use tensor_name::{StateKind, TensorName};
pub use text::{clean, clean_lines, clean_to, is_deceptive, is_plain_name};
pub use trace::{StepTrace, TracedMessage, TracedTask, measured_step};
pub use version::{Greeting, PROTOCOL_VERSION};
pub use window::{ReceiveWindow, Received, SendWindow};
pub use wire::{decode, decode_clean, encode, encoded_len};
