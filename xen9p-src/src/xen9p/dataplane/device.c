/* A device: its links to the peer, the reader that takes messages off them, and the pool that does what may block.
 *
 * The reader answers at once what needs no waiting (page cache, dentry cache); everything else goes to a few pool
 * threads or, for cold messages, to Python. So a slow request holds up nobody, and replies leave in any order. */
#include "msg.h"

#include <fcntl.h>
#include <poll.h>
#include <stdarg.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <time.h>

#define POOL_STACK (256u * 1024)
#define DRAIN_US 1000000u /* how long x9_dev_stop lets the requests in flight go on */
#define TAKE_BUDGET 64 /* messages of one ring before the next ring has its turn */

/* --- verdict, statistics --- */

bool dev_stopping(struct x9_dev *dev) { return __atomic_load_n(&dev->stop, __ATOMIC_ACQUIRE); }
bool dev_ending(struct x9_dev *dev) { return dev_stopping(dev) || __atomic_load_n(&dev->drain, __ATOMIC_ACQUIRE); }

static void wake(int fd)
{
    uint64_t one = 1;

    (void)!write(fd, &one, sizeof one);
}

void dev_wake(struct x9_dev *dev) { wake(dev->wake_fd); }

static void finish(struct x9_dev *dev, int verdict, const char *format, ...)
{
    va_list args;

    pthread_mutex_lock(&dev->lock);
    if (!dev->stop) { /* the first reason is the reason */
        dev->verdict = verdict;
        va_start(args, format);
        vsnprintf(dev->reason, sizeof dev->reason, format, args);
        va_end(args);
    }
    __atomic_store_n(&dev->stop, true, __ATOMIC_RELEASE);
    pthread_cond_broadcast(&dev->pool.more);
    pthread_cond_broadcast(&dev->cold.more);
    pthread_cond_broadcast(&dev->idle);
    pthread_cond_broadcast(&dev->room);
    pthread_mutex_unlock(&dev->lock);
    dev_wake(dev);
    lease_wake(dev);
    for (uint32_t i = 0; i < dev->nlinks; i++)
        if (dev->links[i]->kind == X9_STREAM)
            shutdown(dev->links[i]->wait_fd, SHUT_RDWR); /* somebody may be in send(2) to a peer that never reads */
}

/* Ends in good order: what has been taken is answered first, if that goes quickly. */
void x9_dev_stop(x9_dev *dev)
{
    __atomic_store_n(&dev->drain, true, __ATOMIC_RELEASE);
    dev_wake(dev);
    lease_wake(dev);
}

void x9_dev_fail(x9_dev *dev, const char *reason) { finish(dev, X9_PROTOCOL, "%s", reason); }
const char *x9_dev_reason(x9_dev *dev) { return dev->reason; }
uint32_t x9_dev_order(x9_dev *dev) { return dev->order; }

void dev_count_io(struct x9_dev *dev, uint64_t read, uint64_t written)
{
    if (read)
        count_shared(&dev->read_bytes, read);
    if (written)
        count_shared(&dev->written_bytes, written);
}

void x9_dev_stats(x9_dev *dev, x9_stats *out)
{
    out->requests = __atomic_load_n(&dev->requests, __ATOMIC_RELAXED);
    out->read_bytes = __atomic_load_n(&dev->read_bytes, __ATOMIC_RELAXED);
    out->written_bytes = __atomic_load_n(&dev->written_bytes, __ATOMIC_RELAXED);
    out->errors = __atomic_load_n(&dev->errors, __ATOMIC_RELAXED);
    streams_stats(dev, out);
    events_stats(dev, out);
    for (int i = 0; i < 128; i++)
        out->by_type[i] = __atomic_load_n(&dev->by_type[i], __ATOMIC_RELAXED);
    pthread_mutex_lock(&dev->fids.lock);
    out->fids = dev->fids.count;
    pthread_mutex_unlock(&dev->fids.lock);
    pthread_mutex_lock(&dev->lock);
    out->in_flight = dev->nlive;
    out->bytes = dev->nbytes;
    out->throttled = dev->throttled;
    out->throttled_us = dev->throttled_ns / 1000;
    for (uint32_t i = 0; i < dev->nlinks; i++)
        if (dev->links[i]->held_since) /* what waits now counts too: it may be for long */
            out->throttled_us += limits_waited(dev->links[i]->held_since) / 1000;
    out->queued = 0;
    for (const struct x9_req *req = dev->live; req; req = req->next_live)
        out->queued += !req->running;
    pthread_mutex_unlock(&dev->lock);
}

/* Whether no request is in flight but the one that asks, and a Trevoke, which just waits. */
bool dev_idle(struct x9_dev *dev)
{
    pthread_mutex_lock(&dev->lock);
    bool idle = dev->nlive == (dev->lease.poll != NULL);
    pthread_mutex_unlock(&dev->lock);
    return idle;
}

/* --- sending --- */

void link_notify(struct x9_link *link)
{
    if (link->kind == X9_XEN)
        xen_notify(link);
    else if (link->kind == X9_MEMORY)
        wake(link->notify_fd);
}

static int out_of_range(struct x9_link *link)
{
    finish(link->dev, X9_PROTOCOL, "a ring index of the peer is out of range");
    return EPROTO;
}

static int too_long(struct x9_link *link)
{
    finish(link->dev, X9_SYSTEM, "a reply is longer than its ring");
    return EMSGSIZE;
}

void deadline_in(struct timespec *at, long ms)
{
    clock_gettime(CLOCK_MONOTONIC, at);
    at->tv_nsec += ms * 1000000;
    at->tv_sec += at->tv_nsec / 1000000000;
    at->tv_nsec %= 1000000000;
}

static uint64_t signs(struct x9_dev *dev) { return __atomic_load_n(&dev->signs, __ATOMIC_ACQUIRE); }

/* Called with dev->lock held. */
static void pass_sign_on(struct x9_dev *dev)
{
    __atomic_add_fetch(&dev->signs, 1, __ATOMIC_RELEASE);
    if (dev->room_waiters)
        pthread_cond_broadcast(&dev->room);
}

/* Waits, on the reader, until the ring has room for len bytes; called with tx_lock held. A peer that never reads its
 * replies stops its own device here, and no other. Returns 0, or an errno when the device is ending. */
int link_wait_room(struct x9_link *link, uint32_t len)
{
    for (;;) {
        int64_t room = ring_writable(&link->ring);

        if (room < 0)
            return out_of_range(link);
        if (room >= len)
            return 0;
        if (len >= link->ring.half)
            return too_long(link);
        if (dev_ending(link->dev))
            return ECANCELED;
        if (dev_paused(link->dev)) { /* a peer that does not read its replies must not keep others from a snapshot */
            dev_stand_still(link->dev);
            continue;
        }
        int err = dev_wait_events(link->dev, 100);
        if (err) {
            finish(link->dev, X9_SYSTEM, "waiting for events: %s", strerror(err));
            return err;
        }
    }
}

/* The same on another thread: takes tx_lock, and never waits with it, for only the reader hears the peer's events.
 * Returns 0 with tx_lock held, or an errno without. */
static int lock_with_room(struct x9_link *link, uint32_t len)
{
    struct x9_dev *dev = link->dev;
    struct timespec until;

    for (;;) {
        uint64_t before = signs(dev);
        pthread_mutex_lock(&link->tx_lock);
        int64_t room = ring_writable(&link->ring);
        if (room >= len)
            return 0;
        pthread_mutex_unlock(&link->tx_lock);
        if (room < 0)
            return out_of_range(link);
        if (len >= link->ring.half)
            return too_long(link);
        if (dev_stopping(dev))
            return ECANCELED;
        deadline_in(&until, 100);
        pthread_mutex_lock(&dev->lock);
        __atomic_add_fetch(&dev->room_waiters, 1, __ATOMIC_RELAXED); /* the reader looks without the lock */
        if (!dev->stop && dev->signs == before)
            pthread_cond_timedwait(&dev->room, &dev->lock, &until);
        __atomic_sub_fetch(&dev->room_waiters, 1, __ATOMIC_RELAXED);
        pthread_mutex_unlock(&dev->lock);
    }
}

static int stream_send(struct x9_link *link, const uint8_t *msg, uint32_t len)
{
    while (len) {
        ssize_t n = send(link->wait_fd, msg, len, MSG_NOSIGNAL);

        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0) {
            finish(link->dev, X9_HANGUP, "the peer closed the connection");
            return EPIPE;
        }
        msg += n, len -= (uint32_t)n;
    }
    return 0;
}

static int link_send(struct x9_link *link, const uint8_t *msg, uint32_t len, bool reader)
{
    int err;

    if (reader || link->kind == X9_STREAM)
        pthread_mutex_lock(&link->tx_lock);
    else if ((err = lock_with_room(link, len)))
        return err;
    if (link->kind == X9_STREAM) {
        err = stream_send(link, msg, len);
    } else if (!(err = reader ? link_wait_room(link, len) : 0)) {
        ring_poke(&link->ring, 0, msg, len);
        ring_publish(&link->ring, len);
    }
    pthread_mutex_unlock(&link->tx_lock);
    if (!err)
        link_notify(link);
    return err;
}

static uint32_t size_limit(const struct x9_dev *dev) { return dev->msize ? dev->msize : X9_MIN_MSIZE; }

/* Whether the peer may soon find too little room for its requests. Linux's frontend sleeps badly then: a writer that waits
 * for room is not woken by our events (net/9p/trans_xen.c). Half of it is room for at least one of the largest messages. */
static bool is_tight(const struct x9_link *link)
{
    return ring_room(&link->ring) < link->ring.half / 2;
}

/* A Twrite's data is no longer needed where it lies. */
static void release_data(struct x9_req *req)
{
    if (ring_release(&req->link->ring, req->held) < size_limit(req->link->dev))
        link_notify(req->link); /* no reply may follow soon, and whoever waits for room is to see it now */
    req->held = NULL;
}

static void mark_replying(struct x9_dev *dev, struct x9_req *req)
{
    pthread_mutex_lock(&dev->lock);
    req->replying = true;
    if (dev->parked)
        pthread_cond_broadcast(&dev->idle); /* what it had to do is done */
    pthread_mutex_unlock(&dev->lock);
}

void call_send(struct x9_call *call, uint8_t *msg, uint32_t len)
{
    if (call->unleased)
        msg[4] |= X9_UNLEASED;
    obs_done(call->dev, &call->note, msg, len);
    limits_settle(call->dev, &call->promised, len);
    if (call->req)
        mark_replying(call->dev, call->req);
    link_send(call->link, msg, len, !call->req);
}

static void encode_errno(struct x9_dev *dev, uint8_t msg[11], uint16_t tag, uint32_t err)
{
    count_shared(&dev->errors, 1);
    obs_errno(dev, err);
    put_header(msg, 11, P9_RLERROR, tag);
    put32(msg + X9_HEADER, err);
}

/* --- requests in flight --- */

static void push(struct x9_queue *queue, struct x9_req *req)
{
    req->next = NULL;
    *queue->tail = req;
    queue->tail = &req->next;
    pthread_cond_signal(&queue->more);
}

static struct x9_req *pop(struct x9_queue *queue)
{
    struct x9_req *req = queue->head;

    if (req && !(queue->head = req->next))
        queue->tail = &queue->head;
    return req;
}

static bool unqueue(struct x9_queue *queue, struct x9_req *req)
{
    for (struct x9_req **at = &queue->head; *at; at = &(*at)->next)
        if (*at == req) {
            if (!(*at = req->next))
                queue->tail = at;
            return true;
        }
    return false;
}

/* The request that a tag means: one whose reply is leaving only if there is no other. */
static struct x9_req *find_live(struct x9_dev *dev, uint16_t tag)
{
    struct x9_req *leaving = NULL;

    for (struct x9_req *req = dev->live; req; req = req->next_live)
        if (req->tag == tag) {
            if (!req->replying)
                return req;
            leaving = req;
        }
    return leaving;
}

static void req_free(struct x9_req *req)
{
    if (req->claim.made)
        lease_release(req->link->dev, &req->claim);
    if (req->held)
        ring_release(&req->link->ring, req->held);
    if (req->note.record) /* never answered */
        obs_end(req->link->dev, &req->note, req->type, false);
    if (req->promised)
        limits_settle(req->link->dev, &req->promised, 0);
    free(req->flushes);
    free(req->msg);
    free(req);
}

static void unlive(struct x9_dev *dev, struct x9_req *req)
{
    struct x9_req **at = &dev->live;

    while (*at != req)
        at = &(*at)->next_live;
    *at = req->next_live;
    dev->nlive--;
    dev->nbytes -= req->weight;
    pthread_cond_broadcast(&dev->idle);
}

/* The reply is out: forget the request and answer the Tflush requests that waited for it. */
static void req_done(struct x9_dev *dev, struct x9_req *req)
{
    uint8_t msg[X9_HEADER];

    pthread_mutex_lock(&dev->lock);
    while (req->nflushes) {
        struct x9_flush flush = req->flushes[--req->nflushes];
        pthread_mutex_unlock(&dev->lock);
        put_header(msg, sizeof msg, P9_TFLUSH + 1, flush.tag);
        link_send(flush.link, msg, sizeof msg, false);
        pthread_mutex_lock(&dev->lock);
    }
    /* Last: a Tversion waits until nothing of the old session can follow its reply. */
    unlive(dev, req);
    pthread_mutex_unlock(&dev->lock);
    req_free(req);
}

/* Waits a little for the requests in flight to end, on the reader. Returns whether there are any left. */
static bool dev_drain_step(struct x9_dev *dev)
{
    struct timespec until;

    pthread_mutex_lock(&dev->lock);
    if (dev->nlive && !dev->stop) {
        deadline_in(&until, 20);
        pthread_cond_timedwait(&dev->idle, &dev->lock, &until);
    }
    bool busy = dev->nlive && !dev->stop;
    pass_sign_on(dev); /* the reader is here and not at its events: let the others look */
    pthread_mutex_unlock(&dev->lock);
    return busy;
}

/* Waits for all of them (Tversion). Returns 0, or an errno when the device is ending. */
int dev_drain(struct x9_dev *dev)
{
    while (!dev_ending(dev) && dev_drain_step(dev))
        if (dev_paused(dev))
            dev_stand_still(dev);
    return dev_ending(dev) ? ECANCELED : 0;
}

/* --- the pool --- */

static void answer(struct x9_call *call, int result)
{
    struct x9_dev *dev = call->dev;

    if (result > 0) {
        call->out_len = 11;
        encode_errno(dev, call->out, call->tag, (uint32_t)result);
    }
    if (result >= 0)
        call_send(call, call->out, call->out_len);
    else if (result == X9_MALFORMED)
        finish(dev, X9_PROTOCOL, "message of type %u with tag %u does not parse", call->type, call->tag);
}

/* Takes a Twrite's data out of the ring: a slow write must keep no other from coming. It counts among the bytes in flight
 * already, so this needs no bound of its own. Without memory it stays there. */
static void take_out(struct x9_req *req)
{
    uint8_t *whole = malloc(req->size);

    if (!whole)
        return;
    memcpy(whole, req->msg, X9_WRITE_HEADER);
    ring_copy(&req->link->ring, req->data_pos, whole + X9_WRITE_HEADER, req->size - X9_WRITE_HEADER);
    free(req->msg);
    req->msg = whole;
    release_data(req);
}

/* The same for those that no thread has begun, the oldest first, until there is room enough. On the reader. */
static void make_room(struct x9_link *link)
{
    struct x9_dev *dev = link->dev;

    pthread_mutex_lock(&dev->lock);
    for (struct x9_req *req = dev->pool.head; req && is_tight(link); req = req->next)
        if (req->held && req->link == link)
            take_out(req);
    pthread_mutex_unlock(&dev->lock);
}

/* Has a request wait until other clients have given up what it changes. What it has of a ring it gives back: others
 * need the room. If it cannot wait, it is answered. */
static void park(struct x9_dev *dev, struct x9_req *req)
{
    int err = lease_start(dev);

    if (!err && req->held) {
        take_out(req);
        if (req->held)
            err = ENOMEM;
    }
    if (err) {
        obs_start(&req->note);
        x9_reply_errno(dev, req, (uint32_t)err);
        return;
    }
    pthread_mutex_lock(&dev->lock);
    req->running = false, req->parked = true;
    req->next = dev->lease.parked;
    dev->lease.parked = req;
    dev->lease.waits++;
    pthread_mutex_unlock(&dev->lock);
    lease_wake(dev);
}

static void *pool_thread(void *arg)
{
    struct x9_dev *dev = arg;
    struct x9_call space = {0}, *call = &space;

    pthread_mutex_lock(&dev->lock);
    while (!dev->stop) {
        struct x9_req *req = dev->parked ? NULL : pop(&dev->pool);
        if (!req) {
            dev->nidle++;
            pthread_cond_wait(&dev->pool.more, &dev->lock);
            dev->nidle--;
            continue;
        }
        dev->nqueued--;
        req->running = true;
        pthread_mutex_unlock(&dev->lock);
        if (req->stream.fid) {
            fs_write_back(&req->stream);
            req_free(req);
            pthread_mutex_lock(&dev->lock);
            continue;
        }
        if (!lease_may_begin(dev, &req->claim, req->msg, req->size)) {
            park(dev, req);
            pthread_mutex_lock(&dev->lock);
            continue;
        }
        if (req->held)
            take_out(req);
        call->dev = dev, call->link = req->link, call->msg = req->msg, call->size = req->size;
        call->tag = req->tag, call->type = req->type, call->may_block = true;
        call->req = req;
        call->unleased = req->claim.made && req->claim.shared && lease_has_session(dev);
        call->data_in_ring = req->held != NULL, call->data_pos = req->data_pos;
        call->note = req->note, req->note = (struct x9_note){0};
        call->promised = req->promised, req->promised = 0;
        obs_start(&call->note);
        int result = fs_handle(call);
        lease_done(dev, &req->claim, req->msg, req->size);
        if (req->held)
            release_data(req); /* before the reply: the peer may be waiting for room */
        answer(call, result);
        obs_end(dev, &call->note, call->type, false);
        req_done(dev, req);
        fs_write_back(&call->stream);
        pthread_mutex_lock(&dev->lock);
    }
    pthread_mutex_unlock(&dev->lock);
    free(call->big);
    return NULL;
}

/* Sees to it that one more request finds a thread, as far as there may be more. Called with dev->lock held. */
static void grow_pool(struct x9_dev *dev)
{
    pthread_attr_t attr;

    /* A thread that has been signalled counts as idle until it has the lock; so do those that it is to take. */
    if (dev->nqueued < dev->nidle || dev->npool >= dev->config.pool_threads)
        return;
    act_as_server(); /* a thread begins with what its maker has */
    pthread_attr_init(&attr);
    pthread_attr_setstacksize(&attr, POOL_STACK);
    if (!pthread_create(&dev->threads[dev->npool], &attr, pool_thread, dev))
        dev->npool++;
    pthread_attr_destroy(&attr);
}

/* Backpressure: the messages behind this one stay in the ring. On the reader, with dev->lock held. */
static void wait_for_place(struct x9_dev *dev, uint64_t weight)
{
    int64_t began = (int64_t)now_ns();
    struct timespec until;

    dev->throttled++;
    while (limits_full(dev, weight) && !dev_ending(dev)) {
        if (dev_paused(dev)) { /* this request has not begun */
            pthread_mutex_unlock(&dev->lock);
            dev_stand_still(dev);
            pthread_mutex_lock(&dev->lock);
            continue;
        }
        deadline_in(&until, 20);
        pthread_cond_timedwait(&dev->idle, &dev->lock, &until);
        pass_sign_on(dev);
    }
    dev->throttled_ns += limits_waited(began);
}

enum where { TO_POOL, TO_PYTHON, TO_PARK, TO_POLL };

/* Queues a private copy of the message; the data of a Twrite stays in the ring until it is written. Returns an errno
 * for the guest, or X9_DONE. */
static int later(struct x9_call *call, enum where where)
{
    struct x9_dev *dev = call->dev;
    struct x9_req *req = calloc(1, sizeof *req);

    uint32_t private = call->data_in_ring ? X9_WRITE_HEADER : call->size;

    if (!req || !(req->msg = malloc(private)) ||
        (call->data_in_ring && !(req->held = call->held = ring_hold(&call->link->ring, call->size)))) {
        if (req)
            req_free(req);
        return ENOMEM;
    }
    memcpy(req->msg, call->msg, private);
    req->data_pos = call->data_pos;
    req->tag = call->tag, req->type = call->type, req->size = call->size, req->link = call->link;
    pthread_mutex_lock(&dev->lock);
    req->weight = limits_weight(call);
    if (limits_full(dev, req->weight))
        wait_for_place(dev, req->weight);
    if (where == TO_POOL) {
        grow_pool(dev);
        if (!dev->npool) {
            pthread_mutex_unlock(&dev->lock);
            call->held = NULL;
            if (req->held)
                ring_release(&req->link->ring, req->held), req->held = NULL, call->data_in_ring = false;
            req_free(req);
            return EAGAIN;
        }
        dev->nqueued++;
    }
    req->note = call->note, call->note = (struct x9_note){0};
    req->promised = call->promised, call->promised = 0;
    req->claim = call->claim, call->claim = (struct x9_claim){0};
    dev->nbytes += req->weight;
    req->next_live = dev->live;
    dev->live = req;
    dev->nlive++;
    if (where == TO_POOL || where == TO_PYTHON)
        push(where == TO_PYTHON ? &dev->cold : &dev->pool, req);
    req->running = where == TO_PARK || where == TO_POLL;
    if (where == TO_POLL)
        dev->lease.poll = req;
    pthread_mutex_unlock(&dev->lock);
    if (where == TO_PARK)
        park(dev, req);
    else if (where == TO_POLL)
        lease_wake(dev);
    return X9_DONE;
}

/* A Trevoke stays until there is something to say. */
int lease_poll_later(struct x9_call *call) { return later(call, TO_POLL); }

/* What was parked may begin. With dev->lock held. */
void dev_unpark(struct x9_dev *dev, struct x9_req *req)
{
    if (!fs_is_cold(req->type)) {
        grow_pool(dev);
        dev->nqueued++;
    }
    push(fs_is_cold(req->type) ? &dev->cold : &dev->pool, req);
}

/* What is parked has not begun, and does not any more: it is answered, as everything that a guest asks. */
void dev_cancel_parked(struct x9_dev *dev)
{
    pthread_mutex_lock(&dev->lock);
    struct x9_req *all = dev->lease.parked, *req;
    dev->lease.parked = NULL;
    for (req = all; req; req = req->next)
        req->running = true, req->parked = false;
    pthread_mutex_unlock(&dev->lock);
    while ((req = all)) {
        all = req->next;
        obs_start(&req->note);
        x9_reply_errno(dev, req, ECANCELED);
    }
}

/* Has the pool start the writeback that a write on the reader asked for. If that cannot be, nothing is lost. */
static void write_back_later(struct x9_call *call)
{
    struct x9_dev *dev = call->dev;
    struct x9_req *req = calloc(1, sizeof *req);

    if (!req) {
        fid_put(call->stream.fid);
        call->stream.fid = NULL;
        return;
    }
    req->stream = call->stream;
    call->stream.fid = NULL;
    pthread_mutex_lock(&dev->lock);
    grow_pool(dev);
    dev->nqueued++;
    push(&dev->pool, req);
    pthread_mutex_unlock(&dev->lock);
}

/* --- for Python's threads --- */

/* Blocks for the next cold message; NULL when the device is ending. */
x9_req *x9_next_cold(x9_dev *dev)
{
    struct x9_req *req;

    for (;;) {
        req = NULL;
        pthread_mutex_lock(&dev->lock);
        while (!dev->stop && (dev->parked || !(req = pop(&dev->cold))))
            pthread_cond_wait(&dev->cold.more, &dev->lock);
        if (req)
            req->running = true;
        pthread_mutex_unlock(&dev->lock);
        if (!req || lease_may_begin(dev, &req->claim, req->msg, req->size))
            break;
        park(dev, req);
    }
    if (req)
        obs_start(&req->note);
    return req;
}

void x9_reply(x9_dev *dev, x9_req *req, const uint8_t *msg, uint32_t len)
{
    bool unleased = req->claim.made && req->claim.shared && lease_has_session(dev);
    uint8_t marked[64]; /* what changes something has short replies */

    lease_done(dev, &req->claim, req->msg, req->size);
    if (unleased && len <= sizeof marked) {
        memcpy(marked, msg, len);
        marked[4] |= X9_UNLEASED;
        msg = marked;
    }
    obs_done(dev, &req->note, msg, len);
    limits_settle(dev, &req->promised, len);
    mark_replying(dev, req);
    link_send(req->link, msg, len, false);
    obs_end(dev, &req->note, req->type, false);
    req_done(dev, req);
}

void x9_reply_errno(x9_dev *dev, x9_req *req, uint32_t err)
{
    uint8_t msg[11];

    encode_errno(dev, msg, req->tag, err);
    x9_reply(dev, req, msg, sizeof msg);
}

x9_fid *x9_fid_get(x9_dev *dev, uint32_t num) { return fids_get(&dev->fids, num); }
void x9_fid_put(x9_fid *fid) { fid_put(fid); }
int x9_fid_clunk(x9_dev *dev, uint32_t num) { return fids_drop(&dev->fids, num); }

/* Makes num a fid of the export's root. Returns 0 or an errno. */
int x9_fid_attach(x9_dev *dev, uint32_t num, uint32_t uid)
{
    int fd = fcntl(dev->config.root_fd, F_DUPFD_CLOEXEC, 0);

    if (fd < 0)
        return errno;
    struct x9_fid *fid = fid_new(num, fd, S_IFDIR, uid);
    if (fid)
        events_add(dev, X9_SAW_ATTACH, fid, 0, 0, false);
    return fid ? fids_add(&dev->fids, fid) : ENOMEM;
}

/* --- Tflush --- */

#define LATE_MOST 1024u

/* Cancels what still waits, or lets Rflush follow the reply of what runs (a system call on a file ends by itself). With no
 * such request, all has been answered. Returns an errno for the guest, 0 (reply in out), or X9_DONE. */
static int flush_now(struct x9_call *call, uint16_t old)
{
    struct x9_dev *dev = call->dev;
    int result = 0;

    struct x9_req *gone = NULL;
    pthread_mutex_lock(&dev->lock);
    struct x9_req *req = find_live(dev, old);
    if (req && !req->running) {
        if (req->parked) {
            struct x9_req **at = &dev->lease.parked;
            while (*at != req)
                at = &(*at)->next;
            *at = req->next;
        } else if (fs_is_cold(req->type)) {
            unqueue(&dev->cold, req);
        } else {
            unqueue(&dev->pool, req);
            dev->nqueued--;
        }
        unlive(dev, req);
        gone = req;
    } else if (req) {
        /* It runs: its own reply first, then Rflush. */
        struct x9_flush *more = realloc(req->flushes, (req->nflushes + 1) * sizeof *more);
        result = more && req->nflushes < dev->config.limits.max_queued ? X9_DONE : ENOMEM;
        if (more)
            req->flushes = more;
        if (result == X9_DONE)
            more[req->nflushes++] = (struct x9_flush){call->tag, call->link};
    }
    bool poll = req && req == dev->lease.poll;
    pthread_mutex_unlock(&dev->lock);
    if (poll)
        lease_wake(dev);
    if (gone)
        req_free(gone);
    put_header(call->out, X9_HEADER, P9_TFLUSH + 1, call->tag);
    call->out_len = X9_HEADER;
    return result;
}

/* The request may lie unread in another ring: it was put there before the Tflush, but rings have no order among
 * themselves. Then Rflush has to wait until the reader is past what lies there now. Returns whether it does. */
static bool flush_late(struct x9_call *call, uint16_t old)
{
    struct x9_dev *dev = call->dev;
    struct x9_late late = {.tag = call->tag, .old = old, .link = call->link};
    bool unread = false;

    for (uint32_t i = 0; i < dev->nlinks; i++) {
        struct x9_link *link = dev->links[i];
        int64_t have = link == call->link || link->kind == X9_STREAM ? 0 : ring_readable(&link->ring);
        late.until[i] = link->ring.rx_pos + (have > 0 ? (uint32_t)have : 0);
        unread = unread || have > 0;
    }
    if (!unread || dev->nlate >= LATE_MOST)
        return false;
    struct x9_late *more = realloc(dev->late, (dev->nlate + 1) * sizeof *more);
    if (!more)
        return false;
    dev->late = more;
    more[dev->nlate++] = late;
    return true;
}

static bool is_past(const struct x9_dev *dev, const struct x9_late *late)
{
    for (uint32_t i = 0; i < dev->nlinks; i++)
        if (dev->links[i] != late->link && (int32_t)(dev->links[i]->ring.rx_pos - late->until[i]) < 0)
            return false;
    return true;
}

static void answer_late(struct x9_call *call)
{
    struct x9_dev *dev = call->dev;
    uint32_t kept = 0;

    for (uint32_t i = 0; i < dev->nlate; i++) {
        struct x9_late late = dev->late[i];
        if (!is_past(dev, &late)) {
            dev->late[kept++] = late;
            continue;
        }
        call->type = P9_TFLUSH, call->tag = late.tag, call->link = late.link;
        answer(call, flush_now(call, late.old));
    }
    dev->nlate = kept;
}

static int flush(struct x9_call *call)
{
    struct x9_dev *dev = call->dev;

    if (call->size != X9_HEADER + 2)
        return X9_MALFORMED;
    uint16_t old = get16(call->msg + X9_HEADER);
    pthread_mutex_lock(&dev->lock);
    const struct x9_req *req = find_live(dev, old);
    bool here = req && !req->replying;
    pthread_mutex_unlock(&dev->lock);
    return !here && dev->nlinks > 1 && flush_late(call, old) ? X9_DONE : flush_now(call, old);
}

/* --- the reader --- */

#define SLOW_PAUSE 4u /* times as long as what was slow has taken */
#define LEAST_SLOW_US 50u

/* What may have to wait, and mostly does not, takes longer to hand to another thread than to do. So the reader takes a
 * chance: while nothing else is under way, and not soon after it was slow. Then slow ones keep the reader for a fifth of
 * its time at the most, whatever the disk does. */
bool chance_begins(struct x9_dev *dev) { return now_us() >= dev->slow_until && dev_idle(dev); }

void chance_ends(struct x9_dev *dev, uint64_t began, uint32_t slow_us)
{
    uint64_t now = now_us();

    if (now - began > slow_us)
        dev->slow_until = now + SLOW_PAUSE * (now - began);
}

/* Does now what may have to wait, or has the pool do it. */
static int now_or_later(struct x9_call *call)
{
    struct x9_dev *dev = call->dev;

    if (!fs_is_quick(call) || !chance_begins(dev))
        return later(call, TO_POOL);
    if (!lease_may_begin(dev, &call->claim, call->msg, call->size))
        return later(call, TO_PARK);
    call->unleased = call->claim.made && call->claim.shared && lease_has_session(dev);
    uint64_t began = now_us();
    call->may_block = true;
    int result = fs_handle(call);
    call->may_block = false;
    chance_ends(dev, began, dev->config.spin_us < LEAST_SLOW_US ? LEAST_SLOW_US : dev->config.spin_us);
    lease_done(dev, &call->claim, call->msg, call->size);
    return result;
}

/* Answers one message or sees to it that somebody will. */
static void dispatch(struct x9_call *call)
{
    struct x9_dev *dev = call->dev;
    int result;

    count_shared(&dev->requests, 1);
    if (call->type < 128)
        count_shared(&dev->by_type[call->type], 1);
    if (call->type < 128 && (call->type & 1)) {
        finish(dev, X9_PROTOCOL, "message of type %u is a reply, sent to the server", call->type);
        return;
    }
    pthread_mutex_lock(&dev->lock);
    struct x9_req *other = find_live(dev, call->tag);
    bool twice = other && !other->replying;
    pthread_mutex_unlock(&dev->lock);
    if (twice) {
        finish(dev, X9_PROTOCOL, "tag %u is in use already", call->tag);
        return;
    }
    if (call->type == P9_TVERSION)
        dev->nlate = 0; /* nothing of the old session may follow Rversion */
    if (!fs_is_known(call->type))
        result = EOPNOTSUPP;
    else if (!dev->msize && call->type != P9_TVERSION)
        result = EPROTO; /* no session yet */
    else if (dev->config.readonly && fs_mutates(call->type) && !auth_takes(call))
        result = EROFS;
    else if (fs_is_cold(call->type))
        result = later(call, TO_PYTHON);
    else if (call->type == P9_TFLUSH)
        result = flush(call);
    else if (fs_wants_pool(call->type))
        result = now_or_later(call);
    else if (call->type == P9_TWRITE && !lease_may_begin(dev, &call->claim, call->msg, call->size))
        result = later(call, TO_PARK);
    else {
        call->unleased = call->claim.made && call->claim.shared && lease_has_session(dev);
        if ((result = fs_handle(call)) == X9_LATER)
            result = now_or_later(call);
        if (call->type == P9_TWRITE)
            lease_done(dev, &call->claim, call->msg, call->size);
    }
    if (call->claim.made) /* it could not even be queued */
        lease_release(dev, &call->claim);
    /* Before the reply: the peer may be waiting for room, and so one notification serves for both. */
    if (call->data_in_ring && !call->held && ring_consume(&call->link->ring, call->size))
        finish(dev, X9_SYSTEM, "out of memory");
    answer(call, result);
    if (call->stream.fid)
        write_back_later(call);
}

/* Handles one message. For a Twrite in the ring, msg is just the header. */
static void handle(struct x9_call *call)
{
    call->type = call->msg[4];
    call->tag = get16(call->msg + 5);
    call->unleased = false;
    limits_charge(call);
    obs_begin(call);
    dispatch(call);
    obs_end(call->dev, &call->note, call->type, true);
}

/* Takes at most a budget of messages off a ring. Returns how many. */
static int serve_ring(struct x9_link *link, struct x9_call *call)
{
    struct x9_dev *dev = link->dev;
    struct x9_ring *ring = &link->ring;
    int taken = 0;

    for (; taken < TAKE_BUDGET && !dev_ending(dev) && !dev_paused(dev); taken++) {
        int64_t have = ring_readable(ring);
        if (have < 0) {
            out_of_range(link);
            break;
        }
        if (!have && !taken && ring_abandoned(ring))
            finish(dev, X9_HANGUP, "the frontend went away");
        if (have < X9_HEADER)
            break;
        ring_peek(ring, 0, dev->buf, X9_HEADER);
        uint32_t size = get32(dev->buf);
        if (size < X9_HEADER || size > size_limit(dev)) {
            finish(dev, X9_PROTOCOL, "message size %u is not between %u and %u", size, X9_HEADER, size_limit(dev));
            break;
        }
        if (have < size)
            break; /* the rest is still being written */
        if (!limits_admit(link, dev->buf[4])) {
            obs_see(link, (uint32_t)have);
            if (ring_abandoned(ring))
                finish(dev, X9_HANGUP, "the frontend went away");
            break;
        }
        bool tight = is_tight(link), full = ring_room(ring) < size_limit(dev);
        if (tight)
            make_room(link);
        call->link = link, call->msg = dev->buf, call->size = size;
        call->data_in_ring = dev->buf[4] == P9_TWRITE && size >= X9_WRITE_HEADER && !tight;
        call->data_pos = ring->rx_pos + X9_WRITE_HEADER, call->held = NULL;
        ring_peek(ring, X9_HEADER, dev->buf + X9_HEADER, (call->data_in_ring ? X9_WRITE_HEADER : size) - X9_HEADER);
        obs_take(call, (uint32_t)have);
        if (!call->data_in_ring && ring_consume(ring, size))
            finish(dev, X9_SYSTEM, "out of memory");
        if (full)
            link_notify(link); /* as in release_data() */
        handle(call);
    }
    return taken;
}

static int serve_stream(struct x9_link *link, struct x9_call *call)
{
    struct x9_dev *dev = link->dev;
    uint32_t have = link->stream_have, at = 0;
    bool held = link->held_since; /* what is here comes first; the rest stays in the socket, and fills it */
    int taken = 0;

    if (!held) {
        ssize_t n = recv(link->wait_fd, link->stream_buf + have, dev->config.max_msize - have, MSG_DONTWAIT);
        if (n <= 0) {
            if (!n || (errno != EAGAIN && errno != EINTR))
                finish(dev, X9_HANGUP, "the peer closed the connection");
            return 0;
        }
        have += (uint32_t)n;
        obs_look(dev);
    }
    while (have - at >= X9_HEADER && !dev_ending(dev)) {
        uint32_t size = get32(link->stream_buf + at);
        if (size < X9_HEADER || size > size_limit(dev)) {
            finish(dev, X9_PROTOCOL, "message size %u is not between %u and %u", size, X9_HEADER, size_limit(dev));
            break;
        }
        if (have - at < size || !limits_admit(link, link->stream_buf[at + 4]))
            break;
        call->link = link, call->msg = link->stream_buf + at, call->size = size, call->data_in_ring = false;
        obs_take(call, size);
        handle(call);
        at += size, taken++;
    }
    memmove(link->stream_buf, link->stream_buf + at, have - at);
    link->stream_have = have - at;
    return taken || link->held_since ? taken : 1;
}

/* Sleeps until the peer gives a sign, somebody wakes the reader, or the time is over. Returns 0 or an errno. */
int dev_wait_events(struct x9_dev *dev, int timeout_ms)
{
    struct pollfd fds[X9_MAX_RINGS + 1];
    nfds_t n = 0;
    uint64_t count;
    int err = 0;

    fds[n++] = (struct pollfd){dev->wake_fd, POLLIN, 0};
    if (dev->evt_fd >= 0)
        fds[n++] = (struct pollfd){dev->evt_fd, POLLIN, 0};
    for (uint32_t i = 0; i < dev->nlinks; i++)
        if (dev->links[i]->kind == X9_MEMORY || (dev->links[i]->kind == X9_STREAM && !dev->links[i]->held_since && !dev->parked))
            fds[n++] = (struct pollfd){dev->links[i]->wait_fd, POLLIN, 0};
    if (poll(fds, n, timeout_ms) < 0 && errno != EINTR)
        return errno;
    if (fds[0].revents) /* whoever wakes the reader has said before what it is to see */
        (void)!read(dev->wake_fd, &count, sizeof count);
    if (dev->evt_fd >= 0 && fds[1].revents)
        err = xen_acknowledge(dev);
    for (uint32_t i = 0; i < dev->nlinks; i++)
        if (dev->links[i]->kind == X9_MEMORY)
            (void)!read(dev->links[i]->wait_fd, &count, sizeof count);
    pthread_mutex_lock(&dev->lock);
    pass_sign_on(dev);
    pthread_mutex_unlock(&dev->lock);
    return err;
}

/* Serves until the device ends; call it without the GIL. Returns X9_STOPPED, X9_HANGUP, X9_PROTOCOL or X9_SYSTEM. */
int x9_dev_run(x9_dev *dev)
{
    struct x9_call *call = calloc(1, sizeof *call);
    struct x9_spin spin = {0};

    if (!call)
        finish(dev, X9_SYSTEM, "out of memory");
    else
        call->dev = dev;
    obs_look(dev);
    pthread_mutex_lock(&dev->lock);
    dev->serving = true;
    pthread_mutex_unlock(&dev->lock);
    while (!dev_ending(dev)) {
        int taken = 0;

        if (dev_paused(dev)) {
            dev_stand_still(dev);
            continue; /* the device may be ending, and the sign for that is used up */
        }

        dev->held_until = 0;
        for (uint32_t i = 0; i < dev->nlinks; i++) {
            struct x9_link *link = dev->links[i];
            taken += link->kind == X9_STREAM ? serve_stream(link, call) : serve_ring(link, call);
        }
        if (dev->nlate)
            answer_late(call);
        if (taken) {
            spin_found(&spin, dev->config.spin_us);
            if (__atomic_load_n(&dev->room_waiters, __ATOMIC_RELAXED))
                dev_wait_events(dev, 0);
            continue;
        }
        obs_look(dev);
        if (!dev->held_until && spin_on(&spin, dev->config.spin_us))
            continue;
        int err = dev_wait_events(dev, limits_pause(dev));
        if (err)
            finish(dev, X9_SYSTEM, "waiting for events: %s", strerror(err));
        obs_look(dev);
    }
    for (uint64_t until = now_us() + DRAIN_US; !dev_stopping(dev) && now_us() < until && dev_drain_step(dev);)
        ;
    finish(dev, X9_STOPPED, "stopped");
    pthread_mutex_lock(&dev->lock);
    dev->serving = false;
    pthread_mutex_unlock(&dev->lock);
    for (uint32_t i = 0; i < dev->npool; i++)
        pthread_join(dev->threads[i], NULL);
    dev->npool = 0;
    if (dev->lease.running)
        pthread_join(dev->lease.thread, NULL);
    dev->lease.running = false;
    if (call)
        free(call->big);
    free(call);
    return dev->verdict;
}

/* --- making and ending --- */

x9_dev *x9_dev_new(const x9_config *config)
{
    pthread_condattr_t clock;
    struct stat st;
    struct x9_dev *dev = calloc(1, sizeof *dev);

    if (!dev)
        return NULL;
    dev->config = *config;
    if (dev->config.pool_threads > sizeof dev->threads / sizeof *dev->threads)
        dev->config.pool_threads = sizeof dev->threads / sizeof *dev->threads;
    dev->gnt_fd = dev->evt_fd = -1;
    dev->lease.slot = X9_NOID;
    dev->wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    dev->buf = malloc(config->max_msize);
    pthread_mutex_init(&dev->lock, NULL);
    pthread_mutex_init(&dev->locks.lock, NULL);
    pthread_condattr_init(&clock);
    pthread_condattr_setclock(&clock, CLOCK_MONOTONIC);
    pthread_cond_init(&dev->pool.more, &clock);
    pthread_cond_init(&dev->cold.more, &clock);
    pthread_cond_init(&dev->idle, &clock);
    pthread_cond_init(&dev->room, &clock);
    pthread_condattr_destroy(&clock);
    dev->pool.tail = &dev->pool.head;
    dev->cold.tail = &dev->cold.head;
    if (dev->wake_fd < 0 || !dev->buf || fids_init(&dev->fids, config->limits.max_fids) || fstat(config->root_fd, &st)) {
        x9_dev_free(dev);
        return NULL;
    }
    dev->root_dev = st.st_dev, dev->root_ino = st.st_ino;
    x9_dev_set_limits(dev, &config->limits);
    obs_init(dev);
    return dev;
}

static struct x9_link *add_link(struct x9_dev *dev, enum x9_kind kind)
{
    struct x9_link *link = dev->nlinks < X9_MAX_RINGS ? calloc(1, sizeof *link) : NULL;

    if (!link)
        return NULL;
    link->dev = dev, link->kind = kind, link->wait_fd = link->notify_fd = -1;
    pthread_mutex_init(&link->tx_lock, NULL);
    dev->links[dev->nlinks++] = link;
    return link;
}

/* The fd stays the caller's to close, after x9_dev_free. Returns 0 or an errno. */
int x9_dev_add_stream(x9_dev *dev, int fd)
{
    struct x9_link *link = add_link(dev, X9_STREAM);

    if (!link || !(link->stream_buf = malloc(dev->config.max_msize)))
        return ENOMEM;
    link->wait_fd = fd;
    return 0;
}

/* A reply must never fill more than half of its ring half, so that reads can be in flight side by side. */
static void clamp_msize(struct x9_dev *dev, uint32_t order)
{
    uint32_t most = UINT32_C(1) << (order + 10);

    if (dev->config.max_msize > most)
        dev->config.max_msize = most;
}

int x9_dev_add_memory_ring(x9_dev *dev, uint8_t *page, uint8_t *data, uint32_t order, int wait_fd, int notify_fd)
{
    struct x9_link *link = add_link(dev, X9_MEMORY);

    if (!link)
        return ENOMEM;
    link->wait_fd = wait_fd, link->notify_fd = notify_fd;
    dev->order = order;
    clamp_msize(dev, order);
    return ring_init(&link->ring, page, data, order, X9_BACKEND);
}

int x9_dev_open_xen(x9_dev *dev) { return xen_open(dev); }

int x9_dev_add_xen_ring(x9_dev *dev, uint32_t domid, uint32_t ref, uint32_t port)
{
    int err = xen_open(dev);
    struct x9_link *link = err ? NULL : add_link(dev, X9_XEN);

    if (err)
        return err;
    if (!link)
        return ENOMEM;
    if (!(err = xen_map(link, domid, ref, port)))
        clamp_msize(dev, dev->order);
    return err;
}

/* After x9_dev_run has returned and every Python thread has left x9_next_cold. */
void x9_dev_free(x9_dev *dev)
{
    struct x9_req *req;

    while ((req = pop(&dev->pool)))
        if (req->stream.fid) { /* jobs of our own are not among the live requests */
            fid_put(req->stream.fid);
            req_free(req);
        }
    while ((req = dev->live)) {
        dev->live = req->next_live;
        req_free(req);
    }
    for (uint32_t i = 0; i < dev->nlinks; i++) {
        struct x9_link *link = dev->links[i];
        if (link->kind == X9_XEN)
            xen_unmap(link);
        if (link->ring.held_tail)
            ring_free(&link->ring);
        pthread_mutex_destroy(&link->tx_lock);
        free(link->stream_buf);
        free(link);
    }
    lease_free(dev);
    users_free(dev);
    obs_free(dev);
    events_free(dev);
    if (dev->fids.buckets)
        fids_free(&dev->fids);
    if (dev->evt_fd >= 0)
        close(dev->evt_fd);
    if (dev->gnt_fd >= 0)
        close(dev->gnt_fd);
    if (dev->wake_fd >= 0)
        close(dev->wake_fd);
    free(dev->late);
    free(dev->buf);
    free(dev);
}
