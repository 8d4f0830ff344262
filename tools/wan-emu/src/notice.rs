//! Lines for the user.

use std::fmt::Display;
use std::io::{self, Write};

/// Writes a line to standard error.
pub fn notice(text: impl Display) {
    // Whoever closed it does not want to know.
    let _ = writeln!(io::stderr(), "wan-emu: {text}");
}
