/* Before something is changed, whoever keeps it gives it up: which buckets a message changes, and when it may begin. */
#include "lease.h"

#include <fcntl.h>
#include <sys/stat.h>

/* Counts a change of a bucket and takes it from the others. */
static void claim(struct x9_dev *dev, struct x9_claim *claim, uint32_t bucket)
{
    struct x9_leases *table = dev->lease.table;
    struct record *record = dev->lease.record < RECORDS ? &table->records[dev->lease.record] : NULL;
    uint32_t slot = __atomic_load_n(&dev->lease.slot, __ATOMIC_ACQUIRE), place = RECORDED;
    uint64_t mine = slot < SESSIONS ? UINT64_C(1) << slot : 0;

    for (uint32_t i = 0; i < claim->count; i++)
        if (claim->buckets[i] == bucket)
            return;
    /* Counted first and then noted: a process that dies between the two leaves a bucket that gives no leases. */
    if (__atomic_add_fetch(&table->changing[bucket], 1, __ATOMIC_SEQ_CST) > 1)
        claim->shared = true;
    for (uint32_t i = 0; record && i < RECORDED && place == RECORDED; i++) {
        uint32_t none = 0;
        if (__atomic_compare_exchange_n(&record->buckets[i], &none, bucket + 1, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST))
            place = i;
    }
    /* Its own client may keep what it writes (a page of a write): then others that change it have to ask. */
    if (mine)
        __atomic_or_fetch(&table->masks[bucket], mine, __ATOMIC_SEQ_CST);
    uint64_t others = load64(&table->masks[bucket]) & ~mine, told = 0;
    for (uint32_t i = 0; i < SESSIONS; i++) {
        if ((mine >> i & 1) || !load_time(&table->expires[i]))
            continue;
        if (others >> i & 1)
            leases_post(table, i, bucket);
        told |= UINT64_C(1) << i; /* also whom another change has told already, and waits for */
    }
    /* After it has been posted: no change sees neither. */
    if (others)
        __atomic_and_fetch(&table->masks[bucket], ~others, __ATOMIC_SEQ_CST);
    claim->buckets[claim->count] = bucket;
    claim->places[claim->count] = (uint16_t)place;
    claim->told[claim->count++] = told;
}

/* Whether all sessions have given up what a claim has; if not, *until is when the first of them is out of time. */
bool lease_settled(struct x9_leases *table, struct x9_claim *claim, int64_t *until)
{
    bool all = true;

    for (uint32_t b = 0; b < claim->count; b++)
        for (uint32_t i = 0; i < SESSIONS && claim->told[b] >> i; i++) {
            if (!(claim->told[b] >> i & 1))
                continue;
            if (leases_owes(table, i, claim->buckets[b], until))
                all = false;
            else
                claim->told[b] &= ~(UINT64_C(1) << i);
        }
    return all;
}

void lease_release(struct x9_dev *dev, struct x9_claim *claim)
{
    struct x9_leases *table = dev->lease.table;

    for (uint32_t i = 0; i < claim->count; i++)
        leases_forget_change(table, dev->lease.record < RECORDS ? &table->records[dev->lease.record] : NULL, claim->places[i],
                      claim->buckets[i]);
    claim->count = 0, claim->made = false;
}

/* Names as they stand in a message; what no directory can hold is left for the handler to refuse. */
static bool take_plain_name(struct cursor *c, char name[X9_NAME_MAX + 1])
{
    uint16_t len;
    const uint8_t *from = take_string(c, &len);

    if (!from || !len || len > X9_NAME_MAX || memchr(from, 0, len) || memchr(from, '/', len))
        return false;
    memcpy(name, from, len);
    name[len] = 0;
    return strcmp(name, ".") && strcmp(name, "..");
}

/* A directory, a name in it, and the file that has the name now. */
static void claim_entry(struct x9_dev *dev, struct x9_claim *c, int dir, const char *name)
{
    uint64_t key = lease_fd_key(dir);
    struct stat st;

    act_as_server(); /* who asks may not search the directory: that is for the handler to say */
    if (!key)
        return;
    claim(dev, c, lease_bucket(key));
    claim(dev, c, lease_bucket_of_name(key, name));
    if (!fstatat(dir, name, &st, AT_SYMLINK_NOFOLLOW))
        claim(dev, c, lease_bucket(lease_key(st.st_dev, st.st_ino)));
}

static void claim_fid(struct x9_dev *dev, struct x9_claim *c, uint32_t num)
{
    struct x9_fid *fid = fids_get(&dev->fids, num);
    uint64_t key;

    if (!fid && (fid = fids_get_xattr(&dev->fids, num)) && fid->path_fd < 0) { /* one that is read */
        fid_put(fid);
        fid = NULL;
    }
    if (!fid)
        return;
    if ((key = lease_fid_key(fid)))
        claim(dev, c, lease_bucket(key));
    fid_put(fid);
}

static void claim_in(struct x9_dev *dev, struct x9_claim *c, uint32_t num, bool named, const char *name)
{
    struct x9_fid *dir = named ? fids_get(&dev->fids, num) : NULL;

    if (!dir)
        return;
    claim_entry(dev, c, dir->path_fd, name);
    fid_put(dir);
}

static void claim_place(struct x9_dev *dev, struct x9_claim *c, uint32_t num)
{
    struct x9_fid *fid = fids_get(&dev->fids, num);
    char name[X9_NAME_MAX + 1];

    if (!fid)
        return;
    int dir = x9_locate(dev, fid->path_fd, name);
    if (dir >= 0) {
        claim_entry(dev, c, dir, name);
        close(dir);
    }
    fid_put(fid);
}

static void claim_all(struct x9_dev *dev, struct x9_claim *claim, const uint8_t *msg, uint32_t size)
{
    struct cursor c = {msg + X9_HEADER, msg + size, false};
    char name[X9_NAME_MAX + 1];
    uint32_t num = take32(&c), other;
    bool named;

    switch (msg[4]) {
    case P9_TWRITE:
    case P9_TSETATTR:
    case P9_TLOPEN:
    case P9_TCLUNK:
        claim_fid(dev, claim, num);
        break;
    case P9_TLCREATE:
    case P9_TSYMLINK:
    case P9_TMKNOD:
    case P9_TMKDIR:
    case P9_TUNLINKAT:
        named = take_plain_name(&c, name);
        claim_in(dev, claim, num, named, name);
        break;
    case P9_TLINK:
        other = take32(&c);
        named = take_plain_name(&c, name);
        claim_in(dev, claim, num, named, name);
        claim_fid(dev, claim, other);
        break;
    case P9_TRENAME:
        other = take32(&c);
        named = take_plain_name(&c, name);
        claim_in(dev, claim, other, named, name);
        claim_place(dev, claim, num);
        break;
    case P9_TRENAMEAT:
        named = take_plain_name(&c, name);
        claim_in(dev, claim, num, named, name);
        num = take32(&c);
        named = take_plain_name(&c, name);
        claim_in(dev, claim, num, named, name);
        break;
    case P9_TREMOVE:
        claim_place(dev, claim, num);
        break;
    }
}

static bool changes(const struct x9_dev *dev, uint8_t type, const uint8_t *msg, uint32_t size)
{
    if (dev->config.readonly)
        return false;
    if (type == P9_TLOPEN)
        return size >= X9_HEADER + 8 && (get32(msg + X9_HEADER + 4) & O_TRUNC);
    if (type == P9_TCLUNK)
        return size >= X9_HEADER + 4 && xattr_is_to_set((struct x9_dev *)(uintptr_t)dev, get32(msg + X9_HEADER));
    if (type == P9_TXATTRCREATE)
        return false; /* its Tclunk is what changes something */
    return fs_mutates(type) || type == P9_TREMOVE;
}

/* Before a message is handled: has the clients of others give up what it changes. Returns whether it may begin; if not, it
 * is to be parked with its claim. */
bool lease_may_begin(struct x9_dev *dev, struct x9_claim *claim, const uint8_t *msg, uint32_t size)
{
    struct x9_leases *table = dev->lease.table;
    int64_t until = INT64_MAX;

    if (!table || claim->made)
        return true;
    claim->late = false;
    if (!__atomic_load_n(&table->active, __ATOMIC_RELAXED)) {
        claim->late = true; /* a session may begin before it is done: lease_done() */
        return true;
    }
    if (!changes(dev, msg[4], msg, size))
        return true;
    claim->made = true, claim->shared = false;
    claim_all(dev, claim, msg, size);
    if (lease_settled(table, claim, &until))
        return true;
    leases_signal(table);
    claim->since = lease_now();
    return false;
}

/* After a message has been handled, before its reply. */
void lease_done(struct x9_dev *dev, struct x9_claim *claim, const uint8_t *msg, uint32_t size)
{
    struct x9_leases *table = dev->lease.table;

    if (!table)
        return;
    if (claim->made) {
        lease_release(dev, claim);
    } else if (claim->late) {
        claim->late = false;
        __atomic_thread_fence(__ATOMIC_SEQ_CST); /* what it did, and then whether somebody began to keep things meanwhile */
        if (__atomic_load_n(&table->active, __ATOMIC_RELAXED) && changes(dev, msg[4], msg, size))
            leases_wait_everything(table, leases_post_everything(table), dev);
    }
}
