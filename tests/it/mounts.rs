//! A volume as a block device on a machine without a kernel NBD client: `nbdfuse` shows the export
//! as a file, a loop device makes it a disk. Each part is undone when it is dropped, in whatever
//! state a test leaves it.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::support::{PATIENCE, have, run, until};

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

/// The same, once nobody holds it any more. A process that another test is starting just now has
/// copies of this process's descriptors, also of files in a mount, until it executes its program.
fn undo_when_free(program: &str, args: &[&str]) -> bool {
    let deadline = Instant::now() + PATIENCE;
    while !undo(program, args) {
        if std::thread::panicking() || Instant::now() > deadline {
            return false;
        }
        std::thread::park_timeout(Duration::from_millis(10));
    }
    true
}

/// An export as a file.
pub(crate) struct NbdFile {
    dir: PathBuf,
    child: Child,
}

impl NbdFile {
    pub(crate) fn new(uri: &str, dir: &Path) -> Self {
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

    pub(crate) fn path(&self) -> PathBuf {
        self.dir.join("disk")
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
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

/// A file as a block device.
pub(crate) struct LoopDevice {
    path: String,
    behind: Option<String>,
}

/// The file that a loop device shows, if it shows any.
fn behind(device: &str) -> Option<String> {
    let name = device.trim_start_matches("/dev/");
    std::fs::read_to_string(format!("/sys/block/{name}/loop/backing_file")).ok()
}

impl LoopDevice {
    pub(crate) fn new(file: &Path, options: &[&str]) -> Self {
        let mut command = Command::new("losetup");
        command.args(["--find", "--show"]).args(options).arg(file);
        let path = run(&mut command).trim().to_owned();
        let behind = behind(&path);
        assert!(behind.is_some(), "{path} shows no file");
        Self { path, behind }
    }

    pub(crate) fn path(&self) -> &str {
        &self.path
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        undo("losetup", &["-d", &self.path]);
        // It goes when the last user lets go of it, which unmounting does a moment later. Somebody
        // else may have the device then.
        if !std::thread::panicking() {
            until("the loop device is let go of", || behind(&self.path) != self.behind);
        }
    }
}

/// A volume as a disk.
pub(crate) struct Disk {
    // Before the file, which it lies on.
    device: LoopDevice,
    _file: NbdFile,
}

impl Disk {
    pub(crate) fn new(uri: &str, dir: &Path) -> Self {
        let file = NbdFile::new(uri, dir);
        Self { device: LoopDevice::new(&file.path(), &[]), _file: file }
    }

    pub(crate) fn device(&self) -> &str {
        self.device.path()
    }
}

/// A mounted file system.
pub(crate) struct Mount {
    dir: PathBuf,
}

impl Mount {
    pub(crate) fn new(disk: &Disk, dir: &Path) -> Self {
        Self::of(disk.device(), dir)
    }

    /// What is on a device.
    pub(crate) fn of(device: &str, dir: &Path) -> Self {
        std::fs::create_dir_all(dir).unwrap();
        run(Command::new("mount").arg(device).arg(dir));
        Self { dir: dir.to_owned() }
    }

    /// A file system in memory of `size`, as mount(8) reads it.
    pub(crate) fn tmpfs(dir: &Path, size: &str) -> Self {
        let option = format!("size={size}");
        run(Command::new("mount").args(["-t", "tmpfs", "-o", &option, "tmpfs"]).arg(dir));
        Self { dir: dir.to_owned() }
    }

    pub(crate) fn path(&self) -> &Path {
        &self.dir
    }
}

/// A file system that lets whoever writes to it wait, until this is dropped.
pub(crate) struct Frozen<'a>(&'a Mount);

impl<'a> Frozen<'a> {
    pub(crate) fn new(mount: &'a Mount) -> Self {
        run(Command::new("/usr/sbin/fsfreeze").arg("--freeze").arg(mount.path()));
        Self(mount)
    }
}

impl Drop for Frozen<'_> {
    fn drop(&mut self) {
        undo("/usr/sbin/fsfreeze", &["--unfreeze", self.0.path().to_str().expect("UTF-8")]);
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let dir = self.dir.to_str().expect("UTF-8");
        let unmounted = undo_when_free("umount", &[dir]);
        if !unmounted {
            undo("umount", &["-l", dir]);
        }
        assert!(unmounted || std::thread::panicking(), "{dir} can be unmounted");
    }
}
