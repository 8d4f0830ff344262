//! The protocol's version.

/// Both ends of a connection must speak the same version; it grows whenever a message changes its form.
pub const PROTOCOL_VERSION: u32 = 6;
