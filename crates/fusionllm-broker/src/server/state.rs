//! The state folder: whether it and what is secret in it are their owner's alone.

use std::path::Path;
use std::time::{Duration, Instant};

use fusionllm_protocol::TicketRole;
use fusionllm_transport::{PrivateError, check_private};

use super::gate::{ticket_path, tickets_path};
#[cfg(unix)]
use crate::files::io_error;
use crate::store::Store;
use crate::{BrokerError, StoreError};

/// Files of ours besides those of tickets; the last two are of earlier releases.
const FILES: [&str; 4] = ["key", "broker.redb", "secret", "ticket"];
/// A broker that was killed lets go of its store within this time.
const LETTING_GO: Duration = Duration::from_secs(2);
/// Between two tries to open it.
const BETWEEN_TRIES: Duration = Duration::from_millis(50);
/// What CompNodes on the machine keep there.
const PROFILES: &str = "profile-";

/// Whether the state folder and all in it that is secret are their owner's alone.
///
/// # Errors
/// [`BrokerError::StateShared`] if the folder is open to others and not ours alone, [`BrokerError::Private`] if something
/// of ours is open to others.
pub(super) fn check(state_dir: &Path) -> Result<(), BrokerError> {
    if let Err(error) = check_private(state_dir) {
        // To shut others out of what is theirs is no advice.
        return Err(match (&error, other_in(state_dir)) {
            (PrivateError::Readable { .. }, Some(other)) => {
                BrokerError::StateShared { path: state_dir.to_owned(), other }
            }
            _ => error.into(),
        });
    }
    let tickets = [TicketRole::Join, TicketRole::Operate].map(|role| ticket_path(state_dir, role));
    let files = FILES.map(|name| state_dir.join(name));
    for path in files.iter().chain(&tickets).chain([&tickets_path(state_dir)]) {
        check_private(path)?;
    }
    Ok(())
}

/// Something in the folder that is not of ours.
fn other_in(state_dir: &Path) -> Option<String> {
    let entries = std::fs::read_dir(state_dir).into_iter().flatten().flatten();
    let names = entries.map(|entry| entry.file_name().to_string_lossy().into_owned());
    let is_ours = |name: &String| {
        let begins = |with: &str| name.starts_with(with);
        FILES.contains(&name.as_str()) || begins("tickets.json") || begins(PROFILES) || name.contains(".ticket")
    };
    names.filter(|name| !is_ours(name)).min()
}

/// Opens the store. One that was killed a moment ago may still be about to let go of it.
pub(super) async fn open_store_soon(path: &Path) -> Result<Store, BrokerError> {
    let began = Instant::now();
    loop {
        match open_store(path) {
            Err(BrokerError::Store(StoreError::InUse { .. })) if began.elapsed() < LETTING_GO => {
                tokio::time::sleep(BETWEEN_TRIES).await;
            }
            result => return result,
        }
    }
}

/// Opens the store; a new one is its owner's alone.
fn open_store(path: &Path) -> Result<Store, BrokerError> {
    #[cfg(unix)]
    let is_new = !path.exists();
    let store = Store::open(path)?;
    #[cfg(unix)]
    if is_new {
        // Until here the folder, which is the owner's alone, has kept others out.
        let mode = std::os::unix::fs::PermissionsExt::from_mode(0o600);
        std::fs::set_permissions(path, mode).map_err(|e| io_error(path, e))?;
    }
    Ok(store)
}

#[cfg(all(test, unix))]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn nobody_is_told_to_shut_others_out_of_a_folder_that_is_not_ours() {
        let folder = tempfile::tempdir().unwrap();
        let open = || std::fs::set_permissions(folder.path(), PermissionsExt::from_mode(0o755)).unwrap();
        open();
        for name in ["key", "join.ticket", "tickets.json", "profile-cpu.json", "broker.redb"] {
            std::fs::write(folder.path().join(name), "").unwrap();
        }
        let error = check(folder.path()).unwrap_err();
        assert!(error.is_bad_input() && error.to_string().contains("chmod 700"), "{error}");
        std::fs::write(folder.path().join("thesis.tex"), "").unwrap();
        let error = check(folder.path()).unwrap_err();
        assert!(error.is_bad_input());
        let error = error.to_string();
        assert!(!error.contains("chmod") && error.contains("`thesis.tex`"), "{error}");
        assert!(error.contains(&folder.path().join("fusionllm").display().to_string()), "{error}");
    }
}
