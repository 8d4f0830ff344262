//! The folder through which weights and checkpoint shards pass, as files without a name.

use std::io::ErrorKind;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

use fusionllm_graph::OpDag;
use fusionllm_planner::{NodeIndex, Placement};
use fusionllm_protocol::TrainView;
use fusionllm_transport::is_shortage;

use crate::checkpoint::{ShardFile, free_room};
use crate::{CompNodeError, ShardError};

/// What a folder must take so that it is worth joining: no shard of a model is smaller than a few pages.
const LEAST_BYTES: usize = 64 << 10;

/// Whether files can be made and filled there.
///
/// # Errors
/// [`CompNodeError::Scratch`] with what the system says.
pub(super) fn check_usable(folder: &Path) -> Result<(), CompNodeError> {
    let filled = ShardFile::empty(folder).and_then(|mut file| file.append(&vec![0; LEAST_BYTES]));
    filled.map_err(|source| match &source {
        // Another folder would be no better.
        ShardError::Io { source: error, .. } if is_shortage(error) || error.kind() == ErrorKind::FileTooLarge => {
            source.into()
        }
        _ => CompNodeError::Scratch { source },
    })
}

/// Whether there is room for a shard of this CompNode's part: without it no checkpoint would ever be whole. `arrived` are
/// bytes of weights that lie there, and leave before the first shard comes.
///
/// # Errors
/// [`CompNodeError::Scratch`], or [`CompNodeError::ScratchRoom`] with the numbers.
pub(super) fn check_scratch_room(folder: &Path, needed: u64, arrived: &AtomicU64) -> Result<(), CompNodeError> {
    check_usable(folder)?;
    // What arrives between the two counts twice, which is little; the other way round it would not count at all.
    let room = free_room(folder).map(|free| free.saturating_add(arrived.load(Ordering::Relaxed)));
    match room.filter(|&room| needed > room) {
        Some(room) => Err(CompNodeError::ScratchRoom { path: folder.to_owned(), needed, room }),
        None => Ok(()),
    }
}

/// Whether a checkpoint fits where all CompNodes of a run, and the run itself, use one disk. A shard lies there twice until
/// the checkpoint has it. What each CompNode looks at by itself says nothing of the others.
///
/// # Errors
/// [`CompNodeError::RunRoom`] with the numbers.
pub fn check_run_room(
    folder: &Path,
    dag: &OpDag,
    placement: &Placement,
    train: &TrainView,
) -> Result<(), CompNodeError> {
    let nodes = (0..).map(NodeIndex).take(placement.compnodes.len());
    let bytes = nodes.fold(0u64, |sum, node| sum.saturating_add(shard_bytes(dag, placement, node, train)));
    match free_room(folder).filter(|&room| bytes.saturating_mul(2) > room) {
        Some(room) => Err(CompNodeError::RunRoom { path: folder.to_owned(), bytes, room }),
        None => Ok(()),
    }
}

/// Bytes of a shard: the parameters of a part, and what the optimizer keeps of them.
pub(super) fn shard_bytes(dag: &OpDag, placement: &Placement, node: NodeIndex, train: &TrainView) -> u64 {
    train.state_bytes(placement.param_bytes_of(dag, node), placement.trained_bytes_of(dag, node))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_that_cannot_hold_a_shard_is_named_with_the_way_out() {
        let folder = tempfile::tempdir().unwrap();
        check_scratch_room(folder.path(), 1 << 10, &AtomicU64::new(0)).unwrap();
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
        let place = folder.path().display().to_string();
        #[cfg(unix)]
        {
            let error = check_scratch_room(folder.path(), u64::MAX, &AtomicU64::new(0)).unwrap_err().to_string();
            assert!(error.contains(&place) && error.contains("there is room for"), "{error}");
        }
        drop(folder);
        let error = check_usable(Path::new(&place)).unwrap_err();
        assert!(error.to_string().contains(&place) && error.to_string().contains("--state DIR"), "{error}");
    }

    /// They are imported and gone when the first shard is written.
    #[cfg(unix)]
    #[test]
    fn weights_that_have_arrived_take_no_room_from_a_shard() {
        let folder = tempfile::tempdir().unwrap();
        let (weights, needed) = (1 << 50, free_room(folder.path()).unwrap() + (1 << 49));
        check_scratch_room(folder.path(), needed, &AtomicU64::new(0)).unwrap_err();
        check_scratch_room(folder.path(), needed, &AtomicU64::new(weights)).unwrap();
    }
}
