//! What is on a device, and a purge of it, on a kernel without an NBD client: a loop device stands
//! for it, and mount namespaces for containers. Needs root.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use tempfile::TempDir;

use uuid::Uuid;

use super::holders::{holders, users};
use super::mounts::mounts;
use super::purge::{damaged, purge};
use super::records::{Record, Records};
use super::server::carry_out;
use super::sysfs::stack;
use super::{Ask, HeldBy, KernelErrorClass, PurgeStep, Told};

/// Whether this machine has what it takes.
fn can(tools: &[&str]) -> bool {
    let missing: Vec<_> = ["losetup", "mount", "umount", "unshare"]
        .iter()
        .chain(tools)
        .filter(|tool| !run("sh", &["-c", &format!("command -v {tool}")]))
        .collect();
    let root = nix::unistd::geteuid().is_root() && Path::new("/dev/loop-control").exists();
    let able = root && missing.is_empty();
    assert!(able || std::env::var_os("CI").is_none(), "needs root, loop devices, {missing:?}");
    if !able {
        println!("skipped: needs root, /dev/loop-control, {missing:?}");
    }
    able
}

fn run(program: &str, args: &[&str]) -> bool {
    let mut command = Command::new(program);
    command.args(args).stdin(Stdio::null()).stdout(Stdio::null());
    command.status().is_ok_and(|status| status.success())
}

/// No file system needs more; what is not written takes no memory.
const SIZE: u64 = 320 << 20;

/// A loop device with a file system, and a directory for mount points. Undone when it is dropped.
struct Disk {
    name: String,
    dir: TempDir,
}

impl Disk {
    fn new(mkfs: &[&str]) -> Self {
        let dir = tempfile::tempdir_in("/dev/shm").unwrap();
        let image = dir.path().join("image");
        File::create(&image).unwrap().set_len(SIZE).unwrap();
        let image = image.to_str().unwrap();
        if let Some((program, args)) = mkfs.split_first() {
            assert!(run(program, &[args, &[image]].concat()), "{mkfs:?}");
        }
        let made = Command::new("losetup").args(["--find", "--show", image]).output().unwrap();
        let path = String::from_utf8(made.stdout).unwrap();
        Self { name: path.trim().strip_prefix("/dev/").unwrap().to_owned(), dir }
    }

    fn ext4() -> Self {
        Self::new(&["mkfs.ext4", "-q"])
    }

    fn path(&self) -> String {
        format!("/dev/{}", self.name)
    }

    fn place(&self, name: &str) -> PathBuf {
        let place = self.dir.path().join(name);
        std::fs::create_dir_all(&place).unwrap();
        place
    }

    fn mount(&self, name: &str) -> PathBuf {
        let place = self.place(name);
        assert!(run("mount", &[&self.path(), place.to_str().unwrap()]));
        place
    }

    fn purge(&self, step: PurgeStep) -> (Vec<String>, Vec<String>) {
        let Told::Purged { what, failed } = purge(&self.name, step) else {
            panic!("not what a purge says")
        };
        (what, failed)
    }

    fn uses(&self, process: &Process) -> bool {
        users(&self.name).iter().any(|user| u32::try_from(user.pid) == Ok(process.0.id()))
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let below = self.dir.path().to_str().unwrap().to_owned();
        let table = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
        let points = table.lines().filter_map(|line| line.split(' ').nth(4));
        for point in
            points.filter(|point| point.starts_with(&below)).collect::<Vec<_>>().iter().rev()
        {
            run("umount", &["-l", point]);
        }
        run("losetup", &["--detach", &self.path()]);
    }
}

/// A shell that has carried out a script and stays. Ended when it is dropped.
struct Process(Child);

impl Process {
    fn start(through: &[&str], script: &str) -> Self {
        let script = format!("{script}\necho ready; read line");
        let all = [through, &["bash", "-e", "-c", &script]].concat();
        let (program, args) = all.split_first().unwrap();
        let mut command = Command::new(program);
        command.args(args).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let mut said = [0; 6];
        std::io::Read::read_exact(child.stdout.as_mut().unwrap(), &mut said).unwrap();
        assert_eq!(&said, b"ready\n");
        Self(child)
    }

    /// As in a container: in a mount namespace of its own.
    fn apart(script: &str) -> Self {
        Self::start(&["unshare", "--mount", "--propagation", "private"], script)
    }

    fn lives(&mut self) -> bool {
        self.0.try_wait().unwrap().is_none()
    }

    fn pid(&self) -> String {
        self.0.id().to_string()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // It may have ended already.
        let _killed = self.0.kill();
        let _ended = self.0.wait();
    }
}

#[test]
fn a_process_at_the_same_path_of_another_file_system_is_no_user() {
    if !can(&["mkfs.ext4"]) {
        return;
    }
    let (ours, theirs) = (Disk::ext4(), Disk::ext4());
    // As five brokers that each have their data at one path.
    let data = ours.place("data");
    let pod = |disk: &Disk, use_it: &str| {
        let (from, to) = (disk.path(), data.display());
        Process::apart(&format!("mount {from} {to}\n{use_it}"))
    };
    let (file, inside) =
        (format!("exec 7>{}/file", data.display()), format!("cd {}", data.display()));
    let users = [pod(&ours, &file), pod(&ours, &inside)];
    let mut others = [pod(&theirs, &file), pod(&theirs, &inside)];
    for user in &users {
        assert!(ours.uses(user));
        assert!(!theirs.uses(user));
    }
    for other in &others {
        assert!(!ours.uses(other), "it is killed for what another has");
    }
    let (what, failed) = ours.purge(PurgeStep::EndProcesses);
    assert!(failed.is_empty(), "{failed:?}");
    assert_eq!(what.len(), users.len(), "{what:?}");
    for mut user in users {
        user.0.wait().unwrap();
    }
    assert!(others.iter_mut().all(Process::lives));
}

#[test]
fn a_volume_that_is_the_root_of_a_container_makes_nobody_else_a_user() {
    if !can(&["mkfs.ext4", "pivot_root"]) {
        return;
    }
    let disk = Disk::ext4();
    let at = disk.place("root").display().to_string();
    let container = Process::apart(&format!(
        "mount {} {at}; cd {at}; mkdir -p old; pivot_root . old; cd /; exec 7>/file",
        disk.path()
    ));
    let table = std::fs::read_to_string(format!("/proc/{}/mountinfo", container.pid())).unwrap();
    assert!(table.lines().any(|line| line.split(' ').nth(4) == Some("/")), "{table}");
    let users: Vec<_> = users(&disk.name).iter().map(|user| user.pid.to_string()).collect();
    assert_eq!(users, [container.pid()]);
}

#[test]
fn users_are_found_after_their_file_system_is_shut_down() {
    for mkfs in [["mkfs.ext4", "-q"], ["mkfs.xfs", "-q"]] {
        if !can(&[mkfs[0]]) {
            return;
        }
        let disk = Disk::new(&mkfs);
        let data = disk.mount("data");
        std::fs::write(data.join("file"), "secret").unwrap();
        let path = data.display();
        let users = [format!("exec 7<{path}/file"), format!("cd {path}")];
        let users = users.map(|script| Process::start(&[], &script));
        let (what, failed) = disk.purge(PurgeStep::ShutDown);
        assert!((what.len(), failed.len()) == (1, 0), "{what:?} {failed:?}");
        assert!(users.iter().all(|user| disk.uses(user)), "{mkfs:?}");
    }
}

#[test]
fn what_is_mounted_over_a_file_system_is_not_shut_down_for_it() {
    if !can(&["mkfs.ext4"]) {
        return;
    }
    let (disk, other) = (Disk::ext4(), Disk::ext4());
    let data = disk.place("data");
    // Apart, so that no other test's namespace has a copy of what is mounted.
    let (at, elsewhere) = (data.display(), disk.place("elsewhere"));
    let (under, over) = (disk.path(), other.path());
    let _container = Process::apart(&format!("mount {under} {at}; mount {over} {at}"));
    let seen = mounts(&stack(&other.name));
    let data = seen[0].path();
    let (what, failed) = disk.purge(PurgeStep::ShutDown);
    assert!(what.is_empty(), "{what:?}");
    assert!(failed[0].contains("another mount lies over it"), "{failed:?}");
    std::fs::write(data.join("file"), "works").unwrap();
    File::open(&data).unwrap().sync_all().unwrap();
    // Nor is it told to be damaged, or unmounted.
    let Told::Purged { what, failed } = damaged(&disk.name) else { panic!("not a purge") };
    assert!(what.is_empty() && failed.is_empty(), "{what:?} {failed:?}");
    let (what, failed) = disk.purge(PurgeStep::Unmount);
    assert!(what.is_empty() && failed[0].contains("another mount lies over it"), "{failed:?}");
    assert!(data.join("file").exists());
    // Where it is not covered, it is reached.
    let _another = Process::apart(&format!("mount {under} {}", elsewhere.display()));
    let (what, failed) = disk.purge(PurgeStep::ShutDown);
    assert!((what.len(), failed.len()) == (1, 0), "{what:?} {failed:?}");
    File::open(&data).unwrap().sync_all().unwrap();
}

#[test]
fn a_place_that_another_file_system_has_taken_is_left_alone() {
    if !can(&["mkfs.ext4"]) {
        return;
    }
    let (disk, other) = (Disk::ext4(), Disk::ext4());
    let data = disk.mount("data");
    let before = mounts(&stack(&disk.name));
    assert!(run("umount", &[data.to_str().unwrap()]));
    let refused = before[0].hold().err().unwrap().to_string();
    assert!(refused.contains("not mounted there"), "{refused}");
    assert!(run("mount", &[&other.path(), data.to_str().unwrap()]));
    let taken = mounts(&stack(&other.name));
    let refused = before[0].hold().err().unwrap().to_string();
    assert!(refused.starts_with("left alone"), "{refused}");
    let same = super::mounts::Mount { id: taken[0].id, ..before[0].clone() };
    let refused = same.hold().err().unwrap().to_string();
    assert!(
        refused.contains("another file system"),
        "the number and the place are the same: {refused}"
    );
    taken[0].hold().map(drop).unwrap();
}

#[test]
fn a_file_system_is_shut_down_and_unmounted_in_every_namespace() {
    if !can(&["mkfs.ext4"]) {
        return;
    }
    let (disk, other) = (Disk::ext4(), Disk::ext4());
    let here = disk.mount("here");
    let data = disk.place("data").display().to_string();
    // Without /proc, as far as it can see.
    let script = format!(
        "mount {} {data}; mkdir {data}/under; mount --bind {data} {data}/under; mount -t tmpfs none /proc",
        disk.path()
    );
    let container = Process::apart(&script);
    let neighbour = Process::apart(&format!("mount {} {data}", other.path()));
    let (what, failed) = disk.purge(PurgeStep::ShutDown);
    assert!((what.len(), failed.len()) == (1, 0), "{what:?} {failed:?}");
    let (what, failed) = disk.purge(PurgeStep::Unmount);
    assert!(what.len() >= 3 && failed.is_empty(), "{what:?} {failed:?}");
    assert!(mounts(&stack(&disk.name)).is_empty());
    assert!(std::fs::read_dir(here).unwrap().next().is_none(), "what it was mounted on is seen");
    assert_eq!(mounts(&stack(&other.name)).len(), 1);
    std::fs::write(format!("/proc/{}/root{data}/file", neighbour.pid()), "works").unwrap();
    drop(container);
}

#[test]
fn a_file_system_that_is_in_use_and_mounted_nowhere_is_no_success() {
    if !can(&["mkfs.ext4"]) {
        return;
    }
    let disk = Disk::ext4();
    assert_eq!(disk.purge(PurgeStep::ShutDown), (vec![], vec![]), "nobody has it");
    let (from, to) = (disk.path(), disk.place("data"));
    let to = to.display();
    let user = Process::apart(&format!("mount {from} {to}; exec 7>{to}/file; umount --lazy {to}"));
    let (what, failed) = disk.purge(PurgeStep::ShutDown);
    assert!(what.is_empty() && failed[0].contains("in use"), "{what:?} {failed:?}");
    assert!(disk.uses(&user), "the file says its device");
}

#[test]
fn btrfs_whose_number_is_no_devices_is_found_by_each_of_its_devices() {
    let known = std::fs::read_to_string("/proc/filesystems").unwrap_or_default();
    if !known.contains("btrfs") {
        println!("skipped: this kernel has no btrfs");
        return;
    }
    if !can(&["mkfs.btrfs"]) {
        return;
    }
    let (first, second) = (Disk::new(&[]), Disk::new(&[]));
    assert!(run("mkfs.btrfs", &["-q", "-d", "raid0", &first.path(), &second.path()]));
    let data = first.mount("data");
    let user = Process::start(&[], &format!("exec 7>{}/file", data.display()));
    for disk in [&first, &second] {
        let held = holders(&disk.name, false);
        let by = HeldBy::Mount;
        assert!(held.iter().any(|h| h.by == by && Path::new(&h.what) == data), "{held:?}");
        assert!(disk.uses(&user));
        let (what, failed) = disk.purge(PurgeStep::ShutDown);
        let all = [what, failed].concat();
        assert!(all[0].contains(data.to_str().unwrap()), "{all:?}");
    }
}

/// Everything that can be asked about a device that is there.
fn asks(index: u32, volume: Uuid) -> Vec<Ask> {
    let steps = [
        PurgeStep::ShutDown,
        PurgeStep::EndProcesses,
        PurgeStep::EndGroups,
        PurgeStep::Unmount,
        PurgeStep::FlushDevice,
        PurgeStep::DropCaches,
    ];
    let purges = steps.map(|step| Ask::Purge { index, volume, step });
    let others = [
        Ask::Reconfigure { index, volume, size: None },
        Ask::Reconfigure { index, volume, size: Some(1 << 20) },
        Ask::Disconnect { index, volume },
        Ask::Holders { index, volume, mapped: false },
        Ask::Holders { index, volume, mapped: true },
        Ask::Damaged { index, volume },
    ];
    others.into_iter().chain(purges).collect()
}

#[test]
fn a_device_that_was_not_made_here_is_left_alone_whoever_knows_its_uuid() {
    let node = tempfile::tempdir().unwrap();
    let records = Records::of(node.path().join("records"), node.path().join("block"));
    let (ours, theirs) = (Uuid::from_u128(1), Uuid::from_u128(2));
    // No kernel has these.
    let (one, another, none) = (4_000_000, 4_000_001, 4_000_002);
    for (index, volume) in [(one, ours), (another, theirs)] {
        let device = node.path().join(format!("block/nbd{index}"));
        std::fs::create_dir_all(&device).unwrap();
        std::fs::write(device.join("backend"), volume.to_string()).unwrap();
        std::fs::write(device.join("pid"), "1").unwrap();
    }
    records.made(one, ours).unwrap();
    for (index, volume) in [(another, theirs), (another, ours), (one, theirs), (none, ours)] {
        for ask in asks(index, volume) {
            let error = carry_out(ask.clone(), Vec::new(), &records).unwrap_err();
            assert_eq!(error.class, KernelErrorClass::NotOurs, "{ask:?}: {error}");
        }
    }
    let looked = Ask::Damaged { index: one, volume: ours };
    let told = carry_out(looked, Vec::new(), &records).unwrap();
    assert_eq!(told, Told::Purged { what: vec![], failed: vec![] });
}

#[test]
fn a_device_that_was_disconnected_takes_no_connection_while_it_is_held() {
    let node = tempfile::tempdir().unwrap();
    let records = Records::of(node.path().join("records"), node.path().join("block"));
    let (index, volume) = (4_000_000, Uuid::from_u128(1));
    let device = node.path().join(format!("block/nbd{index}"));
    std::fs::create_dir_all(&device).unwrap();
    std::fs::write(device.join("backend"), volume.to_string()).unwrap();
    records.made(index, volume).unwrap();
    records.disconnected(index, Record { volume, disconnected: true }).unwrap();
    let (_ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
    for (sockets, size) in [(vec![theirs.into()], None), (vec![], Some(1 << 20)), (vec![], None)] {
        let asked = Ask::Reconfigure { index, volume, size };
        let error = carry_out(asked, sockets, &records).unwrap_err();
        assert_eq!(error.class, KernelErrorClass::Disconnected, "{error}");
    }
    // What has it mounted is still looked for, and purged.
    carry_out(Ask::Damaged { index, volume }, Vec::new(), &records).unwrap();
}
