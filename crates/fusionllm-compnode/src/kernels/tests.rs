//! Conformance of kernels.
