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
#include "lease.h"

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
        keep(call, lease_bucket(key));
    else
        call->unleased = true;
}

/* The same for a name, before it is looked up in the directory behind fd. */
void lease_name(struct x9_call *call, int fd, const char *name)
{
    uint64_t key;

    if (!lease_has_session(call->dev))
        return;
    if ((key = lease_fd_key(fd)))
        keep(call, lease_bucket_of_name(key, name));
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
    leases_signal(lease->table);
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
    lease->refused_until = lease_now() + REFUSED_TERMS * lease->term_ns;
    __atomic_add_fetch(&lease->voided, 1, __ATOMIC_RELAXED);
    return true;
}

static int open_session(struct x9_dev *dev)
{
    struct x9_lease *lease = &dev->lease;
    struct x9_leases *table = lease->table;
    int64_t began = lease_now(), until = began + lease->term_ns, old = 0;
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
    leases_signal(table); /* who waits for what the slot's last session owed */
    return 0;
}

/* A session lives for a term from now on; or, while it has something to give up, from when it was told. So a client that
 * renews and never gives up delays others for one term and no longer. Returns ns that are left, 0: it is over. */
static int64_t renew_session(struct x9_dev *dev)
{
    struct x9_lease *lease = &dev->lease;
    struct session *session = &lease->table->sessions[lease->slot];
    int64_t at = lease_now(), old = load_time(&lease->granted);

    if (old < at || !alive(dev))
        return 0;
    if (leases_pending(session))
        leases_post_begin(session);
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
    __atomic_store_n(&session->oldest, leases_pending(session) ? lease->sent_at : 0, __ATOMIC_SEQ_CST);
    if (leases_pending(session))
        leases_post_begin(session);
    count_debt(lease, lease_now());
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
        leases_refuse(lease->table, lease->peer, lease->term_ns);
        lease->refused_until = lease_now() + REFUSED_TERMS * lease->term_ns;
        __atomic_add_fetch(&lease->voided, 1, __ATOMIC_RELAXED);
    }
    if (lease->condemned)
        err = ESTALE;
    leases_signal(lease->table);
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
    bool over = !alive(dev) || lease_now() > load_time(&lease->granted);
    if (lease->poll && (dev_ending(dev) || lease->poll->nflushes || over))
        err = dev_ending(dev) || lease->poll->nflushes ? ECANCELED : ESTALE;
    if (lease->poll && (err || (!lease->unconfirmed && collect(dev))))
        poll = lease->poll, lease->poll = NULL;
    if (poll && !err) {
        leases_post_begin(&lease->table->sessions[lease->slot]);
        lease->unconfirmed = true, lease->sent_at = lease_now();
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
    obs_start(&poll->note); /* not the reader's any more */
    if (err)
        x9_reply_errno(dev, poll, err);
    else
        x9_reply(dev, poll, msg, get32(msg));
}

/* --- the device's lease thread --- */

static void *lease_thread(void *arg)
{
    struct x9_dev *dev = arg;
    struct x9_lease *lease = &dev->lease;

    while (!dev_stopping(dev)) {
        uint32_t seen = load32(&lease->table->signal);
        int64_t until = lease_now() + IDLE_NS;
        tell(dev);
        pthread_mutex_lock(&dev->lock);
        for (struct x9_req **at = &lease->parked; *at;) {
            struct x9_req *req = *at;
            if (!lease_settled(lease->table, &req->claim, &until)) {
                at = &req->next;
                continue;
            }
            *at = req->next;
            req->parked = false;
            lease->waited_ns += (uint64_t)(lease_now() - req->claim.since);
            dev_unpark(dev, req);
        }
        if (lease_has_session(dev)) {
            /* Its end by the clock is something to be told, too. */
            int64_t expires = load_time(&lease->granted);
            if (lease->poll && expires < until)
                until = expires;
        }
        pthread_mutex_unlock(&dev->lock);
        int64_t left = until - lease_now();
        leases_wait(lease->table, seen, left > 0 ? left + 100000 : 1000000);
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
        leases_signal(dev->lease.table);
}

/* A new Tversion: the client begins anew, with nothing kept. */
void lease_end(struct x9_dev *dev)
{
    if (!dev->lease.table)
        return;
    lapsed(dev);
    end_session(dev);
    dev_cancel_parked(dev);
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
