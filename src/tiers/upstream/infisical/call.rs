//! The purpose of a request.

/// The purpose of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Call {
    Login,
    Folders,
    Snapshot,
    Everything,
    Read,
    Write,
    Delete,
}

impl Call {
    pub(super) fn as_str(self) -> &'static str {
        match self {
            Self::Login => "login",
            Self::Folders => "folders",
            Self::Snapshot => "snapshot",
            Self::Everything => "everything",
            Self::Read => "read",
            Self::Write => "write",
            Self::Delete => "delete",
        }
    }

    /// Infisical limits the rate of each kind of route separately.
    pub(super) fn route(self) -> usize {
        match self {
            Self::Login => 0,
            Self::Folders => 1,
            Self::Snapshot | Self::Everything | Self::Read => 2,
            Self::Write | Self::Delete => 3,
        }
    }

    pub(super) fn reads_a_folder(self) -> bool {
        matches!(self, Self::Snapshot | Self::Read)
    }

    pub(super) fn is_long(self) -> bool {
        self == Self::Everything
    }

    pub(super) fn writes(self) -> bool {
        matches!(self, Self::Write | Self::Delete)
    }
}
