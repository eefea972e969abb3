//! Errors of the parts, as answers of the control API: what was tried, why it failed, what to do.

use crate::control::ControlError;
use crate::exit::ExitCode;
use crate::export::ExportError;
use crate::kernel::KernelError;
use crate::kms::ServiceError;
use crate::volume::{VolumeError, VolumeErrorClass};

/// Whether what keeps a volume from being attached may pass by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fault {
    /// As a path that is missing for a second does.
    MayPass,
    /// As another volume's header does not, nor what an operator wants.
    Stays,
}

/// Why a volume is not attached.
pub(super) struct NotAttached {
    pub(super) error: ControlError,
    pub(super) fault: Fault,
}

impl NotAttached {
    pub(super) fn for_good(error: ControlError) -> Self {
        Self { error, fault: Fault::Stays }
    }

    pub(super) fn by_volume(what: &str, error: &VolumeError) -> Self {
        let foreign = error.class() == VolumeErrorClass::NotAVolume
            || matches!(error, VolumeError::Overwritten { .. });
        let fault = if foreign { Fault::Stays } else { Fault::MayPass };
        Self { error: by_volume(what, error), fault }
    }
}

impl From<ControlError> for NotAttached {
    fn from(error: ControlError) -> Self {
        Self { error, fault: Fault::MayPass }
    }
}

/// What a request of the control API ends with.
pub(super) type Answered<T> = Result<T, ControlError>;

#[expect(
    clippy::needless_pass_by_value,
    reason = "texts are given as literals, errors and formats"
)]
pub(super) fn refused(
    exit: ExitCode,
    what: &str,
    why: impl ToString,
    remedy: impl ToString,
) -> ControlError {
    ControlError { exit, what: what.to_owned(), why: why.to_string(), remedy: remedy.to_string() }
}

pub(super) fn by_volume(what: &str, error: &VolumeError) -> ControlError {
    let exit = match error.class() {
        VolumeErrorClass::NotFound
        | VolumeErrorClass::Busy
        | VolumeErrorClass::Changed
        | VolumeErrorClass::WouldOverwrite
        | VolumeErrorClass::NotAVolume => ExitCode::WrongState,
        VolumeErrorClass::Request => ExitCode::Usage,
        VolumeErrorClass::Damaged
        | VolumeErrorClass::TooSmall
        | VolumeErrorClass::NoSpace
        | VolumeErrorClass::ReadOnly
        | VolumeErrorClass::WrongKey
        | VolumeErrorClass::Descriptors
        | VolumeErrorClass::Io => ExitCode::Failed,
    };
    refused(exit, what, error, error.remedy())
}

pub(super) fn by_service(what: &str, error: &ServiceError) -> ControlError {
    match error {
        ServiceError::Kms(kms) => refused(kms.verdict.into(), what, kms, &kms.remedy),
        ServiceError::Memory(memory) => {
            refused(ExitCode::Failed, what, memory, "Raise LimitMEMLOCK for byokd.")
        }
    }
}

pub(super) fn by_export(what: &str, error: &ExportError) -> ControlError {
    refused(ExitCode::Failed, what, error, "See the daemon's log.")
}

pub(super) fn by_kernel(what: &str, error: &KernelError) -> ControlError {
    refused(error.exit, what, error, &error.remedy)
}

pub(super) fn by_panic(what: &str, error: impl ToString) -> ControlError {
    refused(ExitCode::Failed, what, error, "Report this as a bug.")
}
