/* Reading the unchanged files of a clone through the tree that it was cloned from.
 *
 * A btrfs snapshot shares blocks on the disk with its origin, but the kernel's page cache is of inodes, and each clone has
 * inodes of its own: ten guests that read the same library have it in memory ten times. So data of a file that the guest
 * has opened for reading alone is taken from the origin's file as long as both are the same: one copy serves all clones.
 *
 * They are the same while inode number, generation, size and ctime of both agree, and agree with what they were when the
 * file was first read. The number and the generation say that the one inode was copied from the other by the snapshot. And a
 * change of either's data sets its ctime, before the data changes, to the time that it is then; there is no call that sets
 * it to another. This is looked at before each read, so a read that begins after a write has ended sees that write. */
#include "x9.h"

#include <fcntl.h>
#include <linux/fs.h>
#include <linux/openat2.h>
#include <sys/ioctl.h>
#include <sys/stat.h>

struct x9_origin {
    int fd;
    bool over; /* atomic: they differ, for good */
    struct timespec ctime;
    off_t size;
    uint64_t ino, dev, origin_dev;
};

static bool same_time(const struct timespec *a, const struct timespec *b)
{
    return a->tv_sec == b->tv_sec && a->tv_nsec == b->tv_nsec;
}

static bool generation_of(int fd, long *generation)
{
    *generation = 0;
    return !ioctl(fd, FS_IOC_GETVERSION, generation);
}

/* The origin's file, open for reading, of the file that a path beneath the export leads to; fd is that, open. Fills in *origin, if there is one. Returns a descriptor or -errno: ENOENT, there is none that is the same; EAGAIN,
 * with RESOLVE_CACHED, nobody knows without the disk. */
int origin_open(struct x9_dev *dev, int fd, const char *path, struct x9_origin *origin, uint64_t resolve)
{
    struct stat mine, there;
    long generation, other;

    if (dev->config.origin_fd < 0)
        return -ENOENT;
    int found = open_beneath(dev->config.origin_fd, path, O_PATH, 0, resolve);
    if (found < 0)
        return found;
    int io = -ENOENT;
    if (!fstatat(fd, "", &mine, AT_EMPTY_PATH) && !fstatat(found, "", &there, AT_EMPTY_PATH) && S_ISREG(there.st_mode) &&
        S_ISREG(mine.st_mode) && mine.st_ino == there.st_ino && mine.st_size == there.st_size &&
        mine.st_dev != there.st_dev && same_time(&mine.st_ctim, &there.st_ctim))
        io = fs_reopen(found, O_RDONLY | O_NONBLOCK | O_NOATIME);
    if (io >= 0 && (!generation_of(fd, &generation) || !generation_of(io, &other) || generation != other)) {
        close(io);
        io = -ENOENT;
    }
    if (io >= 0 && origin) {
        origin->fd = io, origin->ctime = mine.st_ctim, origin->size = mine.st_size, origin->ino = mine.st_ino;
        origin->dev = mine.st_dev, origin->origin_dev = there.st_dev;
    }
    close(found);
    return io;
}

/* Looks for it before the first read of a file that was opened for reading alone: most that are opened are in the guest's
 * own page cache and never read. That there is none is no error. Sets *fd to what this read is to be from; two looks at the
 * file are saved by whoever has just compared all there is. Returns false if that needs the disk and this thread may not
 * wait for it. */
bool origin_seek(struct x9_dev *dev, struct x9_fid *fid, bool may_block, int *fd)
{
    char path[PATH_MAX];
    struct x9_origin *origin;
    uint8_t wanted = X9_ORIGIN_WANTED;

    /* Whoever of several readers comes first looks; meanwhile the others read the file itself, which is as good. */
    if (__atomic_load_n(&fid->origin_state, __ATOMIC_RELAXED) != wanted ||
        !__atomic_compare_exchange_n(&fid->origin_state, &wanted, X9_ORIGIN_SOUGHT, false, __ATOMIC_ACQUIRE,
                                     __ATOMIC_RELAXED)) {
        *fd = origin_fd(dev, fid);
        return true;
    }
    act_as_server(); /* who may read the one has the right to read the other: they are the same */
    uint32_t len = obs_path(dev, fid, path);
    int found = -ENOENT;
    if (len >= 2 && len < PATH_MAX && (origin = calloc(1, sizeof *origin))) {
        path[len] = 0;
        found = origin_open(dev, fid->io_fd, path + 1, origin, may_block ? 0 : RESOLVE_CACHED);
        if (found < 0)
            free(origin);
        else
            __atomic_store_n(&fid->origin, origin, __ATOMIC_RELEASE);
    }
    bool later = found == -EAGAIN && !may_block;
    *fd = found < 0 ? fid->io_fd : found;
    __atomic_store_n(&fid->origin_state, later ? X9_ORIGIN_WANTED : X9_ORIGIN_KNOWN, __ATOMIC_RELEASE);
    return !later;
}

/* Whether a file is as it was. */
static bool unchanged(const struct x9_origin *origin, int fd, uint64_t dev)
{
    struct stat st;

    return !fstatat(fd, "", &st, AT_EMPTY_PATH) && same_time(&st.st_ctim, &origin->ctime) && st.st_size == origin->size &&
           st.st_ino == origin->ino && st.st_dev == dev;
}

/* What to read a fid's data from now: the origin's descriptor, or its own. */
int origin_fd(struct x9_dev *dev, struct x9_fid *fid)
{
    struct x9_origin *origin = __atomic_load_n(&fid->origin, __ATOMIC_ACQUIRE);

    if (!origin || __atomic_load_n(&origin->over, __ATOMIC_RELAXED))
        return fid->io_fd;
    if (unchanged(origin, fid->path_fd, origin->dev) && unchanged(origin, origin->fd, origin->origin_dev))
        return origin->fd;
    /* Its descriptor stays open as long as the fid: another thread may be reading from it. */
    __atomic_store_n(&origin->over, true, __ATOMIC_RELAXED);
    return fid->io_fd;
}

void origin_free(struct x9_origin *origin)
{
    close(origin->fd);
    free(origin);
}
