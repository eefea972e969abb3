//! Every exit code of both programs, and what it means.

use serde::{Deserialize, Serialize};

/// How a program ended; scripts may rely on the numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ExitCode {
    /// 0: done.
    Ok,
    /// 1: failed for a reason that has no number of its own.
    Failed,
    /// 2: the command line or a configuration file is wrong.
    Usage,
    /// 3: KMS denied the use of the key.
    KeyDenied,
    /// 4: KMS gave no verdict: unreachable, throttled, or our credentials are at fault.
    KmsUnavailable,
    /// 5: no such thing, or it is in a state that does not allow this.
    WrongState,
    /// 6: what was compared does not agree: an audit trail that was changed, or that has what
    /// CloudTrail lacks, or the other way round.
    Discrepancy,
}

impl ExitCode {
    /// The number the process exits with.
    #[must_use]
    pub fn code(self) -> u8 {
        match self {
            Self::Ok => 0,
            Self::Failed => 1,
            Self::Usage => 2,
            Self::KeyDenied => 3,
            Self::KmsUnavailable => 4,
            Self::WrongState => 5,
            Self::Discrepancy => 6,
        }
    }
}

impl From<ExitCode> for std::process::ExitCode {
    fn from(code: ExitCode) -> Self {
        Self::from(code.code())
    }
}
