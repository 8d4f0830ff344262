//! The model as a DAG of operators
