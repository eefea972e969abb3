//! stub
use std::path::Path;
/// x
pub struct DevKms(String);
/// x
#[derive(Debug, thiserror::Error)]
#[error("x")]
pub struct DevKmsError;
impl DevKms {
    /// x
    pub fn endpoint(&self) -> &str {
        &self.0
    }
}
/// x
pub async fn start(_d: &Path, _r: &str) -> Result<DevKms, DevKmsError> {
    Ok(DevKms(String::new()))
}
