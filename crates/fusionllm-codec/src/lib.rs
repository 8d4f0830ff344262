//! A boundary tensor as bytes and back
