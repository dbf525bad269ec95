/* The hot messages of 9P2000.L on file descriptors.
 *
 * Names go through openat2(2) one component at a time, beneath the descriptor they start from, and symlinks are
 * never followed: only the guest resolves them. A file is looked at before it is opened, so that a FIFO or a device
 * node is never opened here. A handler that might sleep returns X9_LATER unless call->may_block. */
#include "msg.h"

#include <dirent.h>
#include <fcntl.h>
#include <linux/openat2.h>
#include <sys/stat.h>
#include <sys/statfs.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>

enum { QT_DIR = 0x80, QT_SYMLINK = 0x02 };

/* Bits of Tsetattr's valid field and of Tgetattr's. */
enum {
    SET_MODE = 0x1, SET_UID = 0x2, SET_GID = 0x4, SET_SIZE = 0x8,
    SET_ATIME = 0x10, SET_MTIME = 0x20, SET_ATIME_VALUE = 0x80, SET_MTIME_VALUE = 0x100,
};
#define GETATTR_BASIC UINT64_C(0x7ff)
#define GETATTR_BTIME UINT64_C(0x800)

/* Copies a file name to name[X9_NAME_MAX + 1]. Returns 0 or the errno for a name that no directory can hold. */
static int take_name(struct cursor *c, char *name)
{
    uint16_t len = take16(c);
    if (c->bad || (size_t)(c->end - c->at) < len) {
        c->bad = true;
        return 0;
    }
    const uint8_t *from = take(c, len);
    if (len > X9_NAME_MAX)
        return ENAMETOOLONG;
    if (!len || memchr(from, 0, len) || memchr(from, '/', len))
        return EINVAL;
    memcpy(name, from, len);
    name[len] = 0;
    return 0;
}

static bool is_dots(const char *name) { return name[0] == '.' && (!name[1] || (name[1] == '.' && !name[2])); }

/* --- descriptors --- */

int open_beneath(int dir, const char *name, uint64_t flags, uint64_t mode, uint64_t resolve)
{
    struct open_how how = {
        .flags = flags | O_CLOEXEC | O_NOFOLLOW,
        .mode = mode,
        /* NO_XDEV: what the host mounts below an export (a chroot's /proc, say) is not part of it. */
        .resolve = RESOLVE_BENEATH | RESOLVE_NO_MAGICLINKS | RESOLVE_NO_SYMLINKS | RESOLVE_NO_XDEV | resolve,
    };
    int fd;

    /* EAGAIN without RESOLVE_CACHED: somebody renamed while the kernel walked. */
    for (int tries = 0; tries < 64; tries++) {
        fd = (int)syscall(SYS_openat2, dir, name, &how, sizeof how);
        if (fd >= 0 || errno != EAGAIN || (resolve & RESOLVE_CACHED))
            return fd < 0 ? -errno : fd;
    }
    return -EAGAIN;
}

/* The one way to the file behind a descriptor where the kernel wants a path: a link that leads to the file itself,
 * whatever its name is by now, and to a symlink and not beyond. For reopening, chmod, truncate, xattrs, and to read where
 * a file is. Whoever takes /proc from a worker changes this function. */
void fd_path(char path[X9_FD_PATH], int fd) { snprintf(path, X9_FD_PATH, "/proc/self/fd/%d", fd); }

/* For Python: at least X9_FD_PATH bytes. */
void x9_fd_path(int fd, char *path) { fd_path(path, fd); }

/* A second, usable descriptor of the file behind an O_PATH one; the type has been looked at before. Returns -errno. */
int fs_reopen(int fd, int flags)
{
    char path[X9_FD_PATH];

    fd_path(path, fd);
    int io = open(path, flags | O_CLOEXEC | O_NOCTTY);
    return io < 0 ? -errno : io;
}

static void encode_qid(const struct x9_dev *dev, uint64_t st_dev, uint64_t ino, uint32_t format, uint32_t version, uint8_t *qid)
{
    /* Files of another filesystem (a btrfs subvolume, a mount) may have the same inode numbers. */
    if (st_dev != dev->root_dev)
        ino ^= (st_dev * UINT64_C(0x9e3779b97f4a7c15)) | UINT64_C(1) << 63;
    qid[0] = format == S_IFDIR ? QT_DIR : format == S_IFLNK ? QT_SYMLINK : 0;
    put32(qid + 1, version);
    put64(qid + 5, ino);
}

static uint32_t version_of(const struct timespec *mtime, off_t size)
{
    return (uint32_t)mtime->tv_nsec ^ (uint32_t)mtime->tv_sec << 3 ^ (uint32_t)size << 8;
}

/* Writes 13 bytes. Returns 0 or an errno. */
int fs_qid(struct x9_dev *dev, int fd, uint8_t *qid, uint32_t *format)
{
    struct stat st;

    if (fstatat(fd, "", &st, AT_EMPTY_PATH))
        return errno;
    *format = st.st_mode & S_IFMT;
    encode_qid(dev, st.st_dev, st.st_ino, *format, version_of(&st.st_mtim, st.st_size), qid);
    return 0;
}

int x9_qid(x9_dev *dev, int fd, uint8_t *qid13)
{
    uint32_t format;

    return fs_qid(dev, fd, qid13, &format);
}

static bool is_root(const struct x9_dev *dev, int fd)
{
    struct stat st;

    return !fstatat(fd, "", &st, AT_EMPTY_PATH) && st.st_dev == dev->root_dev && st.st_ino == dev->root_ino;
}

/* Where the file behind fd is now, beneath the export: a descriptor of its directory, its name in name256[256].
 * There is no race to win: the name is checked to lead to the same inode. Returns a descriptor or -errno. */
int x9_locate(x9_dev *dev, int fd, char *name256)
{
    char link[X9_FD_PATH], path[PATH_MAX + 16], root[PATH_MAX + 16];
    struct stat want, got;

    act_as_server(); /* the way there is not the caller's */
    if (is_root(dev, fd))
        return -EBUSY;
    fd_path(link, fd);
    ssize_t n = readlink(link, path, sizeof path - 1);
    fd_path(link, dev->config.root_fd);
    ssize_t r = readlink(link, root, sizeof root - 1);
    if (n <= 0 || r <= 0 || n >= PATH_MAX || r >= PATH_MAX)
        return -ENAMETOOLONG;
    path[n] = root[r] = 0;
    if (r == 1)
        r = 0; /* the export is "/" */
    if (strncmp(path, root, (size_t)r) || path[r] != '/')
        return -ESTALE;
    char *relative = path + r + 1, *last = strrchr(relative, '/');
    const char *name = last ? last + 1 : relative;
    if (strlen(name) > X9_NAME_MAX || !*name)
        return -ENAMETOOLONG;
    strcpy(name256, name);
    if (last)
        *last = 0;
    int dir = open_beneath(dev->config.root_fd, last ? relative : ".", O_PATH | O_DIRECTORY, 0, 0);
    if (dir < 0)
        return dir == -ENOENT ? -ESTALE : dir;
    if (fstatat(fd, "", &want, AT_EMPTY_PATH) || fstatat(dir, name256, &got, AT_SYMLINK_NOFOLLOW) ||
        want.st_dev != got.st_dev || want.st_ino != got.st_ino) {
        close(dir);
        return -ESTALE; /* unlinked, or moved this very moment */
    }
    return dir;
}

int x9_link_fd(int fd, int dir_fd, const char *name)
{
    char path[X9_FD_PATH];

    if (!me.bare)
        return linkat(fd, "", dir_fd, name, AT_EMPTY_PATH) ? errno : 0;
    fd_path(path, fd); /* AT_EMPTY_PATH takes CAP_DAC_READ_SEARCH */
    return linkat(AT_FDCWD, path, dir_fd, name, AT_SYMLINK_FOLLOW) ? errno : 0;
}

/* --- handlers: 0 (reply in call->out after the header), an errno, or X9_* --- */

static int h_version(struct x9_call *call)
{
    struct cursor c = body(call);
    uint32_t msize = take32(&c);
    uint16_t len = take16(&c);
    const uint8_t *text = c.bad || (size_t)(c.end - c.at) < len ? NULL : take(&c, len);
    static const char ours[] = "9P2000.L";
    const char *answer = "unknown";

    if (!text || !complete(&c))
        return X9_MALFORMED;
    if (msize < X9_MIN_MSIZE)
        return EINVAL;
    if (msize > call->dev->config.max_msize)
        msize = call->dev->config.max_msize;
    if (len >= 8 && !memcmp(text, ours, 8) && (len == 8 || text[8] == '.'))
        answer = ours;
    lease_end(call->dev);
    /* A new session: nothing of the old one may still run when its fids go. */
    int err = dev_drain(call->dev);
    if (err)
        return err;
    fids_clear(&call->dev->fids);
    call->dev->msize = answer == ours ? msize : 0;
    uint8_t *p = reply(call, 6 + (uint32_t)strlen(answer));
    put32(p, msize);
    put16(p + 4, (uint16_t)strlen(answer));
    memcpy(p + 6, answer, strlen(answer));
    return 0;
}

/* The directory above fd, never above the export. Returns an O_PATH descriptor or -errno. */
static int open_parent(struct x9_dev *dev, int fd, uint32_t uid)
{
    char name[X9_NAME_MAX + 1];

    /* As for every other name, this takes the right to search the directory. */
    if (checks_here(dev) && syscall(SYS_faccessat2, fd, "", X_OK, AT_EMPTY_PATH | AT_EACCESS))
        return -errno;
    if (is_root(dev, fd))
        return open_beneath(fd, ".", O_PATH, 0, 0);
    int dir = x9_locate(dev, fd, name), err = act_as(dev, uid);
    if (err && dir >= 0)
        close(dir);
    return err ? -err : dir;
}

/* A walk goes on from here. */
static void leave(const struct x9_fid *from, int at)
{
    if (at >= 0 && at != from->path_fd)
        close(at);
}

static int h_walk(struct x9_call *call)
{
    struct x9_dev *dev = call->dev;
    struct cursor c = body(call);
    uint32_t num = take32(&c), newnum = take32(&c), count = take16(&c), done = 0, format = 0;
    char names[X9_MAX_WALK][X9_NAME_MAX + 1];
    uint8_t qids[X9_MAX_WALK * 13];
    int bad_name[X9_MAX_WALK], err = 0;

    if (c.bad || count > X9_MAX_WALK)
        return X9_MALFORMED;
    for (uint32_t i = 0; i < count; i++)
        bad_name[i] = take_name(&c, names[i]);
    if (!complete(&c))
        return X9_MALFORMED;
    struct x9_fid *from = fids_get(&dev->fids, num);
    if (!from)
        return EBADF;
    if (num != newnum && fids_has(&dev->fids, newnum)) {
        fid_put(from);
        return EINVAL;
    }
    uint32_t uid = from->uid;
    int at = count ? from->path_fd : fcntl(from->path_fd, F_DUPFD_CLOEXEC, 0); /* one name, the most frequent: one descriptor */
    format = from->format;
    err = at < 0 ? errno : count ? act_as(dev, uid) : 0;
    for (; !err && done < count; done++) {
        int next;

        if ((err = bad_name[done]))
            break;
        if (format != S_IFDIR) {
            err = ENOTDIR;
            break;
        }
        if (!strcmp(names[done], ".."))
            next = call->may_block ? open_parent(dev, at, uid) : -EAGAIN;
        else if (!strcmp(names[done], "."))
            next = -EINVAL;
        else {
            lease_name(call, at, names[done]);
            next = open_beneath(at, names[done], O_PATH, 0, call->may_block ? 0 : RESOLVE_CACHED);
        }
        if (next < 0) {
            err = next == -EXDEV || next == -ELOOP ? EACCES : -next;
            break;
        }
        leave(from, at);
        at = next;
        if ((err = fs_qid(dev, at, qids + done * 13, &format)))
            break;
    }
    if (err == EAGAIN && !call->may_block) {
        leave(from, at);
        fid_put(from);
        return X9_LATER;
    }
    if (at < 0 || (err && !done)) {
        leave(from, at);
        fid_put(from);
        return err;
    }
    if (done == count) {
        /* Only a complete walk makes the new fid. */
        struct x9_fid *fid = fid_new(newnum, at, format, uid);
        if (fid)
            events_add(dev, X9_SAW_LOOKUP, fid, 0, 0, !call->may_block);
        err = !fid ? ENOMEM : num == newnum ? fids_swap(&dev->fids, from, fid) : fids_add(&dev->fids, fid);
    } else {
        leave(from, at);
        err = 0;
    }
    fid_put(from);
    if (err)
        return err;
    uint8_t *p = reply(call, 2 + done * 13);
    put16(p, (uint16_t)done);
    memcpy(p + 2, qids, done * 13);
    return 0;
}

static int h_getattr(struct x9_call *call)
{
    struct cursor c = body(call);
    uint32_t num = take32(&c);
    take64(&c); /* request_mask: everything is cheap here */
    struct statx sx;
    int err = 0;

    if (!complete(&c))
        return X9_MALFORMED;
    struct x9_fid *fid = fids_get(&call->dev->fids, num);
    if (!fid)
        return EBADF;
    lease_file(call, fid);
    uint64_t key = lease_has_session(call->dev) ? lease_fid_key(fid) : 0;
    if (statx(fid->path_fd, "", AT_EMPTY_PATH, STATX_BASIC_STATS | STATX_BTIME, &sx))
        err = errno;
    fid_put(fid);
    if (err)
        return err;
    uint64_t dev = (uint64_t)gnu_dev_makedev(sx.stx_dev_major, sx.stx_dev_minor);
    struct timespec mtime = {.tv_sec = sx.stx_mtime.tv_sec, .tv_nsec = sx.stx_mtime.tv_nsec};
    uint8_t *p = reply(call, 153);
    put64(p, GETATTR_BASIC | (sx.stx_mask & STATX_BTIME ? GETATTR_BTIME : 0));
    encode_qid(call->dev, dev, sx.stx_ino, sx.stx_mode & S_IFMT, version_of(&mtime, (off_t)sx.stx_size), p + 8);
    put32(p + 21, sx.stx_mode);
    put32(p + 25, shown_uid(call->dev, sx.stx_uid));
    put32(p + 29, shown_gid(call->dev, sx.stx_gid));
    put64(p + 33, sx.stx_nlink);
    put64(p + 41, (uint64_t)gnu_dev_makedev(sx.stx_rdev_major, sx.stx_rdev_minor));
    put64(p + 49, sx.stx_size);
    put64(p + 57, sx.stx_blksize);
    put64(p + 65, sx.stx_blocks);
    const struct statx_timestamp *times[] = {&sx.stx_atime, &sx.stx_mtime, &sx.stx_ctime, &sx.stx_btime};
    for (int i = 0; i < 4; i++) {
        put64(p + 73 + i * 16, (uint64_t)times[i]->tv_sec);
        put64(p + 81 + i * 16, times[i]->tv_nsec);
    }
    put64(p + 137, key); /* gen: to a client with leases what its buckets are counted from; else 0 */
    put64(p + 145, 0); /* data_version */
    return 0;
}

/* Who has a file open for writing may change its size, whatever its mode is by now. Returns 0 or an errno. */
static int resize(const struct x9_dev *dev, const struct x9_fid *fid, const char *path, off_t size)
{
    int io = checks_here(dev) ? __atomic_load_n(&fid->io_fd, __ATOMIC_ACQUIRE) : -1;

    if (io >= 0 && !ftruncate(io, size))
        return 0;
    if (io >= 0 && errno != EINVAL && errno != EBADF) /* those: it is open for reading */
        return errno;
    return truncate(path, size) ? errno : 0;
}

static int h_setattr(struct x9_call *call)
{
    struct cursor c = body(call);
    uint32_t num = take32(&c), valid = take32(&c), mode = take32(&c), uid = take32(&c), gid = take32(&c);
    uint64_t size = take64(&c);
    struct timespec times[2];
    char path[X9_FD_PATH];
    int err = 0;

    for (int i = 0; i < 2; i++) {
        times[i].tv_sec = (time_t)take64(&c);
        times[i].tv_nsec = (long)take64(&c);
    }
    if (!complete(&c))
        return X9_MALFORMED;
    if (!call->may_block)
        return X9_LATER;
    struct x9_fid *fid = fids_get(&call->dev->fids, num);
    if (!fid)
        return EBADF;
    fd_path(path, fid->path_fd);
    err = act_as(call->dev, fid->uid);
    if ((valid & SET_UID) && (uid = host_uid(call->dev, uid)) == X9_NOID)
        err = EINVAL;
    if ((valid & SET_GID) && (gid = host_gid(call->dev, gid)) == X9_NOID)
        err = EINVAL;
    if (!err && (valid & (SET_UID | SET_GID)))
        if (fchownat(fid->path_fd, "", valid & SET_UID ? uid : (uid_t)-1, valid & SET_GID ? gid : (gid_t)-1, AT_EMPTY_PATH))
            err = errno;
    /* After the owner: chown takes the set-user-id bits away. */
    if (!err && (valid & SET_MODE))
        err = fid->format == S_IFLNK ? EOPNOTSUPP : chmod(path, mode & 07777) ? errno : 0;
    if (!err && (valid & SET_SIZE))
        err = fid->format != S_IFREG ? (fid->format == S_IFDIR ? EISDIR : EINVAL)
              : size > INT64_MAX     ? EFBIG
              : resize(call->dev, fid, path, (off_t)size);
    if (!err && (valid & (SET_ATIME | SET_MTIME))) {
        for (int i = 0; i < 2; i++) {
            bool set = valid & (i ? SET_MTIME : SET_ATIME), value = valid & (i ? SET_MTIME_VALUE : SET_ATIME_VALUE);
            if (!set)
                times[i].tv_nsec = UTIME_OMIT;
            else if (!value)
                times[i].tv_nsec = UTIME_NOW;
            else if (times[i].tv_nsec < 0 || times[i].tv_nsec > 999999999)
                err = EINVAL;
        }
        if (!err && utimensat(fid->path_fd, "", times, AT_EMPTY_PATH))
            err = errno;
    }
    fid_put(fid);
    if (!err)
        reply(call, 0);
    return err;
}

/* The flags of a guest's open(2) that mean something here. 9P2000.L uses Linux's x86 numbers. */
static int open_flags(uint32_t wire)
{
    return (int)(wire & (O_ACCMODE | O_APPEND | O_TRUNC | O_SYNC));
}

/* Linux's client keeps its reads and writes to the iounit (net/9p/client.c), so what may be written can be kept small. */
static uint32_t iounit(const struct x9_dev *dev, uint32_t wire)
{
    uint32_t most = dev->msize - X9_IO_HEADER, wanted = __atomic_load_n(&dev->max_write, __ATOMIC_RELAXED);

    if (wanted && wanted < most && (wire & O_ACCMODE) != O_RDONLY)
        most = wanted;
    return most & ~(X9_PAGE - 1);
}

static int reply_open(struct x9_call *call, int fd, uint32_t wire)
{
    uint8_t qid[13];
    uint32_t format;
    int err = fs_qid(call->dev, fd, qid, &format);

    if (err)
        return err;
    uint8_t *p = reply(call, 17);
    memcpy(p, qid, 13);
    put32(p + 13, iounit(call->dev, wire));
    return 0;
}

/* Opens an O_PATH descriptor for I/O after a look at what it is. Returns a descriptor or -errno; -EAGAIN when it would
 * have to wait (for a lease to be given up) and may not. */
static int open_for_io(struct x9_call *call, int fd, uint32_t format, uint32_t wire)
{
    struct x9_dev *dev = call->dev;
    int flags = open_flags(wire) | (call->may_block ? 0 : O_NONBLOCK);

    if (format == S_IFLNK)
        return -ELOOP;
    if (format == S_IFDIR)
        return (flags & O_ACCMODE) != O_RDONLY || (flags & O_TRUNC) ? -EISDIR : fs_reopen(fd, O_RDONLY | O_DIRECTORY);
    if (format != S_IFREG)
        return -EPERM; /* devices, FIFOs and sockets are the guest's to open, not the server's */
    if (wire & O_DIRECTORY)
        return -ENOTDIR;
    if (dev->config.readonly && ((flags & O_ACCMODE) != O_RDONLY || (flags & O_TRUNC)))
        return -EROFS;
    return fs_reopen(fd, flags);
}

static int h_lopen(struct x9_call *call)
{
    struct cursor c = body(call);
    uint32_t num = take32(&c), wire = take32(&c);
    int err = 0;

    if (!complete(&c))
        return X9_MALFORMED;
    if ((wire & O_TRUNC) && !call->may_block)
        return X9_LATER;
    struct x9_fid *fid = fids_get(&call->dev->fids, num);
    if (!fid)
        return EBADF;
    pthread_mutex_lock(&fid->lock);
    if (fid->io_fd >= 0) {
        err = EINVAL; /* opened already */
    } else if (!(err = act_as(call->dev, fid->uid))) {
        int io = open_for_io(call, fid->path_fd, fid->format, wire);
        if (io < 0)
            err = io == -EAGAIN && !call->may_block ? X9_LATER : -io;
        else if ((err = reply_open(call, io, wire)))
            close(io);
        else
            __atomic_store_n(&fid->io_fd, io, __ATOMIC_RELEASE);
    }
    if (!err) {
        if (call->dev->config.origin_fd >= 0 && fid->format == S_IFREG && (wire & O_ACCMODE) == O_RDONLY &&
            !(wire & O_TRUNC))
            __atomic_store_n(&fid->origin_state, X9_ORIGIN_WANTED, __ATOMIC_RELEASE);
        events_add(call->dev, fid->format == S_IFDIR ? X9_SAW_LIST : X9_SAW_OPEN, fid, 0, 0, false);
    }
    pthread_mutex_unlock(&fid->lock);
    fid_put(fid);
    return err;
}

static int h_lcreate(struct x9_call *call)
{
    struct cursor c = body(call);
    char name[X9_NAME_MAX + 1];
    uint32_t num = take32(&c);
    int bad = take_name(&c, name);
    uint32_t wire = take32(&c), mode = take32(&c), gid = take32(&c);

    if (!complete(&c))
        return X9_MALFORMED;
    if (bad || is_dots(name))
        return bad ? bad : EEXIST;
    if (!call->may_block)
        return X9_LATER;
    struct x9_fid *dir = fids_get(&call->dev->fids, num);
    if (!dir)
        return EBADF;
    uint32_t give;
    int wrong = dir->format != S_IFDIR ? ENOTDIR : dir->io_fd >= 0 ? EINVAL : act_to_make(call->dev, dir->uid, gid, &give);
    if (wrong) {
        fid_put(dir); /* a Tclunk beside us may have made this the last reference */
        return wrong;
    }
    int io = open_beneath(dir->path_fd, name, (uint32_t)open_flags(wire) | O_CREAT | O_EXCL | O_NOCTTY, mode & 07777, 0);
    if (io >= 0 && give != X9_NOID)
        give_group(dir->path_fd, io, give); /* if not, it keeps the user's own: no harm done */
    act_done(call->dev);
    if (io == -EEXIST && !(wire & O_EXCL)) {
        /* It may be a FIFO that somebody put there: look first. */
        uint8_t qid[13];
        uint32_t format;
        int path = open_beneath(dir->path_fd, name, O_PATH, 0, 0);
        int err = path < 0 ? -path : fs_qid(call->dev, path, qid, &format);
        io = err ? -err : format == S_IFDIR ? -EISDIR : open_for_io(call, path, format, wire);
        if (path >= 0)
            close(path);
    }
    int err = io < 0 ? -io : reply_open(call, io, wire);
    if (err) {
        if (io >= 0)
            close(io);
    } else {
        struct x9_fid *fid = fid_new(num, io, S_IFREG, dir->uid);
        if (fid)
            fid->io_fd = io, fid->plain_write = true; /* it has no blocks that could be written without waiting */
        err = fid ? fids_swap(&call->dev->fids, dir, fid) : ENOMEM;
    }
    fid_put(dir);
    return err;
}

static int h_unlinkat(struct x9_call *call)
{
    struct cursor c = body(call);
    char name[X9_NAME_MAX + 1];
    uint32_t num = take32(&c);
    int bad = take_name(&c, name);
    uint32_t flags = take32(&c);

    if (!complete(&c))
        return X9_MALFORMED;
    if (flags & ~(uint32_t)AT_REMOVEDIR)
        return EINVAL;
    if (bad || is_dots(name))
        return bad ? bad : EEXIST;
    struct x9_fid *dir = fids_get(&call->dev->fids, num);
    if (!dir)
        return EBADF;
    int err = dir->format != S_IFDIR ? ENOTDIR : act_as(call->dev, dir->uid);
    if (!err && unlinkat(dir->path_fd, name, (int)flags))
        err = errno;
    fid_put(dir);
    if (!err)
        reply(call, 0);
    return err;
}

/* A reference to an open fid, of that format if one is given; *out stays as it is on error. */
int open_fid(struct x9_call *call, uint32_t num, uint32_t format, struct x9_fid **out)
{
    struct x9_fid *fid = fids_get(&call->dev->fids, num);

    if (!fid)
        return EBADF;
    if (__atomic_load_n(&fid->io_fd, __ATOMIC_ACQUIRE) < 0) {
        fid_put(fid);
        return EBADF;
    }
    if (format && fid->format != format) {
        fid_put(fid);
        return format == S_IFDIR ? ENOTDIR : EISDIR;
    }
    *out = fid;
    return 0;
}

static uint8_t *big(struct x9_call *call)
{
    if (!call->big)
        call->big = malloc(call->dev->config.max_msize);
    return call->big;
}

/* A Tread has read got bytes from fd; cached: all of them came from the page cache. */
static void note_read(struct x9_call *call, struct x9_fid *fid, int fd, uint64_t offset, uint64_t got, bool cached)
{
    dev_count_io(call->dev, got, 0);
    streams_count(call->dev, cached, got);
    if (fd != fid->io_fd)
        count_shared(&call->dev->shared_bytes, got);
    events_add(call->dev, X9_SAW_READ, fid, offset, got, cached);
}

/* Read what the page cache has of fd straight into the ring. Returns as a handler does. */
static int read_cached(struct x9_call *call, struct x9_fid *fid, int fd, uint64_t offset, uint32_t count)
{
    struct x9_link *link = call->link;
    struct iovec iov[2];
    uint8_t header[X9_READ_HEADER];
    struct stat st;
    int err = 0;

    pthread_mutex_lock(&link->tx_lock);
    err = link_wait_room(link, X9_READ_HEADER + count);
    if (err) {
        pthread_mutex_unlock(&link->tx_lock);
        return X9_DONE; /* the device is ending */
    }
    int n = ring_tx_iov(&link->ring, X9_READ_HEADER, count, iov);
    ssize_t got = preadv2(fd, iov, n, (off_t)offset, RWF_NOWAIT);
    if (got < 0)
        err = errno == EAGAIN ? X9_LATER : errno;
    else if ((uint32_t)got < count && (fstat(fd, &st) || offset + (uint64_t)got < (uint64_t)st.st_size))
        err = X9_LATER; /* not the end of the file: the rest is not in the page cache */
    if (err == EOPNOTSUPP) {
        fid->plain_read = true;
        err = X9_LATER;
    }
    if (!err) {
        put_header(header, X9_READ_HEADER + (uint32_t)got, P9_TREAD + 1, call->tag);
        if (call->unleased)
            header[4] |= X9_UNLEASED;
        put32(header + X9_HEADER, (uint32_t)got);
        obs_done_read(call, header, (uint32_t)got);
        ring_poke(&link->ring, 0, header, sizeof header);
        ring_publish(&link->ring, X9_READ_HEADER + (uint32_t)got);
        limits_settle(call->dev, &call->promised, X9_READ_HEADER + (uint32_t)got);
        note_read(call, fid, fd, offset, (uint64_t)got, true);
    }
    pthread_mutex_unlock(&link->tx_lock);
    if (err)
        return err;
    link_notify(link);
    return X9_DONE;
}

static int h_read(struct x9_call *call)
{
    struct cursor c = body(call);
    uint32_t num = take32(&c);
    uint64_t offset = take64(&c);
    uint32_t count = take32(&c);
    struct x9_fid *fid;
    int err, fd;

    if (!complete(&c))
        return X9_MALFORMED;
    if (count > call->dev->msize - X9_READ_HEADER)
        count = call->dev->msize - X9_READ_HEADER;
    if ((err = open_fid(call, num, S_IFREG, &fid)))
        return err == EBADF ? xattr_read(call, num, offset, count) : err;
    if (offset > (uint64_t)INT64_MAX - count) {
        fid_put(fid);
        return EINVAL;
    }
    lease_file(call, fid);
    if (!call->may_block) {
        streams_read(call, fid, offset, count);
        bool later = fid->plain_read || call->link->kind == X9_STREAM || !origin_seek(call->dev, fid, false, &fd);
        err = later ? X9_LATER : read_cached(call, fid, fd, offset, count);
        fid_put(fid);
        return err;
    }
    uint8_t *buf = big(call);
    origin_seek(call->dev, fid, true, &fd);
    struct iovec iov = {buf + X9_READ_HEADER, count};
    bool cached = false;
    ssize_t got = -1;
    /* What comes from a ring is here because the page cache has not got it; of a stream nobody has looked yet. */
    if (buf && call->link->kind == X9_STREAM && !fid->plain_read)
        cached = (got = preadv2(fd, &iov, 1, (off_t)offset, RWF_NOWAIT)) == (ssize_t)count;
    if (!cached)
        got = buf ? pread(fd, buf + X9_READ_HEADER, count, (off_t)offset) : (errno = ENOMEM, -1);
    err = got < 0 ? errno : 0;
    if (!err)
        note_read(call, fid, fd, offset, (uint64_t)got, cached);
    fid_put(fid);
    if (err)
        return err;
    put_header(buf, X9_READ_HEADER + (uint32_t)got, P9_TREAD + 1, call->tag);
    put32(buf + X9_HEADER, (uint32_t)got);
    call_send(call, buf, X9_READ_HEADER + (uint32_t)got);
    return X9_DONE;
}

/* Large: each start takes the processor from writer and worker, and a disk that waits for 16 MiB loses some 10 ms once. */
#define STREAM_STEP (UINT64_C(16) << 20)
#define STREAM_ALIGN (UINT64_C(64) << 10) /* a page that the writer has not filled yet would make it wait for the disk */

/* Notices a sequential writer, and takes note of what fs_write_back() shall start on. Two messages of one fid may be
 * here at once; then a range may be started late or twice, which does no harm. */
static void follow_stream(struct x9_call *call, struct x9_fid *fid, uint64_t offset, uint64_t len)
{
    uint64_t end = offset + len, before = __atomic_load_n(&fid->stream_end, __ATOMIC_RELAXED);
    uint64_t sent = offset == before ? __atomic_load_n(&fid->stream_sent, __ATOMIC_RELAXED) : offset;

    __atomic_store_n(&fid->stream_end, end, __ATOMIC_RELAXED);
    uint64_t filled = end & ~(STREAM_ALIGN - 1);
    if (offset != before)
        streams_begin_write(fid, end);
    bool enough = filled > sent && filled - sent >= STREAM_STEP;
    if (enough || offset != before)
        __atomic_store_n(&fid->stream_sent, enough ? filled : sent, __ATOMIC_RELAXED);
    if (!enough)
        return;
    call->stream = (struct x9_stream){.fid = fid, .from = sent, .to = filled, .dev = call->dev};
    __atomic_add_fetch(&fid->refs, 1, __ATOMIC_RELAXED);
}

/* Starts writing back what a sequential writer has left behind, so that the disk works while the guest does and a
 * Tfsync finds little to do. After the reply: nobody waits for it. */
void fs_write_back(struct x9_stream *stream)
{
    if (!stream->fid)
        return;
    if (stream->reading) {
        streams_step(stream);
        return;
    }
    sync_file_range(stream->fid->io_fd, (off64_t)stream->from, (off64_t)(stream->to - stream->from),
                    SYNC_FILE_RANGE_WRITE);
    streams_drop_written(stream);
    fid_put(stream->fid);
    stream->fid = NULL;
}

#define SLOW_WRITE_US 10000u

/* Where there are no writes without waiting (btrfs), a write on the reader is a chance, too: mostly it is a copy into the
 * page cache. */
static int h_write(struct x9_call *call)
{
    struct iovec iov[2];
    struct x9_fid *fid;
    ssize_t put;
    int err;

    if (call->size < X9_WRITE_HEADER)
        return X9_MALFORMED;
    uint32_t num = get32(call->msg + 7), count = get32(call->msg + 19);
    uint64_t offset = get64(call->msg + 11);
    if (count != call->size - X9_WRITE_HEADER)
        return X9_MALFORMED;
    if ((err = open_fid(call, num, S_IFREG, &fid)))
        return err == EBADF ? xattr_write(call, num, offset, count) : err;
    if (offset > (uint64_t)INT64_MAX - count)
        err = EFBIG;
    bool chance = !call->may_block && fid->plain_write && chance_begins(call->dev);
    uint64_t began = chance ? now_us() : 0;
    if (!err && !call->may_block && fid->plain_write && !chance)
        err = X9_LATER;
    if (err) {
        fid_put(fid);
        return err;
    }
    int n = 1;
    if (call->data_in_ring)
        n = ring_rx_iov(&call->link->ring, call->data_pos, count, iov);
    else
        iov[0] = (struct iovec){(void *)(uintptr_t)(call->msg + X9_WRITE_HEADER), count};
    if ((err = act_to_write(call->dev, fid->uid))) {
        fid_put(fid);
        return err;
    }
    put = pwritev2(fid->io_fd, iov, n, (off_t)offset, call->may_block || chance ? 0 : RWF_NOWAIT);
    err = put < 0 ? errno : 0;
    if (chance)
        chance_ends(call->dev, began, SLOW_WRITE_US);
    if (!call->may_block && !chance && (err == EAGAIN || err == EOPNOTSUPP)) {
        fid->plain_write = true; /* btrfs refuses whatever has to be copied on write: always */
        err = X9_LATER;
    }
    if (!err && (call->may_block || chance))
        follow_stream(call, fid, offset, (uint64_t)put);
    fid_put(fid);
    if (err)
        return err;
    dev_count_io(call->dev, 0, (uint64_t)put);
    put32(reply(call, 4), (uint32_t)put);
    return 0;
}

/* A client asks until there is nothing more: twice, as Linux does, for each listing. Where the last answer said so, this one
 * does, and nobody waits for the pool. What comes into a directory after that is for who begins anew: rewinddir(3). */
static int readdir_end(struct x9_call *call, uint32_t num, uint64_t offset)
{
    struct x9_fid *fid;
    int err = open_fid(call, num, S_IFDIR, &fid);

    if (err)
        return err;
    bool end = offset && offset == __atomic_load_n(&fid->dir_end, __ATOMIC_RELAXED);
    if (end)
        lease_file(call, fid);
    fid_put(fid);
    if (!end)
        return X9_LATER;
    put32(reply(call, 4), 0);
    return 0;
}

static int h_readdir(struct x9_call *call)
{
    struct cursor c = body(call);
    uint32_t num = take32(&c);
    uint64_t offset = take64(&c);
    uint32_t count = take32(&c), used = 0;
    _Alignas(struct dirent64) char entries[16384];
    struct x9_fid *fid;
    bool full = false;
    int err;

    if (!complete(&c))
        return X9_MALFORMED;
    if (count > call->dev->msize - X9_READ_HEADER)
        count = call->dev->msize - X9_READ_HEADER;
    if (!call->may_block)
        return readdir_end(call, num, offset);
    uint8_t *buf = big(call), *out = buf + X9_READ_HEADER;
    if (!buf)
        return ENOMEM;
    if ((err = open_fid(call, num, S_IFDIR, &fid)))
        return err;
    lease_file(call, fid);
    struct stat st;
    bool top = false;
    pthread_mutex_lock(&fid->lock);
    if (fstat(fid->io_fd, &st) || (offset != fid->dir_pos && lseek64(fid->io_fd, (off64_t)offset, SEEK_SET) < 0)) {
        err = errno;
    } else {
        top = st.st_dev == call->dev->root_dev && st.st_ino == call->dev->root_ino;
        fid->dir_pos = offset;
        __atomic_store_n(&fid->dir_end, X9_NOWHERE, __ATOMIC_RELAXED);
    }
    while (!err && !full) {
        ssize_t n = getdents64(fid->io_fd, entries, sizeof entries);
        if (n <= 0) {
            err = n < 0 ? errno : 0;
            if (!err)
                __atomic_store_n(&fid->dir_end, fid->dir_pos, __ATOMIC_RELAXED);
            break;
        }
        for (ssize_t at = 0; at < n;) {
            const struct dirent64 *e = (const struct dirent64 *)(const void *)(entries + at);
            uint32_t len = (uint32_t)strlen(e->d_name), need = 24 + len;
            uint64_t ino = e->d_ino;

            at += e->d_reclen;
            if (need > count - used) {
                full = true;
                break;
            }
            if (top && !strcmp(e->d_name, ".."))
                ino = call->dev->root_ino; /* what is above the export is nobody's business */
            uint8_t *p = out + used;
            encode_qid(call->dev, st.st_dev, ino, DTTOIF(e->d_type), 0, p);
            put64(p + 13, (uint64_t)e->d_off);
            p[21] = e->d_type;
            put16(p + 22, (uint16_t)len);
            memcpy(p + 24, e->d_name, len);
            used += need;
            fid->dir_pos = (uint64_t)e->d_off;
        }
    }
    if (full) {
        /* The kernel's position is past what the reply holds. */
        if (lseek64(fid->io_fd, (off64_t)fid->dir_pos, SEEK_SET) < 0)
            err = errno;
        else if (!used)
            err = EINVAL; /* not even one entry fits into count */
    }
    pthread_mutex_unlock(&fid->lock);
    fid_put(fid);
    if (err)
        return err;
    put_header(buf, X9_READ_HEADER + used, P9_TREADDIR + 1, call->tag);
    put32(buf + X9_HEADER, used);
    call_send(call, buf, X9_READ_HEADER + used);
    return X9_DONE;
}

static int h_clunk(struct x9_call *call)
{
    struct cursor c = body(call);
    uint32_t num = take32(&c);
    struct stat st;

    if (!complete(&c))
        return X9_MALFORMED;
    if (!call->may_block) {
        struct x9_fid *fid = fids_get(&call->dev->fids, num);
        /* The last of an unlinked file: closing it frees its extents, however many they are. A stream drops what it has. */
        bool slow = fid ? __atomic_load_n(&fid->flow.ahead, __ATOMIC_RELAXED) ||
                          (fid->format == S_IFREG && !fstatat(fid->path_fd, "", &st, AT_EMPTY_PATH) && !st.st_nlink)
                        : xattr_is_to_set(call->dev, num);
        if (fid)
            fid_put(fid);
        if (slow)
            return X9_LATER;
    }
    struct x9_fid *fid = fids_take(&call->dev->fids, num);
    if (!fid)
        return EBADF;
    int err = fid->xattr ? xattr_end(fid) : 0;
    fid_put(fid);
    if (!err)
        reply(call, 0);
    return err;
}

static int h_fsync(struct x9_call *call)
{
    struct cursor c = body(call);
    uint32_t num = take32(&c), datasync = 0;
    struct x9_fid *fid;
    int err;

    if (c.at != c.end)
        datasync = take32(&c); /* early clients leave it out */
    if (!complete(&c))
        return X9_MALFORMED;
    if (!call->may_block)
        return X9_LATER;
    if ((err = open_fid(call, num, 0, &fid)))
        return err;
    err = (datasync ? fdatasync(fid->io_fd) : fsync(fid->io_fd)) ? errno : 0;
    fid_put(fid);
    if (!err)
        reply(call, 0);
    return err;
}

static int h_readlink(struct x9_call *call)
{
    struct cursor c = body(call);
    uint32_t num = take32(&c);
    char target[PATH_MAX];

    if (!complete(&c))
        return X9_MALFORMED;
    struct x9_fid *fid = fids_get(&call->dev->fids, num);
    if (!fid)
        return EBADF;
    lease_file(call, fid);
    ssize_t n = fid->format == S_IFLNK ? readlinkat(fid->path_fd, "", target, sizeof target) : (errno = EINVAL, -1);
    int err = n < 0 ? errno : X9_HEADER + 2 + (uint32_t)n > call->dev->msize ? ENAMETOOLONG : 0;
    fid_put(fid);
    if (err)
        return err;
    uint8_t *p = reply(call, 2 + (uint32_t)n);
    put16(p, (uint16_t)n);
    memcpy(p + 2, target, (size_t)n);
    return 0;
}

static int h_statfs(struct x9_call *call)
{
    struct cursor c = body(call);
    uint32_t num = take32(&c);
    struct statfs st;

    if (!complete(&c))
        return X9_MALFORMED;
    struct x9_fid *fid = fids_get(&call->dev->fids, num);
    if (!fid)
        return EBADF;
    int err = fstatfs(fid->path_fd, &st) ? errno : 0;
    fid_put(fid);
    if (err)
        return err;
    uint8_t *p = reply(call, 60);
    put32(p, (uint32_t)st.f_type);
    put32(p + 4, (uint32_t)st.f_bsize);
    put64(p + 8, st.f_blocks);
    put64(p + 16, st.f_bfree);
    put64(p + 24, st.f_bavail);
    put64(p + 32, st.f_files);
    put64(p + 40, st.f_ffree);
    put64(p + 48, (uint64_t)(uint32_t)st.f_fsid.__val[0] | (uint64_t)(uint32_t)st.f_fsid.__val[1] << 32);
    put32(p + 56, (uint32_t)st.f_namelen);
    return 0;
}

/* --- the table of messages --- */

enum { HOT = 1, COLD = 2, MUTATES = 4, POOL = 8 };

static const struct {
    int (*handle)(struct x9_call *);
    uint8_t how;
} table[128] = {
    [P9_TVERSION] = {h_version, HOT},
    [P9_TWALK] = {h_walk, HOT},
    [P9_TGETATTR] = {h_getattr, HOT},
    [P9_TSETATTR] = {h_setattr, HOT | MUTATES | POOL},
    [P9_TLOPEN] = {h_lopen, HOT},
    [P9_TLCREATE] = {h_lcreate, HOT | MUTATES | POOL},
    [P9_TREAD] = {h_read, HOT},
    [P9_TREADDIR] = {h_readdir, HOT},
    [P9_TWRITE] = {h_write, HOT | MUTATES},
    [P9_TCLUNK] = {h_clunk, HOT},
    [P9_TFSYNC] = {h_fsync, HOT | POOL},
    [P9_TREADLINK] = {h_readlink, HOT},
    [P9_TSTATFS] = {h_statfs, HOT},
    [P9_TFLUSH] = {NULL, HOT}, /* device.c: it is about requests, not files */
    [P9_TAUTH] = {NULL, COLD},
    [P9_TATTACH] = {NULL, COLD},
    [P9_TSYMLINK] = {NULL, COLD | MUTATES},
    [P9_TMKNOD] = {NULL, COLD | MUTATES},
    [P9_TRENAME] = {NULL, COLD | MUTATES},
    [P9_TXATTRWALK] = {h_xattrwalk, HOT},
    [P9_TXATTRCREATE] = {h_xattrcreate, HOT | MUTATES},
    [P9_TLOCK] = {h_lock, HOT},
    [P9_TGETLOCK] = {h_getlock, HOT},
    [P9_TLINK] = {NULL, COLD | MUTATES},
    [P9_TMKDIR] = {NULL, COLD | MUTATES},
    [P9_TRENAMEAT] = {NULL, COLD | MUTATES},
    [P9_TUNLINKAT] = {h_unlinkat, HOT | MUTATES | POOL},
    [P9_TLEASE] = {h_lease, HOT},
    [P9_TREVOKE] = {h_revoke, HOT},
    [P9_TREMOVE] = {NULL, COLD}, /* it clunks its fid even where nothing may change */
};

bool fs_is_known(uint8_t type) { return type < 128 && table[type].how; }
bool fs_is_cold(uint8_t type) { return table[type].how & COLD; }
bool fs_mutates(uint8_t type) { return table[type].how & MUTATES; }
/* Whether a message that may have to wait mostly does not: it finds in memory what it looks for, or changes that. */
bool fs_is_quick(const struct x9_call *call)
{
    switch (call->type) {
    case P9_TWALK:
    case P9_TLCREATE:
    case P9_TUNLINKAT:
        return true;
    case P9_TSETATTR: /* fid[4] valid[4]; cutting a file takes as long as it is large */
        return call->size >= X9_HEADER + 8 && !(get32(call->msg + X9_HEADER + 4) & SET_SIZE);
    default:
        return false;
    }
}

bool fs_wants_pool(uint8_t type) { return table[type].how & POOL; }
int fs_handle(struct x9_call *call) { return table[call->type].handle(call); }
