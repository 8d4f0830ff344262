//! From graph and profile to placement, task orders and predicted cost
