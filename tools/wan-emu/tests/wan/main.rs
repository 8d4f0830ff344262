//! Networks on this machine. Needs root and /dev/net/tun; where these are missing, each test says so and does nothing.

mod life;
mod links;
mod support;
