/* What is in the kernel's page cache of a file, and reading ahead of a guest.
 *
 * mincore(2) on a mapping tells of any file that the caller owns or may write, or with CAP_FOWNER; of all others the kernel
 * says that everything is there (Linux 5.2), and so nothing is read ahead or dropped that we know nothing of. Nobody
 * ever looks into these mappings, so that a file may shrink meanwhile. */
#include "x9.h"

#include <fcntl.h>
#include <linux/ioprio.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>

#define PIECE (UINT64_C(2) << 20) /* what the kernel reads ahead in one go */

/* resident[i]: whether the page i after offset, a multiple of a page, is in the page cache. Returns 0 or an errno. */
int pages_resident(int fd, uint64_t offset, uint32_t pages, uint8_t resident[X9_MOST_PAGES])
{
    size_t len = (size_t)pages * X9_PAGE;
    void *map = mmap(NULL, len, PROT_READ, MAP_SHARED, fd, (off_t)offset);

    if (map == MAP_FAILED)
        return errno;
    int err = mincore(map, len, resident) ? errno : 0;
    munmap(map, len);
    for (uint32_t i = 0; i < pages; i++)
        resident[i] &= 1; /* the other bits are reserved */
    return err;
}

/* Opens what is at a path beneath the export, a file or a directory: through no link, and nothing else is ever opened. Of a
 * file that the export's origin has unchanged, that one. Returns a descriptor or -errno. */
int x9_ahead_open(x9_dev *dev, const char *path)
{
    struct stat st;

    act_as_server();
    int fd = open_beneath(dev->config.root_fd, path, O_PATH, 0, 0);
    if (fd < 0)
        return fd;
    int io = fstatat(fd, "", &st, AT_EMPTY_PATH) ? -errno
             : S_ISDIR(st.st_mode)               ? fs_reopen(fd, O_RDONLY | O_DIRECTORY | O_NOATIME)
             : S_ISREG(st.st_mode)               ? fs_reopen(fd, O_RDONLY | O_NONBLOCK | O_NOATIME)
                                                 : -EPERM;
    if (io >= 0 && S_ISREG(st.st_mode)) {
        int there = origin_open(dev, io, path, NULL, 0);
        if (there >= 0) {
            close(io);
            io = there;
        }
    }
    close(fd);
    return io;
}

/* Has the kernel begin to read a stretch of a file. Returns how many bytes of it were not there, or -errno. */
int64_t x9_ahead(int fd, uint64_t offset, uint64_t len)
{
    uint8_t resident[X9_MOST_PAGES];
    struct stat st;
    int64_t missing = 0;

    if (fstat(fd, &st))
        return -errno;
    if (!S_ISREG(st.st_mode) || offset >= (uint64_t)st.st_size)
        return 0;
    uint64_t end = len > (uint64_t)st.st_size - offset ? (uint64_t)st.st_size : offset + len;
    for (uint64_t at = offset & ~(uint64_t)(X9_PAGE - 1); at < end; at += PIECE) {
        uint64_t piece = end - at < PIECE ? end - at : PIECE;
        uint32_t pages = (uint32_t)((piece + X9_PAGE - 1) / X9_PAGE), absent = 0;
        int err = pages_resident(fd, at, pages, resident);
        if (err)
            return -err;
        for (uint32_t i = 0; i < pages; i++)
            absent += !resident[i];
        if (!absent)
            continue;
        if ((err = posix_fadvise(fd, (off_t)at, (off_t)piece, POSIX_FADV_WILLNEED)))
            return -err;
        missing += (int64_t)absent * X9_PAGE;
    }
    return missing;
}

/* Waits until the byte at offset is there, so that who reads ahead is never far ahead of the disk. Returns 0 or an errno. */
int x9_ahead_wait(int fd, uint64_t offset)
{
    char byte;

    return pread(fd, &byte, 1, (off_t)offset) < 0 ? errno : 0;
}

/* Gives a stretch of a file out of the page cache, as far as it is clean and nobody has it mapped. Returns 0 or -errno. */
int64_t x9_drop(int fd, uint64_t offset, uint64_t len)
{
    return -posix_fadvise(fd, (off_t)offset, (off_t)len, POSIX_FADV_DONTNEED);
}

/* What this thread reads from now on comes after what others want, where the disk's scheduler knows of that (bfq, and
 * mq-deadline from Linux 6.0 on). Returns 0 or an errno. */
int x9_idle_io(void)
{
    return syscall(SYS_ioprio_set, IOPRIO_WHO_PROCESS, 0, IOPRIO_PRIO_VALUE(IOPRIO_CLASS_BE, 7)) ? errno : 0;
}
