//! Bytes between authenticated peers
