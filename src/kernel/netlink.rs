//! Generic netlink, family `nbd`: `include/uapi/linux/nbd-netlink.h` of the kernel.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use neli::consts::genl::{Cmd, NlAttrType};
use neli::consts::nl::NlmF;
use neli::consts::socket::NlFamily;
use neli::err::RouterError;
use neli::genl::{
    AttrTypeBuilder, Genlmsghdr, GenlmsghdrBuilder, NlattrBuilder, NlattrBuilderError,
};
use neli::nl::NlPayload;
use neli::router::synchronous::NlRouter;
use neli::types::{Buffer, GenlBuffer};
use neli::utils::Groups;
use nix::errno::Errno;
use uuid::Uuid;

use super::records::not_ours;
use super::{Connect, KernelError, sysfs};
use crate::exit::ExitCode;

#[neli::neli_enum(serialized_type = "u8")]
pub enum Command {
    Connect = 1,
    Disconnect = 2,
    Reconfigure = 3,
}
impl Cmd for Command {}

#[neli::neli_enum(serialized_type = "u16")]
pub enum Attr {
    Index = 1,
    SizeBytes = 2,
    BlockSizeBytes = 3,
    Timeout = 4,
    ServerFlags = 5,
    ClientFlags = 6,
    Sockets = 7,
    DeadConnTimeout = 8,
    DeviceList = 9,
    BackendIdentifier = 10,
}
impl NlAttrType for Attr {}

/// `NBD_SOCK_ITEM` within the list of sockets, and `NBD_SOCK_FD` within an item.
#[neli::neli_enum(serialized_type = "u16")]
pub enum Socket {
    Item = 1,
}
impl NlAttrType for Socket {}

const FLAG_HAS_FLAGS: u64 = 1 << 0;
const FLAG_READ_ONLY: u64 = 1 << 1;
const FLAG_SEND_FLUSH: u64 = 1 << 2;
const FLAG_SEND_FUA: u64 = 1 << 3;
const FLAG_SEND_TRIM: u64 = 1 << 5;
const FLAG_SEND_WRITE_ZEROES: u64 = 1 << 6;
const FLAG_CAN_MULTI_CONN: u64 = 1 << 8;

type Message = Genlmsghdr<Command, Attr>;
type Attrs = GenlBuffer<Attr, Buffer>;

/// The flags of a device. Rotational is left out: nothing here turns. Kernels that do not know
/// write zeroes (before 6.12) ignore it.
fn flags(connect: &Connect) -> u64 {
    let mut flags = FLAG_HAS_FLAGS | FLAG_SEND_FLUSH | FLAG_SEND_FUA | FLAG_CAN_MULTI_CONN;
    if connect.read_only {
        flags |= FLAG_READ_ONLY;
    } else {
        flags |= FLAG_SEND_WRITE_ZEROES;
        if connect.trim {
            flags |= FLAG_SEND_TRIM;
        }
    }
    flags
}

/// Makes a device of `sockets`; returns its number.
pub(super) fn connect(connect: &Connect, sockets: &[OwnedFd]) -> Result<u32, KernelError> {
    let mut attrs = Attrs::new();
    if let Some(index) = connect.index {
        put(&mut attrs, Attr::Index, index)?;
    }
    put(&mut attrs, Attr::SizeBytes, connect.size)?;
    put(&mut attrs, Attr::BlockSizeBytes, u64::from(connect.block_size))?;
    put(&mut attrs, Attr::Timeout, connect.request_timeout)?;
    put(&mut attrs, Attr::DeadConnTimeout, connect.dead_timeout)?;
    put(&mut attrs, Attr::ServerFlags, flags(connect))?;
    put(&mut attrs, Attr::BackendIdentifier, text(connect.volume))?;
    put_sockets(&mut attrs, sockets)?;
    let device = connect.index.map_or_else(|| "a device".to_owned(), |n| format!("/dev/nbd{n}"));
    let index = ask(Command::Connect, attrs)?.map_err(|errno| not_made(errno, &device))?;
    let index = index.or(connect.index).ok_or_else(|| {
        KernelError::new(
            ExitCode::Failed,
            "the kernel made a device and did not say which",
            "Report this as a bug.",
        )
    })?;
    // Set by the kernel from 5.14 on; without it nobody could tell whose the device is.
    if sysfs::backend(index) != Some(connect.volume) {
        let undone = disconnect(index);
        let why = match undone {
            Ok(()) => "this kernel is too old: it does not know backend identifiers".to_owned(),
            Err(error) => format!("this kernel is too old, and {error}"),
        };
        return Err(KernelError::new(ExitCode::Failed, why, "Use Linux 5.14 or later."));
    }
    Ok(index)
}

fn not_made(errno: Errno, device: &str) -> KernelError {
    if errno == Errno::EBUSY {
        return KernelError::new(
            ExitCode::WrongState,
            format!("{device} is in use: connected, or still held open after it was disconnected"),
            "Choose another, or let the first free one be taken (device = \"auto\").",
        );
    }
    if matches!(errno, Errno::EINVAL | Errno::ENODEV | Errno::ENOENT) {
        return KernelError::new(
            ExitCode::WrongState,
            format!("the kernel does not make {device}: {errno}"),
            "Name a device that exists (/sys/block/nbdN), or load the module with more: nbds_max.",
        );
    }
    if matches!(errno, Errno::ENOSPC | Errno::ENOMEM) {
        return KernelError::new(
            ExitCode::Failed,
            format!("there is no free device: {errno}"),
            "Detach a volume, or load the module nbd with more devices: nbds_max.",
        );
    }
    refused(errno, device)
}

/// Gives a device new sockets, a new size, or both.
pub(super) fn reconfigure(
    index: u32,
    volume: Uuid,
    size: Option<u64>,
    sockets: &[OwnedFd],
) -> Result<(), KernelError> {
    let mut attrs = Attrs::new();
    put(&mut attrs, Attr::Index, index)?;
    put(&mut attrs, Attr::BackendIdentifier, text(volume))?;
    if let Some(size) = size {
        put(&mut attrs, Attr::SizeBytes, size)?;
    }
    if !sockets.is_empty() {
        put_sockets(&mut attrs, sockets)?;
    }
    let done = ask(Command::Reconfigure, attrs)?;
    done.map(drop).map_err(|errno| {
        // Not connected any more, or to another volume.
        if matches!(errno, Errno::EINVAL | Errno::ENODEV | Errno::ENOENT) {
            not_ours(index, volume)
        } else {
            refused(errno, &format!("/dev/nbd{index}"))
        }
    })
}

/// Takes a device away, whosever it is.
pub(super) fn disconnect(index: u32) -> Result<(), KernelError> {
    let mut attrs = Attrs::new();
    put(&mut attrs, Attr::Index, index)?;
    let done = ask(Command::Disconnect, attrs)?;
    done.map(drop).map_err(|errno| refused(errno, &format!("/dev/nbd{index}")))
}

/// The backend identifier, as a string of C.
fn text(volume: Uuid) -> String {
    volume.to_string()
}

fn put<P>(attrs: &mut Attrs, kind: Attr, value: P) -> Result<(), KernelError>
where
    P: neli::Size + neli::ToBytes,
{
    attrs.push(attr(kind, value)?);
    Ok(())
}

fn attr<T, P>(kind: T, value: P) -> Result<neli::genl::Nlattr<T, Buffer>, KernelError>
where
    T: NlAttrType + neli::Size,
    P: neli::Size + neli::ToBytes,
{
    let build = || -> Result<_, NlattrBuilderError> {
        let kind = AttrTypeBuilder::default().nla_type(kind).build();
        let kind = kind.map_err(|e| NlattrBuilderError::ValidationError(e.to_string()))?;
        NlattrBuilder::default().nla_type(kind).nla_payload(value).build()
    };
    build().map_err(|error| broken(&error))
}

fn put_sockets(attrs: &mut Attrs, sockets: &[OwnedFd]) -> Result<(), KernelError> {
    let nothing = || Buffer::from(Vec::new());
    let mut list = attr(Attr::Sockets, nothing())?;
    for socket in sockets {
        // The kernel looks the number up in this process.
        let fd = u32::try_from(socket.as_fd().as_raw_fd()).unwrap_or(u32::MAX);
        // `NBD_SOCK_FD` is 1 as well.
        let item = attr(Socket::Item, nothing())?.nest(&attr(Socket::Item, fd)?);
        let nested = item.and_then(|item| list.nest(&item));
        list = nested.map_err(|error| broken(&error))?;
    }
    attrs.push(list);
    Ok(())
}

/// Asks the kernel: the number of a device if it says one, or the kernel's error.
fn ask(command: Command, attrs: Attrs) -> Result<Result<Option<u32>, Errno>, KernelError> {
    let connected = NlRouter::connect(NlFamily::Generic, None, Groups::empty());
    let (router, _multicast) = connected.map_err(|error| broken(&error))?;
    let family = router.resolve_genl_family("nbd").map_err(|_| {
        KernelError::new(
            ExitCode::WrongState,
            "the kernel has no NBD client: the module nbd is not loaded",
            "Load it (modprobe nbd), now and at each start (/etc/modules-load.d).",
        )
    })?;
    let message = GenlmsghdrBuilder::default().cmd(command).version(1).attrs(attrs).build();
    let payload = NlPayload::Payload(message.map_err(|error| broken(&error))?);
    let answers = router.send::<_, _, u16, Message>(family, NlmF::ACK, payload);
    let mut index = None;
    for answer in answers.map_err(|error| broken(&error))? {
        match answer {
            Ok(answer) => {
                if let NlPayload::Payload(message) = answer.nl_payload() {
                    let attrs = message.attrs().get_attr_handle();
                    index = attrs.get_attr_payload_as::<u32>(Attr::Index).ok().or(index);
                }
            }
            Err(RouterError::Nlmsgerr(error)) => return Ok(Err(Errno::from_raw(-*error.error()))),
            Err(error) => return Err(broken(&error)),
        }
    }
    Ok(Ok(index))
}

fn broken(error: &dyn std::fmt::Display) -> KernelError {
    KernelError::new(ExitCode::Failed, format!("netlink: {error}"), "See the log of byokd-kernel.")
}

fn refused(errno: Errno, device: &str) -> KernelError {
    let remedy = if errno == Errno::EPERM {
        "Run byokd-kernel as root, with CAP_SYS_ADMIN."
    } else {
        "See the kernel's log (dmesg)."
    };
    KernelError::new(ExitCode::Failed, format!("the kernel refused {device}: {errno}"), remedy)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wanted(read_only: bool, trim: bool) -> Connect {
        Connect {
            index: None,
            volume: Uuid::from_u128(1),
            size: 1 << 20,
            block_size: 4096,
            read_only,
            trim,
            request_timeout: 30,
            dead_timeout: 60,
        }
    }

    #[test]
    fn a_device_offers_what_the_volume_allows() {
        let all = flags(&wanted(false, true));
        assert_eq!(all & (FLAG_SEND_TRIM | FLAG_SEND_WRITE_ZEROES | FLAG_READ_ONLY), 96);
        assert_eq!(flags(&wanted(false, false)) & FLAG_SEND_TRIM, 0);
        let read_only = flags(&wanted(true, true));
        assert_eq!(read_only & (FLAG_READ_ONLY | FLAG_SEND_TRIM), FLAG_READ_ONLY);
        assert_eq!(all & 1 << 4, 0, "nothing turns");
    }

    #[test]
    fn sockets_are_nested_as_the_kernel_wants_them() {
        let (a, b) = std::os::unix::net::UnixStream::pair().unwrap();
        let fds: Vec<OwnedFd> = vec![a.into(), b.into()];
        let mut attrs = Attrs::new();
        put_sockets(&mut attrs, &fds).unwrap();
        let mut bytes = std::io::Cursor::new(Vec::new());
        neli::ToBytes::to_bytes(&attrs, &mut bytes).unwrap();
        let mut expected = Vec::new();
        let mut word = |n: u16| expected.extend(n.to_ne_bytes());
        word(4 + 2 * 12);
        word(7 | 1 << 15);
        for fd in &fds {
            word(12);
            word(1 | 1 << 15);
            word(8);
            word(1);
            let fd = u16::try_from(fd.as_raw_fd()).unwrap();
            word(if cfg!(target_endian = "little") { fd } else { 0 });
            word(if cfg!(target_endian = "little") { 0 } else { fd });
        }
        assert_eq!(bytes.into_inner(), expected);
    }
}
