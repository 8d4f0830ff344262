//! Tickets: where a command finds one, and how one is handed over.

use std::io::{IsTerminal, Read};
use std::path::Path;

use anyhow::Context;
use fusionllm_transport::{FileMode, PrivateError, Ticket, read_private, write_new_whole};

use crate::environment;
use crate::exit::{bad_input, refused};

/// No ticket is nearly as long.
const MOST_BYTES: u64 = 64 << 10;

/// A ticket out of a command's arguments, its file, standard input (`-`) or the environment; nothing if none is given.
pub(crate) fn given_ticket(argument: Option<&str>, file: Option<&Path>) -> anyhow::Result<Option<Ticket>> {
    match (argument, file) {
        (Some("-"), _) => {
            let mut text = String::new();
            std::io::stdin().lock().take(MOST_BYTES).read_to_string(&mut text).context("standard input")?;
            parse(&text).map(Some)
        }
        (Some(text), _) => {
            let ticket = parse(text)?;
            tracing::warn!(
                "everybody on this machine can see a ticket on the command line: give it by --ticket-file FILE, on \
                 standard input with `-`, or in FUSIONLLM_TICKET"
            );
            Ok(Some(ticket))
        }
        (None, Some(path)) => {
            let text = read_private(path).map_err(|error| match error {
                PrivateError::NotRegular { .. } => bad_input(format!(
                    "{error}: what another command writes is read from standard input, where `-` is given as the ticket"
                )),
                error => refused(error),
            });
            let text = text?.ok_or_else(|| bad_input(format!("there is no ticket file {}", path.display())))?;
            parse(&text).map(Some)
        }
        (None, None) => environment::ticket()?.map(|text| parse(&text)).transpose(),
    }
}

/// The ticket in a broker's state folder by which commands on its machine operate it.
pub(crate) fn local_ticket(state_dir: &Path) -> anyhow::Result<Ticket> {
    let path = state_dir.join("operate.ticket");
    if let Some(text) = read_private(&path).map_err(refused)? {
        return parse(&text);
    }
    let old = state_dir.join("ticket");
    let (path, old_path) = (path.display(), old.display());
    Err(bad_input(if old.exists() {
        format!(
            "{old_path} is a ticket of an earlier release: start its broker again with this one, which makes {path}"
        )
    } else if state_dir.join("tickets.json").exists() {
        format!(
            "{path} is gone, as after `ticket revoke operate`: the next start of the broker makes a new one; or give \
             --ticket-file FILE"
        )
    } else {
        format!("no broker's ticket at {path}; start one on this machine, or give --ticket-file FILE")
    }))
}

fn parse(text: &str) -> anyhow::Result<Ticket> {
    text.trim().parse().map_err(refused)
}

/// Whether a ticket may be printed: where somebody asked for it, or to a terminal, which keeps nothing.
pub(crate) fn may_print(asked: bool) -> bool {
    asked || std::io::stdout().is_terminal()
}

/// Writes a ticket to a new file that is its owner's alone.
pub(crate) fn write_ticket(path: &Path, ticket: &str) -> anyhow::Result<()> {
    let text = format!("{ticket}\n");
    write_new_whole(path, text.as_bytes(), FileMode::Private).with_context(|| path.display().to_string())
}
