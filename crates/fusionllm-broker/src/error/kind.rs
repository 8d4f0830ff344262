//! What kind of fault an error is: the input, a shortage, or something that may pass.

use std::io::ErrorKind;

use fusionllm_transport::{IdentityError, PrivateError, is_of_path, is_shortage};

use super::{BrokerError, CheckpointError, StoreError};

impl BrokerError {
    /// Whether there was no room on a disk.
    pub(crate) fn is_disk_full(&self) -> bool {
        self.has_io(|error| matches!(error.kind(), ErrorKind::StorageFull | ErrorKind::QuotaExceeded))
    }

    /// Whether it may be otherwise at another time, as with files and folders; what a shard holds stays as it is.
    pub(crate) fn may_pass(&self) -> bool {
        !matches!(self, Self::Checkpoint(CheckpointError::Tensor { .. }))
    }

    /// Whether a file or folder was not there.
    pub(crate) fn is_of_nothing(&self) -> bool {
        self.has_io(|error| error.kind() == ErrorKind::NotFound)
    }

    /// Whether the process or the machine had run out of something, which says nothing of any file.
    pub(crate) fn is_shortage(&self) -> bool {
        self.has_io(is_shortage)
    }

    /// Whether it comes from an error of the file system of this kind.
    fn has_io(&self, is_so: impl Fn(&std::io::Error) -> bool) -> bool {
        let mut error: Option<&(dyn std::error::Error + 'static)> = Some(self);
        while let Some(some) = error {
            if some.downcast_ref().is_some_and(&is_so) {
                return true;
            }
            error = some.source();
        }
        false
    }

    /// Whether the request is at fault rather than a machine.
    pub fn is_bad_input(&self) -> bool {
        match self {
            Self::Job(_)
            | Self::Graph { .. }
            | Self::Model { .. }
            | Self::Adapter { .. }
            | Self::ClusterFile { .. }
            | Self::Plan(_)
            | Self::NothingLeft { .. }
            | Self::RunDirNotEmpty { .. }
            | Self::InUse { .. }
            | Self::LostLock { .. }
            | Self::Foreign { .. }
            | Self::NotALock { .. }
            | Self::NoFolder { .. }
            | Self::NotItsOwn { .. }
            | Self::OtherRun { .. }
            | Self::RunDirUnknown { .. }
            | Self::FixedKey { .. }
            | Self::RelativePath { .. }
            | Self::Secret { .. }
            | Self::CheckpointGone { .. }
            | Self::DamagedRun { .. }
            | Self::StateShared { .. }
            | Self::Tickets { .. }
            | Self::Ticket(_)
            | Self::OutOfReach { .. }
            | Self::Private(PrivateError::Readable { .. })
            | Self::UnknownJob { .. }
            | Self::UnknownCompNode { .. }
            | Self::DoesNotSurvive { .. }
            | Self::JobState { .. }
            | Self::NotWritable { .. }
            | Self::LongPath { .. }
            | Self::NotUtf8 { .. }
            | Self::Unreadable { .. }
            | Self::Private(PrivateError::NotRegular { .. } | PrivateError::NotText { .. })
            | Self::Identity(IdentityError::Malformed { .. })
            | Self::Store(
                StoreError::InUse { .. }
                | StoreError::Database { .. }
                | StoreError::Version { .. }
                | StoreError::Entry { .. },
            ) => true,
            Self::Bind(error) => error.is_bad_input(),
            Self::Io { source, .. }
            | Self::Private(PrivateError::Io { source, .. })
            | Self::Identity(IdentityError::File(PrivateError::Io { source, .. }))
            | Self::Store(StoreError::Io { source, .. }) => is_of_path(source),
            Self::Identity(IdentityError::File(_)) => true,
            // What cannot be read of a disk is damaged, too.
            Self::Checkpoint(_) => !self.is_shortage() && !self.is_disk_full(),
            Self::NotDurable { .. }
            | Self::RevokedUnwritten { .. }
            | Self::RevokedByFile { .. }
            | Self::StateFull { .. }
            | Self::NotWritten { .. }
            | Self::Identity(_)
            | Self::Private(_)
            | Self::Protocol(_)
            | Self::GoneOn
            | Self::Ended => false,
        }
    }
}
