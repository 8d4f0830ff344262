//! Runs a sub-DAG: kernels, RAD, task loop, optimizer, data, checkpoint shards
