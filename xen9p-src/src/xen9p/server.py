"""The cold messages of 9P2000.L: what runs too seldom to be worth C. Each handler returns its reply or raises OSError.

Names arrive as bytes and are used with a directory descriptor and never as a path; every call here acts on the name
itself and follows no symlink.
"""

from __future__ import annotations

import errno
import logging
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from xen9p import codec
from xen9p.auth import Authenticator
from xen9p.codec import Message
from xen9p.dataplane import DataPlane, Fid, Request, fd_path, link_fd
from xen9p.errors import ProtocolError

LOG = logging.getLogger(__name__)
_COMPLAINED: set[int] = set()
NAME_MAX = 255
SYMLINK_MAX = 4095


def serve(device: DataPlane, request: Request) -> None:
    """Answers one cold request; what cannot be parsed ends the device."""
    try:
        _, message = codec.decode(request.raw)
        reply = _HANDLERS[type(message)](device, message)
        device.reply(request, codec.encode(reply, request.tag))
    except ProtocolError as error:
        device.fail(error.message)
        device.reply_errno(request, errno.EPROTO)
    except OSError as error:
        device.reply_errno(request, error.errno or errno.EIO)
    except Exception as error:  # a defect here must cost the guest one request and not its device
        if request.type not in _COMPLAINED:  # once: a guest may be able to repeat it at will
            _COMPLAINED.add(request.type)
            LOG.error("%s failed: %r", codec.message_name(request.type), error)
        device.reply_errno(request, errno.EIO)


def _fail(err: int) -> OSError:
    return OSError(err, os.strerror(err))


def check_name(name: bytes) -> bytes:
    """A name that can be made in a directory.

    Raises:
        OSError: EINVAL (empty, a slash, a NUL), EEXIST (dots), ENAMETOOLONG.
    """
    if len(name) > NAME_MAX:
        raise _fail(errno.ENAMETOOLONG)
    if not name or b"/" in name or b"\0" in name:
        raise _fail(errno.EINVAL)
    if name in (b".", b".."):
        raise _fail(errno.EEXIST)
    return name


def _writable(device: DataPlane) -> None:
    if device.readonly:
        raise _fail(errno.EROFS)


def _directory(fid: Fid) -> int:
    if fid.format != stat.S_IFDIR:
        raise _fail(errno.ENOTDIR)
    return fid.path_fd


@contextmanager
def _made(directory: int, name: bytes) -> Iterator[int]:
    """An O_PATH descriptor of what stands under name now."""
    fd = os.open(name, os.O_PATH | os.O_NOFOLLOW, dir_fd=directory)
    try:
        yield fd
    finally:
        os.close(fd)


def _attach(device: DataPlane, msg: codec.Tattach) -> Message:
    if device.authenticator is not None:
        _check_key(device, device.authenticator, msg)
    elif msg.afid != codec.NOFID:
        raise _fail(errno.EINVAL)
    # The device is bound to one export, whatever name the guest says; another export's is a lie.
    if msg.aname not in (b"", b"/"):
        raise _fail(errno.ENOENT)
    device.attach(msg.fid, 0 if msg.n_uname == codec.NOFID else msg.n_uname)
    return codec.Rattach(device.qid(device.root_fd))


def _check_key(device: DataPlane, authenticator: Authenticator, msg: codec.Tattach) -> None:
    """Lets a Tattach pass whose afid has the response of a good key. Before its names are looked at: who has no key
    learns nothing about them.

    Raises:
        OSError: ENOKEY, there is no afid; EKEYREJECTED, it does not prove what this message says; EBADF, EAGAIN.
    """
    if msg.afid == codec.NOFID:
        raise _fail(errno.ENOKEY)
    try:
        challenge, response = device.auth_take(msg.afid)
    except OSError as error:
        if error.errno == errno.EKEYREJECTED:
            authenticator.refuse()
        raise
    authenticator.check(challenge, response, msg.uname, msg.aname, msg.n_uname)


def _auth(device: DataPlane, msg: codec.Tauth) -> Message:
    # Whatever names it says: the response is bound to those of the Tattach, and that is where they are checked.
    if device.authenticator is None:  # the peer is known by the domain that its ring is bound to
        raise _fail(errno.ENOENT)
    device.auth_new(msg.afid, device.authenticator.challenge())
    return codec.Rauth(codec.Qid(codec.QT_AUTH, 0, msg.afid))


def _mkdir(device: DataPlane, msg: codec.Tmkdir) -> Message:
    name = check_name(msg.name)
    with device.fid(msg.dfid) as parent, device.making(parent, msg.gid) as made:
        os.mkdir(name, msg.mode & 0o7777, dir_fd=_directory(parent))
        with _made(parent.path_fd, name) as fd:
            if msg.mode & 0o6000:  # mkdir(2) drops the set-id bits
                os.chmod(fd_path(fd), msg.mode & 0o7777)
            made(fd)
            return codec.Rmkdir(device.qid(fd))


def _symlink(device: DataPlane, msg: codec.Tsymlink) -> Message:
    name = check_name(msg.name)
    if len(msg.target) > SYMLINK_MAX:
        raise _fail(errno.ENAMETOOLONG)
    if not msg.target or b"\0" in msg.target:
        raise _fail(errno.EINVAL)
    with device.fid(msg.fid) as parent, device.making(parent, msg.gid) as made:
        os.symlink(msg.target, name, dir_fd=_directory(parent))
        with _made(parent.path_fd, name) as fd:
            made(fd)
            return codec.Rsymlink(device.qid(fd))


def _mknod(device: DataPlane, msg: codec.Tmknod) -> Message:
    name = check_name(msg.name)
    if msg.mode > 0o177777 or msg.major > 0xFFF or msg.minor > 0xFFFFF:
        raise _fail(errno.EINVAL)
    if stat.S_IFMT(msg.mode) not in (0, stat.S_IFREG) and not device.users.special:
        raise _fail(errno.EPERM)
    with device.fid(msg.dfid) as parent, device.making(parent, msg.gid) as made:
        os.mknod(name, msg.mode, os.makedev(msg.major, msg.minor), dir_fd=_directory(parent))
        with _made(parent.path_fd, name) as fd:
            made(fd)
            return codec.Rmknod(device.qid(fd))


def _link(device: DataPlane, msg: codec.Tlink) -> Message:
    name = check_name(msg.name)
    with device.fid(msg.dfid) as parent, device.fid(msg.fid) as target, device.acting(parent.uid):
        link_fd(target.path_fd, _directory(parent), name)
    return codec.Rlink()


def _rename(device: DataPlane, msg: codec.Trename) -> Message:
    name = check_name(msg.name)
    with (
        device.fid(msg.fid) as target,
        device.fid(msg.dfid) as parent,
        device.located(target.path_fd) as (old, old_name),
        device.acting(target.uid),
    ):
        os.rename(old_name, name, src_dir_fd=old, dst_dir_fd=_directory(parent))
    return codec.Rrename()


def _renameat(device: DataPlane, msg: codec.Trenameat) -> Message:
    old_name, new_name = check_name(msg.oldname), check_name(msg.newname)
    with device.fid(msg.olddirfid) as old, device.fid(msg.newdirfid) as new, device.acting(old.uid):
        os.rename(old_name, new_name, src_dir_fd=_directory(old), dst_dir_fd=_directory(new))
    return codec.Rrenameat()


def _unlink(directory: int, name: bytes, is_directory: bool) -> None:
    if is_directory:
        os.rmdir(name, dir_fd=directory)
    else:
        os.unlink(name, dir_fd=directory)


def _remove(device: DataPlane, msg: codec.Tremove) -> Message:
    try:
        with device.fid(msg.fid) as target:
            _writable(device)
            with device.located(target.path_fd) as (directory, name), device.acting(target.uid):
                _unlink(directory, name, target.format == stat.S_IFDIR)
    finally:
        device.clunk(msg.fid)  # whether it worked or not, says remove(5)
    return codec.Rremove()


_HANDLERS: dict[type[Message], Callable[[DataPlane, Any], Message]] = {
    codec.Tattach: _attach,
    codec.Tauth: _auth,
    codec.Tmkdir: _mkdir,
    codec.Tsymlink: _symlink,
    codec.Tmknod: _mknod,
    codec.Tlink: _link,
    codec.Trename: _rename,
    codec.Trenameat: _renameat,
    codec.Tremove: _remove,
}
