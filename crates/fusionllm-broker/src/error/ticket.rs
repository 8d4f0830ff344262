//! What can be wrong with a ticket.

/// Why a ticket admits nobody, or cannot be made or revoked.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum TicketError {
    /// No ticket has this secret.
    #[error("the ticket is not valid for this broker")]
    NotValid,
    /// It was revoked.
    #[error("the ticket `{name}` was revoked")]
    Revoked {
        /// Name of the ticket.
        name: String,
    },
    /// Somebody who gives commands shows a ticket for CompNodes.
    #[error(
        "the ticket `{name}` lets CompNodes join and nothing else; a command needs one that `fusionllm ticket new --role operate` \
         makes"
    )]
    ForCompNodes {
        /// Name of the ticket.
        name: String,
    },
    /// A CompNode shows a ticket for commands.
    #[error(
        "the ticket `{name}` is for commands; a CompNode joins by one that `fusionllm ticket new --role join` makes"
    )]
    ForCommands {
        /// Name of the ticket.
        name: String,
    },
    /// It admits one, and has.
    #[error("the ticket `{name}` was for one use, and has been used")]
    Used {
        /// Name of the ticket.
        name: String,
    },
    /// Its time is over.
    #[error("the ticket `{name}` has expired")]
    Expired {
        /// Name of the ticket.
        name: String,
    },
    /// A ticket cannot have such a name.
    #[error("a ticket's name has 1 to 100 letters, digits, spaces or punctuation, no `/`, and no `.` or `-` in front")]
    Name,
    /// The broker itself has a ticket of that name.
    #[error("`{name}` is the name of the ticket in the broker's state folder, give another --name")]
    Reserved {
        /// The name that was asked for.
        name: String,
    },
    /// There is one already.
    #[error("there is a ticket `{name}` already; give another --name, or revoke it first")]
    Exists {
        /// The name that was asked for.
        name: String,
    },
    /// There are as many as a broker keeps.
    #[error("there are {most} valid tickets already: revoke some")]
    TooMany {
        /// How many a broker keeps.
        most: usize,
    },
    /// There is none of that name.
    #[error("there is no ticket `{name}`, `fusionllm ticket list` shows all")]
    Unknown {
        /// The name that was asked for.
        name: String,
    },
}
