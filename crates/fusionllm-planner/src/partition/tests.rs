//! Tests of partitioning.
