/* Leases: what lets a client keep names, attributes and data without asking again, and still never use an old one
 * (decision 25).
 *
 * All devices that serve overlapping directories share one table in memory. Files and names hash to buckets, and each
 * bucket has a mask of the sessions whose clients may keep something of it, and a count of the changes under way. A
 * message that reads sets its session's bit and looks at the count: if it is not 0 the reply says "do not keep this". A
 * message that changes counts itself, takes the other sessions' bits away, and begins only when each of those clients
 * has said that it keeps nothing of the bucket any more, or the term of its session is over by the clock. As there is no
 * lease while a change is under way, nothing is left to be done after it: a worker may die at any point.
 *
 * What waits for a client waits in no thread: it is parked here and goes to its queue when it may begin. */
#include "msg.h"

#include <fcntl.h>
#include <linux/futex.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>

#define MAGIC 0x39706c31u /* changes with the layout */
#define BUCKETS 65536u
#define SESSIONS 64u
#define WORDS (BUCKETS / 64)
#define GROUPS (WORDS / 64)
#define RECORDS 256u  /* devices of one table that can be cleaned up after */
#define RECORDED 256u /* buckets that a device may be changing at once and that can be */
#define REFUSED_TERMS 5
#define PEERS 1024u   /* two peers with the same number modulo this are refused together */
#define IDLE_NS INT64_C(5000000000)

/* All fields are atomic; times are CLOCK_MONOTONIC in ns, which all processes of a host share. */
struct session {
    int64_t oldest;  /* since when something is to be given up; 0: nothing is */
    uint32_t everything, everything_sent;
    uint32_t peer; /* whose it is, and the term that it has */
    int64_t term;
    uint64_t groups[GROUPS]; /* which words of pending have bits */
    uint64_t pending[WORDS]; /* buckets to be given up, */
    uint64_t sent[WORDS];    /* and those of them that the client has been told and has not confirmed */
};

/* What a device is changing, so that it can be undone when its process has died. */
struct record {
    uint32_t pid;
    uint32_t buckets[RECORDED]; /* number + 1 */
};

struct x9_leases {
    uint32_t magic, signal; /* signal: a futex, counts whatever somebody may wait for */
    uint32_t active, frozen;
    uint64_t opened, revoked, voided;
    int64_t refused[PEERS];    /* until when a peer gets no session; 0 is nobody's number */
    int64_t expires[SESSIONS]; /* 0: there is no such session. Who sets it to 0 ends it */
    struct record records[RECORDS];
    struct session sessions[SESSIONS];
    uint32_t changing[BUCKETS];
    uint64_t masks[BUCKETS];
};

static uint32_t load32(const uint32_t *p) { return __atomic_load_n(p, __ATOMIC_SEQ_CST); }
static uint64_t load64(const uint64_t *p) { return __atomic_load_n(p, __ATOMIC_SEQ_CST); }
static int64_t load_time(const int64_t *p) { return __atomic_load_n(p, __ATOMIC_SEQ_CST); }
static int64_t now(void) { return (int64_t)clock_ns(CLOCK_MONOTONIC); }

static void signal_all(struct x9_leases *table)
{
    __atomic_add_fetch(&table->signal, 1, __ATOMIC_SEQ_CST);
    syscall(SYS_futex, &table->signal, FUTEX_WAKE, INT_MAX, NULL, NULL, 0);
}

static void wait_signal(struct x9_leases *table, uint32_t seen, int64_t ns)
{
    struct timespec timeout = {ns / 1000000000, ns % 1000000000};

    syscall(SYS_futex, &table->signal, FUTEX_WAIT, seen, &timeout, NULL, 0);
}

/* --- the table --- */

/* A new table in the file behind fd, or the one that is there. Returns NULL and sets errno: EPROTO, it is none of ours. */
x9_leases *x9_leases_open(int fd)
{
    struct stat st;

    if (fstat(fd, &st) || (!st.st_size && ftruncate(fd, sizeof(x9_leases))))
        return NULL;
    if (st.st_size && st.st_size != (off_t)sizeof(x9_leases)) {
        errno = EPROTO;
        return NULL;
    }
    x9_leases *table = mmap(NULL, sizeof *table, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (table == MAP_FAILED)
        return NULL;
    uint32_t none = 0;
    if (!__atomic_compare_exchange_n(&table->magic, &none, MAGIC, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST) &&
        none != MAGIC) {
        munmap(table, sizeof *table);
        errno = EPROTO;
        return NULL;
    }
    return table;
}

void x9_leases_close(x9_leases *table) { munmap(table, sizeof *table); }

/* Ends a session whose term is over; a client that is honest has known that for a while. */
static void expire(struct x9_leases *table, uint32_t number, int64_t expires)
{
    if (!__atomic_compare_exchange_n(&table->expires[number], &expires, 0, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST))
        return; /* renewed, or somebody else was first */
    __atomic_sub_fetch(&table->active, 1, __ATOMIC_SEQ_CST);
    __atomic_add_fetch(&table->voided, 1, __ATOMIC_RELAXED);
    signal_all(table);
}

/* No session for a while, on whichever device: to begin anew is to be of no use. */
static void refuse(struct x9_leases *table, uint32_t peer, int64_t term)
{
    if (peer)
        __atomic_store_n(&table->refused[peer % PEERS], now() + REFUSED_TERMS * term, __ATOMIC_SEQ_CST);
}

static bool has_pending(const struct session *session)
{
    bool any = load32(&session->everything);

    for (uint32_t g = 0; g < GROUPS; g++)
        any |= load64(&session->groups[g]) != 0;
    return any;
}

static void post_begin(struct session *session)
{
    int64_t none = 0;

    __atomic_compare_exchange_n(&session->oldest, &none, now(), false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);
}

static void post(struct x9_leases *table, uint32_t number, uint32_t bucket)
{
    struct session *session = &table->sessions[number];

    post_begin(session);
    __atomic_or_fetch(&session->pending[bucket / 64], UINT64_C(1) << bucket % 64, __ATOMIC_SEQ_CST);
    __atomic_or_fetch(&session->groups[bucket / 4096], UINT64_C(1) << bucket / 64 % 64, __ATOMIC_SEQ_CST);
    __atomic_add_fetch(&table->revoked, 1, __ATOMIC_RELAXED);
}

/* Whether a session has still to give up a bucket (X9_NOID: everything). Ends it if its term is over; else *until is when
 * it will be. */
static bool owes(struct x9_leases *table, uint32_t number, uint32_t bucket, int64_t *until)
{
    const struct session *session = &table->sessions[number];
    int64_t expires = load_time(&table->expires[number]);
    bool owed;

    if (!expires)
        return false;
    /* In this order: the session's thread sets sent before it clears pending. */
    if (bucket == X9_NOID)
        owed = load32(&session->everything) || load32(&session->everything_sent);
    else
        owed = (load64(&session->pending[bucket / 64]) | load64(&session->sent[bucket / 64])) >> bucket % 64 & 1;
    if (!owed)
        return false;
    if (now() > expires) {
        refuse(table, load32(&session->peer), load_time(&session->term));
        expire(table, number, expires);
        return load_time(&table->expires[number]) != 0; /* it may have been renewed this very moment: look again */
    }
    if (expires < *until)
        *until = expires;
    return true;
}

static uint64_t post_everything(struct x9_leases *table)
{
    uint64_t told = 0;

    for (uint32_t i = 0; i < SESSIONS; i++) {
        struct session *session = &table->sessions[i];
        if (!load_time(&table->expires[i]))
            continue;
        post_begin(session);
        __atomic_store_n(&session->everything, 1, __ATOMIC_SEQ_CST);
        __atomic_add_fetch(&table->revoked, 1, __ATOMIC_RELAXED);
        told |= UINT64_C(1) << i;
    }
    signal_all(table);
    return told;
}

static void wait_everything(struct x9_leases *table, uint64_t told, const struct x9_dev *dev)
{
    for (;;) {
        uint32_t seen = load32(&table->signal);
        int64_t until = now() + IDLE_NS;
        bool owed = false;
        for (uint32_t i = 0; i < SESSIONS; i++)
            owed |= (told >> i & 1) && owes(table, i, X9_NOID, &until);
        if (!owed || __atomic_load_n(&dev->stop, __ATOMIC_ACQUIRE))
            return;
        int64_t left = until - now();
        wait_signal(table, seen, left > 0 ? left + 1000000 : 1000000);
    }
}

/* Nobody gets a lease any more until x9_leases_thaw(), and all have to give up what they have. */
void x9_leases_freeze(x9_leases *table)
{
    __atomic_store_n(&table->frozen, 1, __ATOMIC_SEQ_CST);
    post_everything(table);
}

/* How many sessions have still to give something up after x9_leases_freeze(). */
uint32_t x9_leases_owed(x9_leases *table)
{
    int64_t until = INT64_MAX;
    uint32_t count = 0;

    for (uint32_t i = 0; i < SESSIONS; i++)
        count += owes(table, i, X9_NOID, &until);
    return count;
}

void x9_leases_thaw(x9_leases *table) { __atomic_store_n(&table->frozen, 0, __ATOMIC_SEQ_CST); }

static void forget_change(struct x9_leases *table, struct record *record, uint32_t slot, uint32_t bucket)
{
    /* In this order: a process that dies between the two leaves a bucket that gives no leases, and nothing worse. */
    if (record && slot < RECORDED)
        __atomic_store_n(&record->buckets[slot], 0, __ATOMIC_SEQ_CST);
    __atomic_sub_fetch(&table->changing[bucket], 1, __ATOMIC_SEQ_CST);
}

/* Undoes what a process that has died was doing. What it changed just when the first session began nobody knows, so all
 * sessions give up everything. Returns how many changes it had begun. */
uint32_t x9_leases_recover(x9_leases *table, uint32_t pid)
{
    uint32_t count = 0;
    bool died = false;

    for (uint32_t i = 0; i < RECORDS; i++) {
        struct record *record = &table->records[i];
        if (load32(&record->pid) != pid)
            continue;
        died = true; /* one that ends in good order leaves no record */
        for (uint32_t slot = 0; slot < RECORDED; slot++) {
            uint32_t bucket = load32(&record->buckets[slot]);
            if (!bucket)
                continue;
            forget_change(table, record, slot, bucket - 1);
            count++;
        }
        __atomic_store_n(&record->pid, 0, __ATOMIC_SEQ_CST);
    }
    for (uint32_t i = 0; i < SESSIONS; i++) { /* those that nobody has met since their terms were over */
        int64_t expires = load_time(&table->expires[i]);
        if (expires && now() > expires)
            expire(table, i, expires);
    }
    if (died && load32(&table->active))
        post_everything(table);
    return count;
}

/* The processes that take part, at most count of them. Returns how many. */
uint32_t x9_leases_pids(x9_leases *table, uint32_t *pids, uint32_t count)
{
    uint32_t found = 0;

    for (uint32_t i = 0; i < RECORDS && found < count; i++)
        if ((pids[found] = load32(&table->records[i].pid)))
            found++;
    return found;
}

void x9_leases_stats(x9_leases *table, x9_lease_stats *out)
{
    out->sessions = load32(&table->active);
    out->opened = load64(&table->opened);
    out->revoked = load64(&table->revoked);
    out->voided = load64(&table->voided);
}

/* --- buckets --- */

static uint64_t mix(uint64_t x) /* the finalizer of splitmix64 */
{
    x = (x ^ x >> 30) * UINT64_C(0xbf58476d1ce4e5b9);
    x = (x ^ x >> 27) * UINT64_C(0x94d049bb133111eb);
    return x ^ x >> 31;
}

uint64_t lease_key(uint64_t st_dev, uint64_t ino)
{
    uint64_t key = mix(mix(ino) + st_dev * UINT64_C(0x9e3779b97f4a7c15));

    return key ? key : 1;
}

static uint32_t bucket_of(uint64_t key) { return (uint32_t)key % BUCKETS; }

/* CRC-32 as zlib's crc32(name, value): what clients have at hand. */
static uint32_t crc32(uint32_t value, const char *name)
{
    static const uint32_t nibbles[16] = {
        0x00000000, 0x1db71064, 0x3b6e20c8, 0x26d930ac, 0x76dc4190, 0x6b6b51f4, 0x4db26158, 0x5005713c,
        0xedb88320, 0xf00f9344, 0xd6d6a3e8, 0xcb61b38c, 0x9b64c2b0, 0x86d3d2d4, 0xa00ae278, 0xbdbdf21c,
    };

    value = ~value;
    for (; *name; name++) {
        value = nibbles[(value ^ (uint8_t)*name) & 15] ^ value >> 4;
        value = nibbles[(value ^ (uint8_t)*name >> 4) & 15] ^ value >> 4;
    }
    return ~value;
}

static uint32_t bucket_of_name(uint64_t dir_key, const char *name) { return crc32((uint32_t)dir_key, name) % BUCKETS; }

/* 0: it cannot be looked at. */
static uint64_t key_of_fd(int fd)
{
    struct stat st;

    return fstatat(fd, "", &st, AT_EMPTY_PATH) ? 0 : lease_key(st.st_dev, st.st_ino);
}

uint64_t lease_fid_key(struct x9_fid *fid)
{
    uint64_t key = __atomic_load_n(&fid->lease_key, __ATOMIC_RELAXED);

    if (!key && fid->path_fd >= 0) {
        key = key_of_fd(fid->path_fd);
        __atomic_store_n(&fid->lease_key, key, __ATOMIC_RELAXED);
    }
    return key;
}

/* --- a device's session --- */

/* Whether the session in our slot is still ours: nobody else sets just this time. */
static bool alive(const struct x9_dev *dev)
{
    const struct x9_lease *lease = &dev->lease;
    uint32_t slot = __atomic_load_n(&lease->slot, __ATOMIC_ACQUIRE);
    int64_t expires = slot < SESSIONS ? load_time(&lease->table->expires[slot]) : 0;

    return expires && (expires == load_time(&lease->granted) || expires == load_time(&lease->granting));
}

bool lease_has_session(const struct x9_dev *dev) { return __atomic_load_n(&dev->lease.slot, __ATOMIC_RELAXED) < SESSIONS; }

static void keep(struct x9_call *call, uint32_t bucket)
{
    struct x9_leases *table = call->dev->lease.table;
    uint64_t bit = UINT64_C(1) << (__atomic_load_n(&call->dev->lease.slot, __ATOMIC_RELAXED) & 63);

    /* Without writing where the bit is there already. The count first: a change that comes to count after this sees the
     * bit, and one that is over by now has taken it away. */
    bool kept = !load32(&table->changing[bucket]) && (load64(&table->masks[bucket]) & bit);
    if (!kept) {
        __atomic_or_fetch(&table->masks[bucket], bit, __ATOMIC_SEQ_CST);
        kept = !load32(&table->changing[bucket]);
    }
    if (!kept || load32(&table->frozen) || !alive(call->dev))
        call->unleased = true;
}

/* Before a file is looked at: takes a lease on it, or notes that the reply comes without. */
void lease_file(struct x9_call *call, struct x9_fid *fid)
{
    uint64_t key;

    if (!lease_has_session(call->dev))
        return;
    if ((key = lease_fid_key(fid)))
        keep(call, bucket_of(key));
    else
        call->unleased = true;
}

/* The same for a name, before it is looked up in the directory behind fd. */
void lease_name(struct x9_call *call, int fd, const char *name)
{
    uint64_t key;

    if (!lease_has_session(call->dev))
        return;
    if ((key = key_of_fd(fd)))
        keep(call, bucket_of_name(key, name));
    else
        call->unleased = true;
}

static void end_session(struct x9_dev *dev)
{
    struct x9_lease *lease = &dev->lease;
    int64_t granted = load_time(&lease->granted);

    pthread_mutex_lock(&dev->lock); /* tell() is not to touch what may be another's from now on */
    uint32_t slot = __atomic_exchange_n(&lease->slot, X9_NOID, __ATOMIC_ACQ_REL);
    pthread_mutex_unlock(&dev->lock);
    if (slot >= SESSIONS)
        return;
    if (__atomic_compare_exchange_n(&lease->table->expires[slot], &granted, 0, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST))
        __atomic_sub_fetch(&lease->table->active, 1, __ATOMIC_SEQ_CST);
    signal_all(lease->table);
}

/* A session that somebody ended because its client did not do as it must: no other for a while. */
static bool lapsed(struct x9_dev *dev)
{
    struct x9_lease *lease = &dev->lease;

    if (!lease_has_session(dev) || alive(dev))
        return false;
    pthread_mutex_lock(&dev->lock);
    __atomic_store_n(&lease->slot, X9_NOID, __ATOMIC_RELEASE);
    pthread_mutex_unlock(&dev->lock);
    if (lease->condemned)
        return true; /* that has been counted */
    lease->refused_until = now() + REFUSED_TERMS * lease->term_ns;
    __atomic_add_fetch(&lease->voided, 1, __ATOMIC_RELAXED);
    return true;
}

static int open_session(struct x9_dev *dev)
{
    struct x9_lease *lease = &dev->lease;
    struct x9_leases *table = lease->table;
    int64_t began = now(), until = began + lease->term_ns, old = 0;
    uint32_t i;

    end_session(dev); /* who opens one has nothing left of another */
    lease->condemned = false;
    if (began < lease->refused_until || (lease->peer && began < load_time(&table->refused[lease->peer % PEERS])))
        return EAGAIN;
    pthread_mutex_lock(&dev->lock);
    bool busy = lease->poll != NULL;
    pthread_mutex_unlock(&dev->lock);
    if (busy)
        return EBUSY; /* the last session's Trevoke is about to be answered */
    int err = lease_start(dev);
    if (err)
        return err;
    for (i = 0; i < SESSIONS; i++) {
        old = load_time(&table->expires[i]);
        if (old < began &&
            __atomic_compare_exchange_n(&table->expires[i], &old, until, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST))
            break;
    }
    if (i == SESSIONS)
        return EUSERS;
    struct session *session = &table->sessions[i];
    if (!old)
        __atomic_add_fetch(&table->active, 1, __ATOMIC_SEQ_CST);
    else
        __atomic_add_fetch(&table->voided, 1, __ATOMIC_RELAXED);
    /* Bits that an earlier session left in the masks cost a revocation for nothing, once each. */
    for (uint32_t w = 0; w < WORDS; w++) {
        __atomic_store_n(&session->pending[w], 0, __ATOMIC_SEQ_CST);
        __atomic_store_n(&session->sent[w], 0, __ATOMIC_SEQ_CST);
    }
    for (uint32_t g = 0; g < GROUPS; g++)
        __atomic_store_n(&session->groups[g], 0, __ATOMIC_SEQ_CST);
    __atomic_store_n(&session->everything, 0, __ATOMIC_SEQ_CST);
    __atomic_store_n(&session->everything_sent, 0, __ATOMIC_SEQ_CST);
    __atomic_store_n(&session->oldest, 0, __ATOMIC_SEQ_CST);
    __atomic_store_n(&session->peer, lease->peer, __ATOMIC_SEQ_CST);
    __atomic_store_n(&session->term, lease->term_ns, __ATOMIC_SEQ_CST);
    __atomic_add_fetch(&table->opened, 1, __ATOMIC_RELAXED);
    pthread_mutex_lock(&dev->lock);
    lease->batch = 0, lease->unconfirmed = false, lease->debt = 0;
    pthread_mutex_unlock(&dev->lock);
    __atomic_store_n(&lease->granting, until, __ATOMIC_SEQ_CST);
    __atomic_store_n(&lease->granted, until, __ATOMIC_SEQ_CST);
    __atomic_store_n(&lease->slot, i, __ATOMIC_RELEASE);
    signal_all(table); /* who waits for what the slot's last session owed */
    return 0;
}

/* A session lives for a term from now on; or, while it has something to give up, from when it was told. So a client that
 * renews and never gives up delays others for one term and no longer. Returns ns that are left, 0: it is over. */
static int64_t renew_session(struct x9_dev *dev)
{
    struct x9_lease *lease = &dev->lease;
    struct session *session = &lease->table->sessions[lease->slot];
    int64_t at = now(), old = load_time(&lease->granted);

    if (old < at || !alive(dev))
        return 0;
    if (has_pending(session))
        post_begin(session);
    int64_t oldest = load_time(&session->oldest), until = (oldest ? oldest : at) + lease->term_ns;
    if (until <= old)
        return old - at;
    __atomic_store_n(&lease->granting, until, __ATOMIC_SEQ_CST);
    if (!__atomic_compare_exchange_n(&lease->table->expires[lease->slot], &old, until, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST))
        return 0; /* somebody has ended it this very moment */
    __atomic_store_n(&lease->granted, until, __ATOMIC_SEQ_CST);
    return until - at;
}

enum { OPEN, RENEW, CLOSE };

/* Tlease: how[4]; Rlease: ms[4] buckets[4]. */
int h_lease(struct x9_call *call)
{
    struct x9_dev *dev = call->dev;
    struct x9_lease *lease = &dev->lease;
    struct cursor c = body(call);
    uint32_t how = take32(&c);
    int64_t left = 0;
    int err = 0;

    if (!complete(&c))
        return X9_MALFORMED;
    if (!lease->table || !lease->term_ns)
        return EOPNOTSUPP;
    if (how > CLOSE)
        return EINVAL;
    lapsed(dev);
    if (how == OPEN) {
        if (!(err = open_session(dev)))
            left = lease->term_ns;
    } else if (!lease_has_session(dev)) {
        err = ESTALE;
    } else if (how == CLOSE) {
        end_session(dev);
    } else if (lease->condemned || !(left = renew_session(dev))) {
        lapsed(dev);
        err = ESTALE;
    }
    if (err)
        return err;
    uint8_t *p = reply(call, 8);
    put32(p, (uint32_t)(left / 1000000));
    put32(p + 4, BUCKETS);
    return 0;
}

/* What a client takes for giving up adds up, and is forgiven at an eighth of the time that passes. A term of it is too much. */
static void count_debt(struct x9_lease *lease, int64_t at)
{
    int64_t took = at - lease->sent_at, forgiven = (at - lease->debt_at) / 8;

    lease->debt = (lease->debt > forgiven ? lease->debt - forgiven : 0) + took;
    lease->debt_at = at;
}

/* The client has given up what the last Rrevoke named. With dev->lock held. */
static void confirm(struct x9_dev *dev)
{
    struct x9_lease *lease = &dev->lease;
    struct session *session = &lease->table->sessions[lease->slot];

    for (uint32_t i = 0; i < lease->nsent; i++)
        __atomic_and_fetch(&session->sent[lease->sent[i] / 64], ~(UINT64_C(1) << lease->sent[i] % 64), __ATOMIC_SEQ_CST);
    __atomic_store_n(&session->everything_sent, 0, __ATOMIC_SEQ_CST);
    lease->nsent = 0, lease->unconfirmed = false;
    /* What was posted since came after sent_at. */
    __atomic_store_n(&session->oldest, has_pending(session) ? lease->sent_at : 0, __ATOMIC_SEQ_CST);
    if (has_pending(session))
        post_begin(session);
    count_debt(lease, now());
}

/* Trevoke: batch[8], the last one that has been given up; stays until there is something to give up. Rrevoke: batch[8]
 * everything[1] count[4] buckets[4*n]. */
int h_revoke(struct x9_call *call)
{
    struct x9_dev *dev = call->dev;
    struct x9_lease *lease = &dev->lease;
    struct cursor c = body(call);
    uint64_t batch = take64(&c);
    int err = 0;

    if (!complete(&c))
        return X9_MALFORMED;
    if (!lease->table || lapsed(dev) || !lease_has_session(dev))
        return lease->table ? ESTALE : EOPNOTSUPP;
    pthread_mutex_lock(&dev->lock);
    if (lease->poll)
        err = EBUSY;
    else if (batch != lease->batch)
        err = EINVAL;
    else if (lease->unconfirmed)
        confirm(dev);
    bool slow = lease->debt > lease->term_ns;
    pthread_mutex_unlock(&dev->lock);
    if (slow && !err && !lease->condemned) {
        /* It is not renewed any more, and ends with its term: until then its client may use what it has. */
        lease->condemned = true;
        refuse(lease->table, lease->peer, lease->term_ns);
        lease->refused_until = now() + REFUSED_TERMS * lease->term_ns;
        __atomic_add_fetch(&lease->voided, 1, __ATOMIC_RELAXED);
    }
    if (lease->condemned)
        err = ESTALE;
    signal_all(lease->table);
    return err ? err : lease_poll_later(call);
}

/* Puts into lease->sent what is to be given up. With dev->lock held. Returns whether there is anything. */
static bool collect(struct x9_dev *dev)
{
    struct x9_lease *lease = &dev->lease;
    struct session *session = &lease->table->sessions[lease->slot];

    lease->nsent = 0;
    lease->sent_everything = load32(&session->everything);
    if (lease->sent_everything) {
        __atomic_store_n(&session->everything_sent, 1, __ATOMIC_SEQ_CST);
        __atomic_store_n(&session->everything, 0, __ATOMIC_SEQ_CST);
    }
    for (uint32_t g = 0; g < GROUPS; g++) {
        uint64_t words = load64(&session->groups[g]) ? __atomic_exchange_n(&session->groups[g], 0, __ATOMIC_SEQ_CST) : 0;
        for (uint32_t i = 0; i < 64 && words; i++) {
            if (!(words >> i & 1))
                continue;
            uint32_t w = g * 64 + i;
            uint64_t bits = load64(&session->pending[w]);
            if (lease->nsent + 64 > X9_REVOKED) { /* the rest next time */
                __atomic_or_fetch(&session->groups[g], UINT64_C(1) << i, __ATOMIC_SEQ_CST);
                continue;
            }
            __atomic_or_fetch(&session->sent[w], bits, __ATOMIC_SEQ_CST);
            __atomic_and_fetch(&session->pending[w], ~bits, __ATOMIC_SEQ_CST);
            for (; bits; bits &= bits - 1)
                lease->sent[lease->nsent++] = w * 64 + (uint32_t)__builtin_ctzll(bits);
        }
    }
    return lease->nsent || lease->sent_everything;
}

/* On the device's lease thread: answers the waiting Trevoke if there is something to say. */
static void tell(struct x9_dev *dev)
{
    struct x9_lease *lease = &dev->lease;
    uint8_t msg[X9_HEADER + 13 + 4 * X9_REVOKED], *p = msg + X9_HEADER;
    struct x9_req *poll = NULL;
    uint32_t err = 0;

    pthread_mutex_lock(&dev->lock);
    bool over = !alive(dev) || now() > load_time(&lease->granted);
    if (lease->poll && (dev_ending(dev) || lease->poll->nflushes || over))
        err = dev_ending(dev) || lease->poll->nflushes ? ECANCELED : ESTALE;
    if (lease->poll && (err || (!lease->unconfirmed && collect(dev))))
        poll = lease->poll, lease->poll = NULL;
    if (poll && !err) {
        post_begin(&lease->table->sessions[lease->slot]);
        lease->unconfirmed = true, lease->sent_at = now();
        lease->told += lease->nsent + lease->sent_everything;
        put64(p, ++lease->batch);
        p[8] = lease->sent_everything;
        put32(p + 9, 4 * lease->nsent);
        for (uint32_t i = 0; i < lease->nsent; i++)
            put32(p + 13 + 4 * i, lease->sent[i]);
        put_header(msg, X9_HEADER + 13 + 4 * lease->nsent, P9_TREVOKE + 1, poll->tag);
    }
    pthread_mutex_unlock(&dev->lock);
    if (!poll)
        return;
    if (err)
        x9_reply_errno(dev, poll, err);
    else
        x9_reply(dev, poll, msg, get32(msg));
}

/* --- changes --- */

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
            post(table, i, bucket);
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
static bool settled(struct x9_leases *table, struct x9_claim *claim, int64_t *until)
{
    bool all = true;

    for (uint32_t b = 0; b < claim->count; b++)
        for (uint32_t i = 0; i < SESSIONS && claim->told[b] >> i; i++) {
            if (!(claim->told[b] >> i & 1))
                continue;
            if (owes(table, i, claim->buckets[b], until))
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
        forget_change(table, dev->lease.record < RECORDS ? &table->records[dev->lease.record] : NULL, claim->places[i],
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
    uint64_t key = key_of_fd(dir);
    struct stat st;

    act_as_server(); /* who asks may not search the directory: that is for the handler to say */
    if (!key)
        return;
    claim(dev, c, bucket_of(key));
    claim(dev, c, bucket_of_name(key, name));
    if (!fstatat(dir, name, &st, AT_SYMLINK_NOFOLLOW))
        claim(dev, c, bucket_of(lease_key(st.st_dev, st.st_ino)));
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
        claim(dev, c, bucket_of(key));
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
    if (settled(table, claim, &until))
        return true;
    signal_all(table);
    claim->since = now();
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
            wait_everything(table, post_everything(table), dev);
    }
}

/* --- the device's lease thread --- */

static void *lease_thread(void *arg)
{
    struct x9_dev *dev = arg;
    struct x9_lease *lease = &dev->lease;

    while (!dev_stopping(dev)) {
        uint32_t seen = load32(&lease->table->signal);
        int64_t until = now() + IDLE_NS;
        tell(dev);
        pthread_mutex_lock(&dev->lock);
        for (struct x9_req **at = &lease->parked; *at;) {
            struct x9_req *req = *at;
            if (!settled(lease->table, &req->claim, &until)) {
                at = &req->next;
                continue;
            }
            *at = req->next;
            req->parked = false;
            lease->waited_ns += (uint64_t)(now() - req->claim.since);
            dev_unpark(dev, req);
        }
        if (lease_has_session(dev)) {
            /* Its end by the clock is something to be told, too. */
            int64_t expires = load_time(&lease->granted);
            if (lease->poll && expires < until)
                until = expires;
        }
        pthread_mutex_unlock(&dev->lock);
        int64_t left = until - now();
        wait_signal(lease->table, seen, left > 0 ? left + 100000 : 1000000);
    }
    return NULL;
}

/* Starts the thread, once. Returns 0 or an errno. */
int lease_start(struct x9_dev *dev)
{
    int err = 0;

    pthread_mutex_lock(&dev->lock);
    if (!dev->lease.running) {
        act_as_server(); /* a thread begins with what its maker has */
        err = pthread_create(&dev->lease.thread, NULL, lease_thread, dev);
        dev->lease.running = !err;
    }
    pthread_mutex_unlock(&dev->lock);
    return err;
}

/* Its thread is to look again. */
void lease_wake(struct x9_dev *dev)
{
    if (dev->lease.table)
        signal_all(dev->lease.table);
}

/* A new Tversion: the client begins anew, with nothing kept. */
void lease_end(struct x9_dev *dev)
{
    if (!dev->lease.table)
        return;
    lapsed(dev);
    end_session(dev);
    dev_drop_parked(dev);
}

/* Has a device take part in a table, which stays the caller's and must outlive it. Before it serves. A term of 0: its
 * client gets no leases. peer: who that is, if it may have several devices; else 0. With more devices than the table has
 * records, the rest cannot be cleaned up after: if they die, some buckets give no leases any more. */
void x9_dev_set_leases(x9_dev *dev, x9_leases *table, uint32_t term_ms, uint32_t peer)
{
    uint32_t i, none = 0;

    for (i = 0; i < RECORDS; i++, none = 0)
        if (__atomic_compare_exchange_n(&table->records[i].pid, &none, (uint32_t)getpid(), false, __ATOMIC_SEQ_CST,
                                        __ATOMIC_SEQ_CST))
            break;
    dev->lease.table = table, dev->lease.record = i, dev->lease.term_ns = (int64_t)term_ms * 1000000;
    dev->lease.peer = peer;
}

void x9_dev_lease_stats(x9_dev *dev, x9_lease_counts *out)
{
    const struct x9_lease *lease = &dev->lease;

    *out = (x9_lease_counts){0};
    if (!lease->table)
        return;
    pthread_mutex_lock(&dev->lock);
    out->sessions = alive(dev);
    out->revocations = lease->told;
    out->voided = __atomic_load_n(&lease->voided, __ATOMIC_RELAXED) + (lease_has_session(dev) && !alive(dev));
    out->waited_us = lease->waited_ns / 1000;
    out->waits = lease->waits;
    pthread_mutex_unlock(&dev->lock);
}

/* When no thread of the device runs any more. Its session stays until its term is over: the client may still be there. */
void lease_free(struct x9_dev *dev)
{
    if (dev->lease.table && dev->lease.record < RECORDS)
        __atomic_store_n(&dev->lease.table->records[dev->lease.record].pid, 0, __ATOMIC_SEQ_CST);
}
