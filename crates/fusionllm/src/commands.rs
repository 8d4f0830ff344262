//! One file a command.

mod broker;
mod drain;
mod export;
mod follow;
mod generate;
mod inventory;
mod job_file;
mod join;
mod model;
mod plan;
mod reading;
mod status;
mod submit;
mod ticket;
mod train;

use crate::cli::{Cli, Command};

/// Runs the command that was typed.
pub(crate) async fn run(cli: Cli) -> anyhow::Result<()> {
    match cli.command {
        Command::Train(args) => train::run(args).await,
        Command::Broker(args) => broker::run(args).await,
        Command::Join(args) => join::run(args).await,
        Command::Submit(args) => submit::submit(args).await,
        Command::Status(args) => status::run(args).await,
        Command::Inventory(args) => inventory::run(args).await,
        Command::Ticket(args) => ticket::run(args).await,
        Command::Stop(args) => submit::stop(args).await,
        Command::Drain(args) => drain::run(args).await,
        Command::Resume(args) => submit::resume(args).await,
        Command::Plan(args) => plan::run(&args),
        Command::Export(args) => export::run(&args),
        Command::Generate(args) => generate::run(&args),
    }
}
