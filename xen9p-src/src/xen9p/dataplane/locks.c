/* Byte-range locks: Tlock and Tgetlock with the meaning of fcntl(2)'s POSIX locks (Linux fs/9p/vfs_file.c).
 *
 * An owner is a process of the peer: (client_id, proc_id). For each file on which an owner holds locks there is one open
 * file description, and the locks are its OFD locks. So the kernel arbitrates: between owners, between workers (that is,
 * guests) and with dom0's own programs; and it releases all of them when the worker dies. What an owner holds is mirrored
 * here to bound it, and to close the description with the last lock. Locks go with the last fid they were taken through. */
#include "msg.h"

#include <fcntl.h>
#include <sys/stat.h>

#define OWNERS_MOST 1024u /* descriptors */
#define RANGES_MOST 4096u /* the kernel searches a file's locks one after the other */
#define LINKS_MOST 4096u
#define CLIENT_MOST 255u
#define LAST ((uint64_t)INT64_MAX)
#define SOMEBODY 1u /* proc_id of an owner that this worker does not know; fcntl(2) in the guest shows -1, as for OFD locks */

enum { READ = 0, WRITE = 1, UNLOCK = 2 };                 /* type */
enum { FLAG_BLOCK = 1, FLAG_RECLAIM = 2 };                /* flags */
enum { SUCCESS = 0, BLOCKED = 1 };                        /* Rlock's status */

struct range {
    uint64_t first, last;
    uint8_t type;
};

struct x9_owner {
    struct x9_owner *next;
    dev_t dev;
    ino_t ino;
    uint32_t proc_id;
    char client[CLIENT_MOST + 1];
    int fd;
    struct range *ranges; /* sorted, apart or of different types */
    uint32_t nranges;
    struct x9_fid **fids; /* through which they were taken; no references: locks_forget() comes before a fid goes */
    uint32_t nfids;
};

/* What Tlock and Tgetlock have in common. */
struct wish {
    uint32_t num, proc_id;
    uint8_t type;
    uint64_t start, length, last;
    uint16_t client_len;
    char client[CLIENT_MOST + 1];
    dev_t dev;
    ino_t ino;
};

/* --- the mirror --- */

/* Writes to new[count + 2] what the owner holds after the wish is granted. Returns how many. */
static uint32_t granted(const struct range *held, uint32_t count, const struct wish *wish, struct range *new)
{
    struct range mine = {wish->start, wish->last, wish->type};
    uint32_t n = 0;

    /* What lies left of it, or a part; joined if it is of one kind with it. */
    uint32_t i = 0;
    for (; i < count && held[i].first < mine.first; i++) {
        new[n] = held[i];
        if (held[i].last < mine.first) {
            if (held[i].type == mine.type && held[i].last + 1 == mine.first)
                mine.first = held[i].first;
            else
                n++;
            continue;
        }
        if (held[i].type == mine.type) {
            mine.first = held[i].first;
        } else {
            new[n].last = mine.first - 1;
            n++;
        }
        if (held[i].last > mine.last) {
            if (held[i].type == mine.type)
                mine.last = held[i].last;
            else
                break; /* the same one reaches out on the right: below */
        }
    }
    uint32_t at = n++;
    for (; i < count; i++) {
        struct range rest = held[i];
        if (rest.last <= mine.last)
            continue;
        bool touches = rest.first <= mine.last || rest.first == mine.last + 1;
        if (touches && rest.type == mine.type) {
            mine.last = rest.last;
            continue;
        }
        if (rest.first <= mine.last)
            rest.first = mine.last + 1;
        new[n++] = rest;
    }
    new[at] = mine;
    if (mine.type == UNLOCK) {
        memmove(new + at, new + at + 1, (n - at - 1) * sizeof *new);
        n--;
    }
    return n;
}

/* --- owners; with locks->lock held --- */

static struct x9_owner *find(const struct x9_locks *locks, const struct wish *wish)
{
    struct x9_owner *owner = locks->owners;

    while (owner && (owner->ino != wish->ino || owner->dev != wish->dev || owner->proc_id != wish->proc_id ||
                     strcmp(owner->client, wish->client)))
        owner = owner->next;
    return owner;
}

static void drop(struct x9_locks *locks, struct x9_owner *owner)
{
    struct x9_owner **at = &locks->owners;

    while (*at != owner)
        at = &(*at)->next;
    *at = owner->next;
    locks->nowners--;
    locks->nranges -= owner->nranges;
    locks->nlinks -= owner->nfids;
    close(owner->fd); /* with it go the locks */
    free(owner->ranges);
    free(owner->fids);
    free(owner);
}

/* Takes over fd, also when it fails. */
static int add_owner(struct x9_locks *locks, const struct wish *wish, int fd, struct x9_owner **out)
{
    struct x9_owner *owner = locks->nowners < OWNERS_MOST ? calloc(1, sizeof *owner) : NULL;

    if (!owner) {
        close(fd);
        return ENOLCK;
    }
    owner->dev = wish->dev, owner->ino = wish->ino, owner->proc_id = wish->proc_id, owner->fd = fd;
    strcpy(owner->client, wish->client);
    owner->next = locks->owners;
    locks->owners = owner;
    locks->nowners++;
    *out = owner;
    return 0;
}

static int link_fid(struct x9_locks *locks, struct x9_owner *owner, struct x9_fid *fid)
{
    for (uint32_t i = 0; i < owner->nfids; i++)
        if (owner->fids[i] == fid)
            return 0;
    struct x9_fid **more =
        locks->nlinks < LINKS_MOST ? realloc(owner->fids, (owner->nfids + 1) * sizeof(struct x9_fid *)) : NULL;
    if (!more)
        return ENOLCK;
    owner->fids = more;
    more[owner->nfids++] = fid;
    locks->nlinks++;
    fid->locks = locks;
    return 0;
}

static struct flock to_flock(const struct wish *wish)
{
    return (struct flock){
        .l_type = wish->type == READ ? F_RDLCK : wish->type == WRITE ? F_WRLCK : F_UNLCK,
        .l_whence = SEEK_SET,
        .l_start = (off_t)wish->start,
        .l_len = wish->last == LAST ? 0 : (off_t)wish->length,
    };
}

/* Returns 0, or an errno: EAGAIN for a lock that stands in the way. */
static int change(struct x9_locks *locks, struct x9_owner *owner, struct x9_fid *fid, const struct wish *wish)
{
    struct range *new = malloc((owner->nranges + 2) * sizeof *new);

    if (!new)
        return ENOLCK;
    uint32_t count = granted(owner->ranges, owner->nranges, wish, new);
    struct flock lock = to_flock(wish);
    int err = count > owner->nranges && locks->nranges + (count - owner->nranges) > RANGES_MOST ? ENOLCK : 0;
    if (!err && wish->type != UNLOCK)
        err = link_fid(locks, owner, fid);
    if (!err && fcntl(owner->fd, F_OFD_SETLK, &lock))
        err = errno == EACCES ? EAGAIN : errno;
    if (err) {
        free(new);
        return err;
    }
    locks->nranges += count - owner->nranges;
    free(owner->ranges);
    owner->ranges = new;
    owner->nranges = count;
    return 0;
}

/* A fid is going: so are the locks that only it has stood for. */
void locks_forget(struct x9_fid *fid)
{
    struct x9_locks *locks = fid->locks;

    pthread_mutex_lock(&locks->lock);
    for (struct x9_owner *owner = locks->owners, *next; owner; owner = next) {
        next = owner->next;
        for (uint32_t i = 0; i < owner->nfids; i++)
            if (owner->fids[i] == fid) {
                owner->fids[i] = owner->fids[--owner->nfids];
                locks->nlinks--;
                if (!owner->nfids)
                    drop(locks, owner);
                break;
            }
    }
    pthread_mutex_unlock(&locks->lock);
}

/* --- the messages --- */

/* The fields from the type on; flags only in Tlock. Returns X9_MALFORMED, an errno or 0. */
static int take_wish(struct x9_call *call, bool flagged, struct wish *wish)
{
    struct cursor c = body(call);

    wish->num = take32(&c);
    wish->type = take8(&c);
    uint32_t flags = flagged ? take32(&c) : 0;
    wish->start = take64(&c);
    wish->length = take64(&c);
    wish->proc_id = take32(&c);
    const uint8_t *client = take_string(&c, &wish->client_len);
    if (!complete(&c))
        return X9_MALFORMED;
    if (wish->type > UNLOCK || (flags & ~(uint32_t)(FLAG_BLOCK | FLAG_RECLAIM)))
        return EINVAL;
    if (wish->client_len > CLIENT_MOST || memchr(client, 0, wish->client_len))
        return EINVAL;
    if (wish->start > LAST || (wish->length && wish->length - 1 > LAST - wish->start))
        return EINVAL;
    memcpy(wish->client, client, wish->client_len);
    wish->client[wish->client_len] = 0;
    wish->last = wish->length ? wish->start + wish->length - 1 : LAST;
    return 0;
}

static int take_lock(struct x9_call *call, bool flagged, struct wish *wish, struct x9_fid **fid)
{
    struct stat st;
    int err = take_wish(call, flagged, wish);

    if (err || (err = open_fid(call, wish->num, S_IFREG, fid)))
        return err;
    if (fstat((*fid)->io_fd, &st)) {
        err = errno;
        fid_put(*fid);
        return err;
    }
    wish->dev = st.st_dev, wish->ino = st.st_ino;
    return 0;
}

/* A description of its own for an owner's locks. For writing where the export allows it, whatever the fid was opened for:
 * flock(2), which v9fs turns into such locks, asks for no mode, and fcntl(2)'s rule the guest's kernel has checked. With the
 * server's rights: that the caller has the file open has been looked at when it opened it. */
static int open_for_locks(const struct x9_call *call, const struct x9_fid *fid)
{
    int wait = call->may_block ? 0 : O_NONBLOCK;
    int fd = call->dev->config.readonly ? -EROFS : fs_reopen(fid->path_fd, O_RDWR | wait);

    if (fd < 0 && (fd != -EAGAIN || call->may_block))
        fd = fs_reopen(fid->path_fd, O_RDONLY | wait);
    return fd;
}

int h_lock(struct x9_call *call)
{
    struct x9_locks *locks = &call->dev->locks;
    struct wish wish;
    struct x9_fid *fid;
    int err = take_lock(call, true, &wish, &fid), fd = -1;

    if (err)
        return err;
    pthread_mutex_lock(&locks->lock);
    struct x9_owner *owner = find(locks, &wish);
    if (!owner && wish.type != UNLOCK) {
        /* Opening may have to wait for a lease: not with the lock. */
        pthread_mutex_unlock(&locks->lock);
        act_as_server();
        fd = open_for_locks(call, fid);
        if (fd < 0) {
            fid_put(fid);
            return fd == -EAGAIN && !call->may_block ? X9_LATER : -fd;
        }
        pthread_mutex_lock(&locks->lock);
        if ((owner = find(locks, &wish)))
            close(fd); /* the same process on the other ring was quicker */
        else
            err = add_owner(locks, &wish, fd, &owner);
    }
    if (owner && !err) {
        err = change(locks, owner, fid, &wish);
        if (!owner->nranges)
            drop(locks, owner);
    }
    pthread_mutex_unlock(&locks->lock);
    fid_put(fid);
    if (err && err != EAGAIN)
        return err;
    *reply(call, 1) = err ? BLOCKED : SUCCESS; /* the client asks again: a thread that waited here would be a guest's */
    return 0;
}

/* A lock of another owner of this device in the way: its owner is known. With locks->lock held. */
static struct x9_owner *in_the_way(const struct x9_locks *locks, const struct wish *wish, struct range *which)
{
    for (struct x9_owner *owner = locks->owners; owner; owner = owner->next) {
        bool same = owner->proc_id == wish->proc_id && !strcmp(owner->client, wish->client);
        if (owner->ino != wish->ino || owner->dev != wish->dev || same)
            continue;
        for (uint32_t i = 0; i < owner->nranges; i++) {
            *which = owner->ranges[i];
            if (which->first <= wish->last && which->last >= wish->start && (wish->type == WRITE || which->type == WRITE))
                return owner;
        }
    }
    return NULL;
}

static void reply_lock(struct x9_call *call, const struct range *range, uint32_t proc_id, const char *client)
{
    size_t len = strlen(client);
    uint8_t *p = reply(call, 23 + (uint32_t)len);

    p[0] = range->type;
    put64(p + 1, range->first);
    put64(p + 9, range->last == LAST ? 0 : range->last - range->first + 1);
    put32(p + 17, proc_id);
    put16(p + 21, (uint16_t)len);
    memcpy(p + 23, client, len);
}

int h_getlock(struct x9_call *call)
{
    struct x9_locks *locks = &call->dev->locks;
    struct range range;
    struct wish wish;
    struct x9_fid *fid;
    int err = take_lock(call, false, &wish, &fid);

    if (err)
        return err;
    if (wish.type == UNLOCK)
        wish.type = WRITE; /* v9fs does not say which kind it asks for: name whatever there is */
    pthread_mutex_lock(&locks->lock);
    struct x9_owner *other = in_the_way(locks, &wish, &range), *mine = find(locks, &wish);
    if (other) {
        reply_lock(call, &range, other->proc_id, other->client);
    } else {
        struct flock lock = to_flock(&wish);
        /* A lock of the asker's own description is not in its way. */
        err = fcntl(mine ? mine->fd : fid->io_fd, F_OFD_GETLK, &lock) ? errno : 0;
        uint64_t first = (uint64_t)lock.l_start, length = (uint64_t)lock.l_len;
        range = (struct range){first, length ? first + length - 1 : LAST, lock.l_type == F_RDLCK ? READ : WRITE};
        if (!err && lock.l_type != F_UNLCK)
            reply_lock(call, &range, SOMEBODY, "");
        else if (!err)
            reply_lock(call, &(struct range){wish.start, wish.last, UNLOCK}, wish.proc_id, wish.client);
    }
    pthread_mutex_unlock(&locks->lock);
    fid_put(fid);
    return err;
}
