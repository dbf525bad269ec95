/* Extended attributes, as v9fs reads and sets them (Linux fs/9p/xattr.c).
 *
 * Txattrwalk makes a fid of a value (or of the list of names) as it is at that moment, for Tread. Txattrcreate turns a fid
 * into one that takes a value by Twrite; Tclunk sets it, and its reply says how that went. Such fids have xattr set and are
 * found by fids_get_xattr() alone, so every other message on them gets EBADF. What they hold is bounded for each device. */
#include "msg.h"

#include <fcntl.h>
#include <sys/xattr.h>

#define NAME_MOST 255u    /* XATTR_NAME_MAX */
#define VALUE_MOST 65536u /* XATTR_SIZE_MAX, and XATTR_LIST_MAX */
#define FIDS_MOST 256u
#define BYTES_MOST (UINT32_C(2) << 20)

struct x9_xattr {
    struct x9_dev *dev; /* whose share it takes */
    bool set;           /* Txattrcreate's */
    bool ended;         /* its Tclunk has come; below fid->lock, as is have */
    int flags;          /* of setxattr(2) */
    uint32_t size, have;
    char name[NAME_MOST + 1];
    uint8_t value[]; /* size bytes, of which have have come; zeros until then */
};

/* --- which attributes there are --- */

static bool begins(const char *name, const char *with) { return !strncmp(name, with, strlen(with)); }

static bool is_acl(const char *name)
{
    return !strcmp(name, "system.posix_acl_access") || !strcmp(name, "system.posix_acl_default");
}

/* An ACL on the wire and in an xattr (linux/posix_acl_xattr.h): version[4], then tag[2] perm[2] id[4] for each entry. */
enum { ACL_HEADER = 4, ACL_ENTRY = 8, ACL_ID = 4, ACL_USER = 0x02, ACL_GROUP = 0x08 };

/* Turns the numbers of an ACL's users and groups into the guest's (shown) or the host's. Returns whether all have one. What is
 * no ACL is left to the kernel to refuse. */
static bool map_acl(const struct x9_dev *dev, uint8_t *acl, size_t len, bool shown)
{
    bool all = true;

    for (size_t at = ACL_HEADER; at + ACL_ENTRY <= len; at += ACL_ENTRY) {
        uint32_t tag = get16(acl + at), id = get32(acl + at + ACL_ID);
        if (tag == ACL_USER)
            id = shown ? shown_uid(dev, id) : host_uid(dev, id);
        else if (tag == ACL_GROUP)
            id = shown ? shown_gid(dev, id) : host_gid(dev, id);
        else
            continue;
        all &= id != X9_NOID;
        put32(acl + at + ACL_ID, id);
    }
    return all;
}

/* Ours, for what the server may come to keep with a file. */
static bool is_reserved(const char *name) { return begins(name, "user.xen9p."); }

/* The guest's are user.*, the capabilities of a program, and ACLs. All other names mean something to dom0: labels of its
 * security modules, trusted.* (which would take CAP_SYS_ADMIN), properties of its filesystem (btrfs.*). */
static bool is_guests(const char *name)
{
    return begins(name, "user.") || !strcmp(name, "security.capability") || is_acl(name);
}

/* Returns 0 or an errno as getxattr(2) and setxattr(2) have it for such a name. */
static int take_xattr_name(struct cursor *c, char name[NAME_MOST + 1])
{
    uint16_t len;
    const uint8_t *from = take_string(c, &len);

    name[0] = 0;
    if (!from)
        return 0; /* malformed: complete() says so */
    if (len > NAME_MOST)
        return ERANGE;
    if (memchr(from, 0, len))
        return EINVAL;
    memcpy(name, from, len);
    name[len] = 0;
    return 0;
}

/* --- their fids --- */

/* Returns NULL and sets errno: EMFILE, ENOMEM (the device's share is used up, or memory). */
static struct x9_xattr *xattr_new(struct x9_dev *dev, uint32_t size)
{
    struct x9_xattr *xattr = NULL;
    uint32_t fids = __atomic_add_fetch(&dev->xattr_fids, 1, __ATOMIC_RELAXED);
    uint32_t bytes = __atomic_add_fetch(&dev->xattr_bytes, size, __ATOMIC_RELAXED);

    errno = fids > FIDS_MOST ? EMFILE : ENOMEM;
    if (fids <= FIDS_MOST && bytes <= BYTES_MOST)
        xattr = calloc(1, sizeof *xattr + size);
    if (!xattr) {
        __atomic_sub_fetch(&dev->xattr_fids, 1, __ATOMIC_RELAXED);
        __atomic_sub_fetch(&dev->xattr_bytes, size, __ATOMIC_RELAXED);
        return NULL;
    }
    xattr->dev = dev;
    xattr->size = size;
    return xattr;
}

void xattr_free(struct x9_xattr *xattr)
{
    __atomic_sub_fetch(&xattr->dev->xattr_fids, 1, __ATOMIC_RELAXED);
    __atomic_sub_fetch(&xattr->dev->xattr_bytes, xattr->size, __ATOMIC_RELAXED);
    free(xattr);
}

/* Takes over path_fd and xattr, also when it fails (returns NULL). */
static struct x9_fid *fid_of(uint32_t num, int path_fd, uint32_t uid, struct x9_xattr *xattr)
{
    struct x9_fid *fid = fid_new(num, path_fd, 0, uid);

    if (fid)
        fid->xattr = xattr;
    else
        xattr_free(xattr);
    return fid;
}

/* --- reading --- */

/* Leaves in a list of names (len bytes, a NUL after each) those that the guest may see. Returns its length. */
static size_t filter(char *list, size_t len)
{
    size_t kept = 0;

    for (size_t at = 0, n; at < len; at += n) {
        n = strnlen(list + at, len - at) + 1;
        if (n > len - at)
            break;
        if (is_guests(list + at) && !is_reserved(list + at)) {
            memmove(list + kept, list + at, n);
            kept += n;
        }
    }
    return kept;
}

static ssize_t fetch(const char *path, const char *name, char *buf, size_t cap)
{
    return name[0] ? getxattr(path, name, buf, cap) : listxattr(path, buf, cap);
}

static int snapshot(struct x9_call *call, const struct x9_fid *from, const char *name, uint32_t newnum)
{
    char path[X9_FD_PATH], *buf = (char *)call->out, *more = NULL;

    fd_path(path, from->path_fd);
    int err = act_as(call->dev, from->uid);
    if (err)
        return err;
    ssize_t n = fetch(path, name, buf, sizeof call->out);
    if (n < 0 && errno == ERANGE && (buf = more = malloc(VALUE_MOST)))
        n = fetch(path, name, buf, VALUE_MOST);
    if (n >= 0 && !name[0])
        n = (ssize_t)filter(buf, (size_t)n);
    err = n < 0 ? errno : 0;
    if (!err && is_acl(name))
        map_acl(call->dev, (uint8_t *)buf, (size_t)n, true);
    struct x9_xattr *xattr = err ? NULL : xattr_new(call->dev, (uint32_t)n);
    if (!err && !xattr)
        err = errno;
    if (!err) {
        memcpy(xattr->value, buf, (size_t)n);
        struct x9_fid *fid = fid_of(newnum, -1, from->uid, xattr);
        err = fid ? fids_add(&call->dev->fids, fid) : ENOMEM;
    }
    free(more);
    if (!err)
        put64(reply(call, 8), (uint64_t)n);
    return err;
}

int h_xattrwalk(struct x9_call *call)
{
    struct cursor c = body(call);
    uint32_t num = take32(&c), newnum = take32(&c);
    char name[NAME_MOST + 1];
    int err = take_xattr_name(&c, name);

    if (!complete(&c))
        return X9_MALFORMED;
    if (err)
        return err;
    if (name[0] && !is_guests(name))
        return EOPNOTSUPP;
    if (is_reserved(name))
        return ENODATA;
    /* The attributes lie by their inode, so this hardly ever waits for a disk; and if it does, while nobody else is. */
    if (!call->may_block && !dev_idle(call->dev))
        return X9_LATER;
    struct x9_fid *from = fids_get(&call->dev->fids, num);
    if (!from)
        return EBADF;
    lease_file(call, from);
    err = fids_has(&call->dev->fids, newnum) ? EINVAL : snapshot(call, from, name, newnum);
    fid_put(from);
    return err;
}

/* Tread, when it is no open file's fid. */
int xattr_read(struct x9_call *call, uint32_t num, uint64_t offset, uint32_t count)
{
    struct x9_fid *fid = fids_get_xattr(&call->dev->fids, num);
    uint8_t *buf = call->out;

    if (!fid)
        return auth_read(call, num, offset, count);
    const struct x9_xattr *xattr = fid->xattr;
    int err = xattr->set ? EINVAL : 0;
    uint32_t left = offset < xattr->size ? xattr->size - (uint32_t)offset : 0, len = count < left ? count : left;
    if (!err && len > sizeof call->out - X9_READ_HEADER && !(buf = malloc(X9_READ_HEADER + len)))
        err = ENOMEM;
    if (!err) {
        put_header(buf, X9_READ_HEADER + len, P9_TREAD + 1, call->tag);
        put32(buf + X9_HEADER, len);
        memcpy(buf + X9_READ_HEADER, xattr->value + (len ? offset : 0), len);
        call_send(call, buf, X9_READ_HEADER + len);
        err = X9_DONE;
    }
    fid_put(fid);
    if (buf != call->out)
        free(buf);
    return err;
}

/* --- setting --- */

int h_xattrcreate(struct x9_call *call)
{
    struct cursor c = body(call);
    uint32_t num = take32(&c);
    char name[NAME_MOST + 1];
    int err = take_xattr_name(&c, name);
    uint64_t size = take64(&c);
    uint32_t flags = take32(&c);

    if (!complete(&c))
        return X9_MALFORMED;
    if (err)
        return err;
    if (!is_guests(name))
        return EOPNOTSUPP;
    if (is_reserved(name))
        return EPERM;
    if (flags & ~(uint32_t)(XATTR_CREATE | XATTR_REPLACE))
        return EINVAL;
    if (size > VALUE_MOST)
        return E2BIG;
    struct x9_fid *from = fids_get(&call->dev->fids, num);
    if (!from)
        return EBADF;
    if (__atomic_load_n(&from->io_fd, __ATOMIC_ACQUIRE) >= 0)
        err = EINVAL; /* v9fs gives a clone that is not open; a file that is would be closed here */
    int fd = err ? -1 : fcntl(from->path_fd, F_DUPFD_CLOEXEC, 0);
    struct x9_xattr *xattr = fd < 0 ? NULL : xattr_new(call->dev, (uint32_t)size);
    if (!err && !xattr)
        err = errno;
    if (xattr) {
        xattr->set = true;
        xattr->flags = (int)flags;
        strcpy(xattr->name, name);
        struct x9_fid *fid = fid_of(num, fd, from->uid, xattr);
        err = fid ? fids_swap(&call->dev->fids, from, fid) : ENOMEM;
    } else if (fd >= 0) {
        close(fd);
    }
    fid_put(from);
    if (!err)
        reply(call, 0);
    return err;
}

/* Twrite, when it is no open file's fid. The value comes from its start on, without holes; pieces may come again. */
int xattr_write(struct x9_call *call, uint32_t num, uint64_t offset, uint32_t count)
{
    struct x9_fid *fid = fids_get_xattr(&call->dev->fids, num);
    int err = 0;

    if (!fid)
        return auth_write(call, num, offset, count);
    struct x9_xattr *xattr = fid->xattr;
    pthread_mutex_lock(&fid->lock);
    if (xattr->ended) {
        err = EBADF; /* a Tclunk on another ring was first */
    } else if (!xattr->set || offset > xattr->have) {
        err = EINVAL;
    } else if (count > xattr->size - offset) {
        err = ENOSPC;
    } else {
        copy_data(call, xattr->value + offset, count);
        if (offset + count > xattr->have)
            xattr->have = (uint32_t)offset + count;
    }
    pthread_mutex_unlock(&fid->lock);
    fid_put(fid);
    if (!err)
        put32(reply(call, 4), count);
    return err;
}

bool xattr_is_to_set(struct x9_dev *dev, uint32_t num)
{
    struct x9_fid *fid = fids_get_xattr(&dev->fids, num);
    bool set = fid && fid->xattr->set;

    if (fid)
        fid_put(fid);
    return set;
}

/* What v9fs sends for setxattr(2) and removexattr(2). Both have size 0 where the value is empty; Linux removes with
 * XATTR_REPLACE. An empty ACL is none, whichever way it comes, and whether there was one; Linux 6.1 does not take it from
 * setxattr(2). */
static int apply(const struct x9_fid *fid)
{
    struct x9_xattr *xattr = fid->xattr;
    bool acl = is_acl(xattr->name);
    char path[X9_FD_PATH];

    fd_path(path, fid->path_fd);
    int err = act_as(xattr->dev, fid->uid);
    if (!err && acl && !map_acl(xattr->dev, xattr->value, xattr->size, false))
        err = EINVAL;
    if (err)
        return err;
    if (!xattr->size && (acl || xattr->flags == XATTR_REPLACE))
        return !removexattr(path, xattr->name) || (acl && errno == ENODATA) ? 0 : errno;
    return setxattr(path, xattr->name, xattr->value, xattr->size, acl ? 0 : xattr->flags) ? errno : 0;
}

/* The Tclunk of an xattr's fid, which is out of the table already. Returns 0 or the errno for the reply. */
int xattr_end(struct x9_fid *fid)
{
    struct x9_xattr *xattr = fid->xattr;

    pthread_mutex_lock(&fid->lock);
    xattr->ended = true;
    bool whole = xattr->have == xattr->size;
    pthread_mutex_unlock(&fid->lock);
    if (!xattr->set)
        return 0;
    return whole ? apply(fid) : EINVAL; /* who gave up half way wants nothing set */
}
