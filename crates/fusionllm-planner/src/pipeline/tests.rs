//! Tests of task orders.
