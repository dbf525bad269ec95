/* The fid table: fid number to file descriptor, reference-counted, so that a Tclunk in the middle of a Tread on the
 * same fid closes nothing under it. */
#include "x9.h"

static uint32_t slot(const struct x9_fids *fids, uint32_t num) { return (num * UINT32_C(2654435761) >> 7) & fids->mask; }

int fids_init(struct x9_fids *fids, uint32_t max)
{
    fids->mask = 63;
    fids->count = 0;
    fids->max = max;
    fids->buckets = calloc(fids->mask + 1, sizeof *fids->buckets);
    pthread_mutex_init(&fids->lock, NULL);
    return fids->buckets ? 0 : ENOMEM;
}

/* Takes over path_fd (-1: there is none), also when it fails (returns NULL). */
struct x9_fid *fid_new(uint32_t num, int path_fd, uint32_t format, uint32_t uid)
{
    struct x9_fid *fid = calloc(1, sizeof *fid);

    if (!fid) {
        if (path_fd >= 0)
            close(path_fd);
        return NULL;
    }
    fid->num = num, fid->path_fd = path_fd, fid->io_fd = -1, fid->format = format, fid->uid = uid, fid->refs = 1;
    fid->stream_own = fid->stream_end = X9_NOWHERE; /* the first write is no sequel */
    fid->dir_end = X9_NOWHERE;
    pthread_mutex_init(&fid->lock, NULL);
    return fid;
}

void fid_put(struct x9_fid *fid)
{
    if (__atomic_sub_fetch(&fid->refs, 1, __ATOMIC_ACQ_REL))
        return;
    if (fid->locks)
        locks_forget(fid);
    if (fid->xattr)
        xattr_free(fid->xattr);
    if (fid->auth)
        auth_free(fid->auth);
    streams_end(fid);
    if (fid->origin)
        origin_free(fid->origin);
    if (fid->io_fd >= 0 && fid->io_fd != fid->path_fd)
        close(fid->io_fd);
    if (fid->path_fd >= 0)
        close(fid->path_fd);
    pthread_mutex_destroy(&fid->lock);
    free(fid);
}

static struct x9_fid **find(struct x9_fids *fids, uint32_t num)
{
    struct x9_fid **at = &fids->buckets[slot(fids, num)];

    while (*at && (*at)->num != num)
        at = &(*at)->next;
    return at;
}

enum kind { FILE_FID, XATTR_FID, AUTH_FID };

static enum kind kind_of(const struct x9_fid *fid) { return fid->auth ? AUTH_FID : fid->xattr ? XATTR_FID : FILE_FID; }

static struct x9_fid *get(struct x9_fids *fids, uint32_t num, enum kind kind)
{
    pthread_mutex_lock(&fids->lock);
    struct x9_fid *fid = *find(fids, num);
    if (fid && kind_of(fid) == kind)
        __atomic_add_fetch(&fid->refs, 1, __ATOMIC_RELAXED);
    else
        fid = NULL;
    pthread_mutex_unlock(&fids->lock);
    return fid;
}

/* A new reference to a file's fid, or NULL. */
struct x9_fid *fids_get(struct x9_fids *fids, uint32_t num) { return get(fids, num, FILE_FID); }

/* A new reference to an extended attribute's fid, or NULL: no message but Tread, Twrite and Tclunk takes those. */
struct x9_fid *fids_get_xattr(struct x9_fids *fids, uint32_t num) { return get(fids, num, XATTR_FID); }

/* The same for that of a Tauth, which only Tattach takes besides. */
struct x9_fid *fids_get_auth(struct x9_fids *fids, uint32_t num) { return get(fids, num, AUTH_FID); }

bool fids_has(struct x9_fids *fids, uint32_t num)
{
    pthread_mutex_lock(&fids->lock);
    bool has = *find(fids, num) != NULL;
    pthread_mutex_unlock(&fids->lock);
    return has;
}

static void grow(struct x9_fids *fids)
{
    uint32_t old = fids->mask + 1;
    struct x9_fid **bigger = calloc((size_t)old * 2, sizeof *bigger), **small = fids->buckets;

    if (!bigger)
        return; /* longer chains are slower, not wrong */
    fids->buckets = bigger;
    fids->mask = old * 2 - 1;
    for (uint32_t i = 0; i < old; i++)
        for (struct x9_fid *fid = small[i], *next; fid; fid = next) {
            next = fid->next;
            struct x9_fid **head = &bigger[slot(fids, fid->num)];
            fid->next = *head;
            *head = fid;
        }
    free(small);
}

/* Hands the caller's reference to the table. Returns 0, EINVAL (number in use or NOFID) or EMFILE (too many). */
int fids_add(struct x9_fids *fids, struct x9_fid *fid)
{
    int err = 0;

    pthread_mutex_lock(&fids->lock);
    struct x9_fid **at = find(fids, fid->num);
    if (*at || fid->num == X9_NOFID) {
        err = EINVAL;
    } else if (fids->count >= fids->max) {
        err = EMFILE;
    } else {
        fid->next = NULL;
        *at = fid;
        if (++fids->count > fids->mask)
            grow(fids);
    }
    pthread_mutex_unlock(&fids->lock);
    if (err)
        fid_put(fid);
    return err;
}

/* Puts fid where old is. Returns EBADF if another message has clunked or swapped old meanwhile. */
int fids_swap(struct x9_fids *fids, struct x9_fid *old, struct x9_fid *fid)
{
    int err = 0;

    pthread_mutex_lock(&fids->lock);
    struct x9_fid **at = find(fids, old->num);
    if (*at == old) {
        fid->next = old->next;
        *at = fid;
    } else {
        err = EBADF;
    }
    pthread_mutex_unlock(&fids->lock);
    fid_put(err ? fid : old);
    return err;
}

/* Takes a fid out of the table; the table's reference is the caller's now. NULL: there is no such fid. */
struct x9_fid *fids_take(struct x9_fids *fids, uint32_t num)
{
    pthread_mutex_lock(&fids->lock);
    struct x9_fid **at = find(fids, num), *fid = *at;
    if (fid) {
        *at = fid->next;
        fids->count--;
    }
    pthread_mutex_unlock(&fids->lock);
    return fid;
}

int fids_drop(struct x9_fids *fids, uint32_t num)
{
    struct x9_fid *fid = fids_take(fids, num);

    if (!fid)
        return EBADF;
    fid_put(fid);
    return 0;
}

void fids_clear(struct x9_fids *fids)
{
    struct x9_fid *all = NULL;

    pthread_mutex_lock(&fids->lock);
    for (uint32_t i = 0; i <= fids->mask; i++)
        for (struct x9_fid *fid; (fid = fids->buckets[i]);) {
            fids->buckets[i] = fid->next;
            fid->next = all;
            all = fid;
        }
    fids->count = 0;
    pthread_mutex_unlock(&fids->lock);
    /* Without the lock: closing may take long. */
    while (all) {
        struct x9_fid *fid = all;
        all = fid->next;
        fid_put(fid);
    }
}

void fids_free(struct x9_fids *fids)
{
    fids_clear(fids);
    free(fids->buckets);
    pthread_mutex_destroy(&fids->lock);
}
