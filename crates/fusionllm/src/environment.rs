//! What environment variables say. One that is set but cannot be meant is an error, as a wrong flag is.

use tracing_subscriber::EnvFilter;

use crate::exit::bad_input;

/// Names the log levels.
const LOG: &str = "FUSIONLLM_LOG";
/// Holds a ticket.
const TICKET: &str = "FUSIONLLM_TICKET";
/// The levels, from quiet to noisy.
const LEVELS: [&str; 6] = ["off", "error", "warn", "info", "debug", "trace"];

/// The ticket in the environment, if there is one.
///
/// # Errors
/// The variable is set and blank: the command that was to fill it has failed.
pub(crate) fn ticket() -> anyhow::Result<Option<String>> {
    match text(TICKET)? {
        Some(ticket) if ticket.trim().is_empty() => {
            Err(bad_input(format!("{TICKET} is set but empty, expected a broker's ticket; or unset it")))
        }
        other => Ok(other),
    }
}

/// The log filter: that of the environment, else `default`.
///
/// # Errors
/// The variable is no filter. A word that is neither a level nor one of our crates is refused too: it would
/// silence everything else.
pub(crate) fn log_filter(default: &str) -> anyhow::Result<EnvFilter> {
    let Some(given) = text(LOG)?.filter(|given| !given.trim().is_empty()) else {
        return Ok(EnvFilter::new(default));
    };
    let refuse = |wrong: &str| {
        let levels = LEVELS.join(", ");
        bad_input(format!(
            "{LOG} is `{given}`: `{wrong}` is no log filter, expected one of {levels}, or a list such as \
             warn,fusionllm_broker=debug"
        ))
    };
    for directive in given.split(',').map(str::trim) {
        let is_word = !directive.contains(['=', '[', ':']);
        let is_level = LEVELS.contains(&directive.to_lowercase().as_str());
        if is_word && !is_level && !directive.starts_with("fusionllm") {
            return Err(refuse(directive));
        }
    }
    EnvFilter::builder().parse(&given).map_err(|_| refuse(&given))
}

/// The variable's value, if it is set.
fn text(name: &str) -> anyhow::Result<Option<String>> {
    match std::env::var(name) {
        Ok(text) => Ok(Some(text)),
        Err(std::env::VarError::NotPresent) => Ok(None),
        Err(std::env::VarError::NotUnicode(_)) => Err(bad_input(format!("{name} is not UTF-8 text"))),
    }
}
