//! `fusionllm ticket new`, `list` and `revoke`

use std::path::{Path, PathBuf};

use anyhow::bail;
use fusionllm_protocol::{ClientRequest, TicketRole, TicketState, TicketSummary, ToClient};
use fusionllm_transport::{shell_path, shell_word};

use crate::cli::{self, TicketCommand};
use crate::client::Client;
use crate::exit::bad_input;
use crate::{outputs, render, secrets};

/// A hundred years: what is longer was not meant.
const LONGEST_S: u64 = 100 * 31_557_600;

pub(super) async fn run(args: cli::Ticket) -> anyhow::Result<()> {
    match args.command {
        TicketCommand::New(args) => new(args).await,
        TicketCommand::List(args) => list(args).await,
        TicketCommand::Revoke(args) => revoke(args).await,
    }
}

async fn new(args: cli::NewTicket) -> anyhow::Result<()> {
    if let Some(out) = &args.out {
        if out.symlink_metadata().is_ok() {
            return Err(bad_input(format!("{} exists already, give another --out", out.display())));
        }
        outputs::check_folder_of("--out", out)?;
    }
    let role = match args.role {
        cli::RoleName::Join => TicketRole::Join,
        cli::RoleName::Operate => TicketRole::Operate,
    };
    let valid_s = args.expires.as_deref().map(seconds).transpose()?;
    let mut client = Client::connect(&args.broker).await?;
    let request = ClientRequest::TicketNew { role, name: args.name.clone(), valid_s, once: args.once };
    let (name, ticket) = match client.request(&request).await? {
        ToClient::Ticket { name, ticket } => (name, ticket),
        _ => bail!("the broker answered something else"),
    };
    let path = match (&args.out, args.json) {
        (Some(out), _) => Some(out.clone()),
        // The document is the copy.
        (None, true) => None,
        (None, false) => Some(PathBuf::from(format!("{name}.ticket"))),
    };
    if let Some(Err(error)) = path.as_deref().map(|path| secrets::write_ticket(path, &ticket)) {
        // A ticket that nobody got is no use to anybody.
        client.request(&ClientRequest::TicketRevoke { name }).await?;
        return Err(error);
    }
    client.close().await;
    if args.json {
        let document = serde_json::json!({ "name": name, "role": role, "ticket": ticket, "file": path });
        return render::json(&document, true);
    }
    handed_over(&args, &name, role, path.as_deref(), &ticket)
}

fn handed_over(
    args: &cli::NewTicket,
    name: &str,
    role: TicketRole,
    path: Option<&Path>,
    ticket: &str,
) -> anyhow::Result<()> {
    let use_by = args.expires.as_deref().map_or_else(String::new, |e| format!(", to be used within {e}"));
    let once = if args.once { ", once" } else { "" };
    let file = path.unwrap_or(Path::new(""));
    render::line(&format!("ticket `{name}` ({role}{once}{use_by}) is in {}, readable by you alone", file.display()))?;
    if secrets::may_print(args.show_ticket) {
        render::line(&format!("\n    {ticket}\n"))?;
    }
    let path = shell_path(file);
    let command = match role {
        TicketRole::Join => format!("fusionllm join --ticket-file {path}"),
        TicketRole::Operate => format!("fusionllm status --ticket-file {path}"),
    };
    render::line(&format!("on the machine it is for: {command}"))?;
    let (name, typed) = (shell_word(name), args.broker.typed());
    render::line(&format!("`fusionllm ticket revoke {name}{typed}` makes it worthless"))
}

async fn list(args: cli::TicketList) -> anyhow::Result<()> {
    let mut client = Client::connect(&args.broker).await?;
    let answer = client.request(&ClientRequest::TicketList).await?;
    client.close().await;
    match answer {
        ToClient::Tickets(tickets) if args.json => render::json(&tickets, true),
        ToClient::Tickets(tickets) => render::line(&table(&tickets)),
        _ => bail!("the broker answered something else"),
    }
}

async fn revoke(args: cli::RevokeTicket) -> anyhow::Result<()> {
    let mut client = Client::connect(&args.broker).await?;
    let answer = client.request(&ClientRequest::TicketRevoke { name: args.name.clone() }).await?;
    client.close().await;
    match answer {
        ToClient::TicketRevoked { closed } => {
            let (name, s) = (&args.name, if closed == 1 { "" } else { "s" });
            render::line(&format!("ticket `{name}` is worthless now, {closed} connection{s} by it closed"))
        }
        _ => bail!("the broker answered something else"),
    }
}

/// A duration such as `7d` or `12h 30m`.
fn seconds(text: &str) -> anyhow::Result<u64> {
    match humantime::parse_duration(text) {
        Ok(duration) if (1..=LONGEST_S).contains(&duration.as_secs()) => Ok(duration.as_secs()),
        _ => Err(bad_input(format!(
            "--expires is {text:?}, expected a duration such as `7d`, `12h` or `30m`, of a second to 100 years; without it \
             the ticket lets in until it is revoked"
        ))),
    }
}

fn table(tickets: &[TicketSummary]) -> String {
    let mut text = format!("{:<24} {:<8} {:<10} {:<16} {:>11}", "ticket", "role", "state", "ends in", "connections");
    for ticket in tickets {
        let state = match ticket.state {
            TicketState::Valid if ticket.once => "unused",
            TicketState::Valid => "valid",
            TicketState::Used => "used",
            TicketState::Expired => "expired",
            TicketState::Revoked => "revoked",
        };
        let ends = match (ticket.state, ticket.valid_s) {
            (TicketState::Valid | TicketState::Used, Some(seconds)) => coarse(seconds),
            _ => "-".to_owned(),
        };
        let (name, role, open) = (&ticket.name, ticket.role.to_string(), ticket.connections);
        text.push_str(&format!("\n{name:<24} {role:<8} {state:<10} {ends:<16} {open:>11}"));
    }
    text
}

/// A duration in its largest unit.
fn coarse(seconds: u64) -> String {
    let units = [(86_400, "d"), (3600, "h"), (60, "min"), (1, "s")];
    let fits = units.iter().find(|(length, _)| seconds >= *length);
    fits.map_or_else(|| "now".to_owned(), |(length, unit)| format!("{} {unit}", seconds / length))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_read_and_shown() {
        assert_eq!(seconds("7d").unwrap(), 7 * 86_400);
        assert_eq!(seconds("1h 30m").unwrap(), 5400);
        for wrong in ["", "7", "soon", "0s", "-1h", "101y", "99999999999999d", "99999999999999999999y"] {
            assert!(seconds(wrong).unwrap_err().to_string().contains("`7d`"), "{wrong:?}");
        }
        assert_eq!([coarse(7 * 86_400 - 5), coarse(59), coarse(0)], ["6 d", "59 s", "now"]);
    }
}
