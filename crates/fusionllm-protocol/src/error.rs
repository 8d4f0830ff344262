//! What can be wrong with a job and with a message.

/// Why a job file cannot be used. The text names the key, what is wrong, and what would be right.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum JobError {
    /// The file is not TOML.
    #[error("not valid TOML: {reason}")]
    Syntax {
        /// The parser's message, with line and column.
        reason: String,
    },
    /// A key that no section has.
    #[error("unknown key `{key}`{}", .nearest.as_ref().map(|n| format!(", did you mean `{n}`?")).unwrap_or_default())]
    UnknownKey {
        /// The key with its section.
        key: String,
        /// The nearest key there is.
        nearest: Option<String>,
    },
    /// A key's value is of the wrong type or out of range.
    #[error("`{key}`: {reason}")]
    Value {
        /// The key with its section.
        key: String,
        /// What is wrong and what would be right.
        reason: String,
    },
    /// An override is not of the form `section.key=value`.
    #[error("override `{given}` is not of the form section.key=value")]
    Override {
        /// The override as it was given.
        given: String,
    },
}

/// Why a message from a peer cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ProtocolError {
    /// A message could not be written.
    #[error("message cannot be encoded: {reason}")]
    Encode {
        /// The serializer's message.
        reason: String,
    },
    /// The bytes are not such a message.
    #[error("malformed {message}: {reason}")]
    Decode {
        /// Type of the message expected.
        message: &'static str,
        /// The parser's message, or what does not fit.
        reason: String,
    },
    /// The other end speaks another version.
    #[error("{peer} speaks protocol version {got}, this fusionllm speaks {expected}: use the same release on both")]
    Version {
        /// The other end, as in `the broker`.
        peer: &'static str,
        /// Protocol version of this program.
        expected: u32,
        /// Protocol version of the other end.
        got: u32,
    },
    /// The peer confirms a message that was never sent.
    #[error("peer acknowledges message {acknowledged}, but only {sent} were sent")]
    Acknowledged {
        /// Number of the message that it acknowledges.
        acknowledged: u64,
        /// How many messages were sent.
        sent: u64,
    },
    /// The peer receives messages and confirms none.
    #[error("{unconfirmed} messages were sent that the other end has not confirmed, and no more are kept for it")]
    Unconfirmed {
        /// How many are kept.
        unconfirmed: usize,
    },
    /// A stream skipped a message.
    #[error("message {got} came where {expected} was due")]
    Gap {
        /// The number that was due.
        expected: u64,
        /// The number that came.
        got: u64,
    },
    /// The manifest of a checkpoint cannot be used.
    #[error("checkpoint manifest: {reason}")]
    Manifest {
        /// What is wrong and what would be right.
        reason: String,
    },
}
