/* The lease table: what all devices that take part share, and what is done to it from outside of them.
 *
 * Nothing in it is waited for but by time or its futex, and no process that dies leaves it locked: all is atomic. */
#include "lease.h"

#include <fcntl.h>
#include <linux/futex.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>

void leases_signal(struct x9_leases *table)
{
    __atomic_add_fetch(&table->signal, 1, __ATOMIC_SEQ_CST);
    syscall(SYS_futex, &table->signal, FUTEX_WAKE, INT_MAX, NULL, NULL, 0);
}

void leases_wait(struct x9_leases *table, uint32_t seen, int64_t ns)
{
    struct timespec timeout = {ns / 1000000000, ns % 1000000000};

    syscall(SYS_futex, &table->signal, FUTEX_WAIT, seen, &timeout, NULL, 0);
}

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
void leases_expire(struct x9_leases *table, uint32_t number, int64_t expires)
{
    if (!__atomic_compare_exchange_n(&table->expires[number], &expires, 0, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST))
        return; /* renewed, or somebody else was first */
    __atomic_sub_fetch(&table->active, 1, __ATOMIC_SEQ_CST);
    __atomic_add_fetch(&table->voided, 1, __ATOMIC_RELAXED);
    leases_signal(table);
}

/* No session for a while, on whichever device: to begin anew is to be of no use. */
void leases_refuse(struct x9_leases *table, uint32_t peer, int64_t term)
{
    if (peer)
        __atomic_store_n(&table->refused[peer % PEERS], lease_now() + REFUSED_TERMS * term, __ATOMIC_SEQ_CST);
}

bool leases_pending(const struct session *session)
{
    bool any = load32(&session->everything);

    for (uint32_t g = 0; g < GROUPS; g++)
        any |= load64(&session->groups[g]) != 0;
    return any;
}

void leases_post_begin(struct session *session)
{
    int64_t none = 0;

    __atomic_compare_exchange_n(&session->oldest, &none, lease_now(), false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);
}

void leases_post(struct x9_leases *table, uint32_t number, uint32_t bucket)
{
    struct session *session = &table->sessions[number];

    leases_post_begin(session);
    __atomic_or_fetch(&session->pending[bucket / 64], UINT64_C(1) << bucket % 64, __ATOMIC_SEQ_CST);
    __atomic_or_fetch(&session->groups[bucket / 4096], UINT64_C(1) << bucket / 64 % 64, __ATOMIC_SEQ_CST);
    __atomic_add_fetch(&table->revoked, 1, __ATOMIC_RELAXED);
}

/* Whether a session has still to give up a bucket (X9_NOID: everything). Ends it if its term is over; else *until is when
 * it will be. */
bool leases_owes(struct x9_leases *table, uint32_t number, uint32_t bucket, int64_t *until)
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
    if (lease_now() > expires) {
        leases_refuse(table, load32(&session->peer), load_time(&session->term));
        leases_expire(table, number, expires);
        return load_time(&table->expires[number]) != 0; /* it may have been renewed this very moment: look again */
    }
    if (expires < *until)
        *until = expires;
    return true;
}

uint64_t leases_post_everything(struct x9_leases *table)
{
    uint64_t told = 0;

    for (uint32_t i = 0; i < SESSIONS; i++) {
        struct session *session = &table->sessions[i];
        if (!load_time(&table->expires[i]))
            continue;
        leases_post_begin(session);
        __atomic_store_n(&session->everything, 1, __ATOMIC_SEQ_CST);
        __atomic_add_fetch(&table->revoked, 1, __ATOMIC_RELAXED);
        told |= UINT64_C(1) << i;
    }
    leases_signal(table);
    return told;
}

void leases_wait_everything(struct x9_leases *table, uint64_t told, const struct x9_dev *dev)
{
    for (;;) {
        uint32_t seen = load32(&table->signal);
        int64_t until = lease_now() + IDLE_NS;
        bool owed = false;
        for (uint32_t i = 0; i < SESSIONS; i++)
            owed |= (told >> i & 1) && leases_owes(table, i, X9_NOID, &until);
        if (!owed || __atomic_load_n(&dev->stop, __ATOMIC_ACQUIRE))
            return;
        int64_t left = until - lease_now();
        leases_wait(table, seen, left > 0 ? left + 1000000 : 1000000);
    }
}

/* Nobody gets a lease any more until x9_leases_thaw(), and all have to give up what they have. */
void x9_leases_freeze(x9_leases *table)
{
    __atomic_store_n(&table->frozen, 1, __ATOMIC_SEQ_CST);
    leases_post_everything(table);
}

/* How many sessions have still to give something up after x9_leases_freeze(). */
uint32_t x9_leases_owed(x9_leases *table)
{
    int64_t until = INT64_MAX;
    uint32_t count = 0;

    for (uint32_t i = 0; i < SESSIONS; i++)
        count += leases_owes(table, i, X9_NOID, &until);
    return count;
}

void x9_leases_thaw(x9_leases *table) { __atomic_store_n(&table->frozen, 0, __ATOMIC_SEQ_CST); }

void leases_forget_change(struct x9_leases *table, struct record *record, uint32_t slot, uint32_t bucket)
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
            leases_forget_change(table, record, slot, bucket - 1);
            count++;
        }
        __atomic_store_n(&record->pid, 0, __ATOMIC_SEQ_CST);
    }
    for (uint32_t i = 0; i < SESSIONS; i++) { /* those that nobody has met since their terms were over */
        int64_t expires = load_time(&table->expires[i]);
        if (expires && lease_now() > expires)
            leases_expire(table, i, expires);
    }
    if (died && load32(&table->active))
        leases_post_everything(table);
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

uint32_t lease_bucket_of_name(uint64_t dir_key, const char *name) { return crc32((uint32_t)dir_key, name) % BUCKETS; }

/* 0: it cannot be looked at. */
uint64_t lease_fd_key(int fd)
{
    struct stat st;

    return fstatat(fd, "", &st, AT_EMPTY_PATH) ? 0 : lease_key(st.st_dev, st.st_ino);
}

uint64_t lease_fid_key(struct x9_fid *fid)
{
    uint64_t key = __atomic_load_n(&fid->lease_key, __ATOMIC_RELAXED);

    if (!key && fid->path_fd >= 0) {
        key = lease_fd_key(fid->path_fd);
        __atomic_store_n(&fid->lease_key, key, __ATOMIC_RELAXED);
    }
    return key;
}
