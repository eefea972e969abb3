//! A volume as a block device on a machine without a kernel NBD client: `nbdfuse` shows the export
//! as a file, a loop device makes it a disk. Each part is undone when it is dropped, in whatever
//! state a test leaves it.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use crate::support::{have, run, until};

/// Whether this machine can mount file systems over NBD.
pub(crate) fn can_mount(tools: &[&str]) -> bool {
    let needed = ["nbdfuse", "fusermount3", "losetup", "mount", "umount"];
    if !have(&needed) || !have(tools) {
        return false;
    }
    let root = nix::unistd::geteuid().is_root();
    let devices = ["/dev/fuse", "/dev/loop-control"].iter().all(|path| Path::new(path).exists());
    assert!(std::env::var_os("CI").is_none() || (root && devices), "mounting needs root and FUSE");
    if !(root && devices) {
        println!("skipped: mounting needs root, /dev/fuse and /dev/loop-control");
    }
    root && devices
}

/// Does what can be done; a test that fails has said why already.
fn undo(program: &str, args: &[&str]) -> bool {
    let mut command = Command::new(program);
    command.args(args).stdout(Stdio::null()).stderr(Stdio::null());
    command.status().is_ok_and(|status| status.success())
}

/// An export as a file.
struct NbdFile {
    dir: PathBuf,
    child: Child,
}

impl NbdFile {
    fn new(uri: &str, dir: &Path) -> Self {
        std::fs::create_dir_all(dir).unwrap();
        let child = Command::new("nbdfuse")
            .arg(dir.join("disk"))
            .arg(uri)
            .stdin(Stdio::null())
            .stderr(std::fs::File::create(dir.with_extension("log")).unwrap())
            .spawn()
            .unwrap();
        let file = Self { dir: dir.to_owned(), child };
        until("nbdfuse shows the export", || file.path().exists());
        file
    }

    fn path(&self) -> PathBuf {
        self.dir.join("disk")
    }
}

impl Drop for NbdFile {
    fn drop(&mut self) {
        let dir = self.dir.to_str().expect("UTF-8");
        if !undo("fusermount3", &["-u", dir]) {
            undo("umount", &["-l", dir]);
            // It may have ended already.
            let _killed = self.child.kill();
        }
        let _ended = self.child.wait();
    }
}

/// A volume as a disk.
pub(crate) struct Disk {
    device: String,
    _file: NbdFile,
}

impl Disk {
    pub(crate) fn new(uri: &str, dir: &Path) -> Self {
        let file = NbdFile::new(uri, dir);
        let found = run(Command::new("losetup").args(["--find", "--show"]).arg(file.path()));
        Self { device: found.trim().to_owned(), _file: file }
    }

    pub(crate) fn device(&self) -> &str {
        &self.device
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        undo("losetup", &["-d", &self.device]);
        // It goes when the last user lets go of it, which unmounting does a moment later.
        let backing = format!("/sys/block/{}/loop", self.device.trim_start_matches("/dev/"));
        if !std::thread::panicking() {
            until("the loop device is let go of", || !Path::new(&backing).exists());
        }
    }
}

/// A mounted file system.
pub(crate) struct Mount {
    dir: PathBuf,
}

impl Mount {
    pub(crate) fn new(disk: &Disk, dir: &Path) -> Self {
        std::fs::create_dir_all(dir).unwrap();
        run(Command::new("mount").arg(disk.device()).arg(dir));
        Self { dir: dir.to_owned() }
    }

    pub(crate) fn path(&self) -> &Path {
        &self.dir
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let dir = self.dir.to_str().expect("UTF-8");
        let unmounted = undo("umount", &[dir]);
        if !unmounted {
            undo("umount", &["-l", dir]);
        }
        assert!(unmounted || std::thread::panicking(), "{dir} can be unmounted");
    }
}
