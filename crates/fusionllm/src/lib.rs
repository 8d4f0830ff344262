//! Library facade and the one binary
