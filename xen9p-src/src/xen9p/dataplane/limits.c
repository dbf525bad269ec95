/* What a peer may use: rates, before its messages are taken, and what waits or runs aside of the reader.
 *
 * A rate is a bucket that is kept as one time: up to then everything that was taken is paid for. A message is taken when
 * that time has come, and pays afterwards, so that one larger than the bucket gets through too. Until then it stays in
 * its ring, where it is the peer's own memory that it fills. Without a rate no clock is read. */
#include "x9.h"

#define BURST_NS INT64_C(500000000)         /* what was not used may be used later, for as long as this */
#define PAUSE_NS INT64_C(5000000)           /* waking up more often would cost more than it gives */
#define DEBT_NS (INT64_C(86400) * 1000000000) /* the most that is ever owed: a day */
#define MSIZES 16u                          /* of the largest messages in the pool, if max_bytes says nothing */

static bool rated(const struct x9_dev *dev)
{
    return __atomic_load_n(&dev->ops.per_second, __ATOMIC_RELAXED) ||
           __atomic_load_n(&dev->bytes.per_second, __ATOMIC_RELAXED);
}

static int64_t due(const struct x9_bucket *bucket) { return __atomic_load_n(&bucket->due, __ATOMIC_RELAXED); }

static void spend(struct x9_bucket *bucket, int64_t now, uint64_t n)
{
    uint64_t per_second = __atomic_load_n(&bucket->per_second, __ATOMIC_RELAXED);
    int64_t old = due(bucket), new;

    if (!per_second)
        return;
    do {
        new = (old < now - BURST_NS ? now - BURST_NS : old) + (int64_t)(n * 1000000000u / per_second);
        if (new > now + DEBT_NS)
            new = now + DEBT_NS;
    } while (!__atomic_compare_exchange_n(&bucket->due, &old, new, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
}

static void refund(struct x9_bucket *bucket, uint64_t n)
{
    uint64_t per_second = __atomic_load_n(&bucket->per_second, __ATOMIC_RELAXED);

    if (per_second)
        __atomic_sub_fetch(&bucket->due, (int64_t)(n * 1000000000u / per_second), __ATOMIC_RELAXED);
}

/* Nanoseconds since a time that another processor's counter may have given. */
uint64_t limits_waited(int64_t since)
{
    int64_t now = (int64_t)now_ns();

    return now > since ? (uint64_t)(now - since) : 0;
}

static void hold(struct x9_link *link, int64_t now)
{
    struct x9_dev *dev = link->dev;

    pthread_mutex_lock(&dev->lock);
    link->held_since = now;
    dev->throttled++;
    pthread_mutex_unlock(&dev->lock);
}

static void let_go(struct x9_link *link)
{
    struct x9_dev *dev = link->dev;

    pthread_mutex_lock(&dev->lock);
    dev->throttled_ns += limits_waited(link->held_since);
    link->held_since = 0;
    pthread_mutex_unlock(&dev->lock);
}

/* Whether the first message of a link may be taken. If not, dev->held_until says when to ask again. */
bool limits_admit(struct x9_link *link, uint8_t type)
{
    struct x9_dev *dev = link->dev;

    if (!rated(dev) && !link->held_since)
        return true;
    int64_t now = (int64_t)now_ns(), until = due(&dev->ops);
    /* What gives something back carries no data: it waits for its turn, and not until data is paid for. */
    if (type != P9_TFLUSH && type != P9_TCLUNK && type != P9_TVERSION && due(&dev->bytes) > until)
        until = due(&dev->bytes);
    if (until <= now) {
        if (link->held_since)
            let_go(link);
        return true;
    }
    if (!link->held_since)
        hold(link, now);
    if (!dev->held_until || until < dev->held_until)
        dev->held_until = until;
    return false;
}

/* How long the reader may sleep, in ms; -1: no rate holds anything back. */
int limits_pause(const struct x9_dev *dev)
{
    if (!dev->held_until)
        return -1;
    int64_t left = dev->held_until - (int64_t)now_ns();
    return (int)(((left < PAUSE_NS ? PAUSE_NS : left) + 999999) / 1000000);
}

/* Bytes of data that a request asks for. */
static uint32_t asked(const struct x9_call *call)
{
    if ((call->type != P9_TREAD && call->type != P9_TREADDIR) || call->size < X9_WRITE_HEADER)
        return 0;
    uint32_t count = get32(call->msg + 19), most = call->dev->msize > X9_READ_HEADER ? call->dev->msize - X9_READ_HEADER : 0;
    return count < most ? count : most;
}

/* A message has been taken. Data that it asks for is paid in advance, for many reads may be under way at once. */
void limits_charge(struct x9_call *call)
{
    struct x9_dev *dev = call->dev;

    call->promised = 0;
    if (!rated(dev))
        return;
    int64_t now = (int64_t)now_ns();
    call->promised = asked(call);
    spend(&dev->ops, now, 1);
    spend(&dev->bytes, now, (uint64_t)call->size + call->promised);
}

/* A reply of len bytes leaves, or with 0 never will: whoever was promised less pays, and who was promised more gets it back. */
void limits_settle(struct x9_dev *dev, uint32_t *promised, uint32_t len)
{
    if (!*promised && !rated(dev))
        return;
    if (len > *promised)
        spend(&dev->bytes, (int64_t)now_ns(), len - *promised);
    else
        refund(&dev->bytes, *promised - len);
    *promised = 0;
}

/* What a request binds while it waits or runs aside of the reader: itself, in memory or in the ring, and its reply. */
uint64_t limits_weight(const struct x9_call *call) { return (uint64_t)call->size + asked(call); }

/* Whether there is no room for one more request of that weight. Called with dev->lock held. */
bool limits_full(const struct x9_dev *dev, uint64_t weight)
{
    const x9_limits *limits = &dev->config.limits;
    uint64_t most = limits->max_bytes ? limits->max_bytes : (uint64_t)MSIZES * dev->config.max_msize;

    return dev->nlive >= limits->max_queued || (dev->nlive && dev->nbytes + weight > most);
}

static void set_rate(struct x9_bucket *bucket, uint64_t per_second)
{
    if (bucket->per_second == per_second)
        return;
    __atomic_store_n(&bucket->per_second, per_second, __ATOMIC_RELAXED);
    __atomic_store_n(&bucket->due, 0, __ATOMIC_RELAXED); /* what was owed at the old rate is forgiven */
}

/* From any thread, also while the device serves. What is above a new limit already stays until it ends by itself. */
void x9_dev_set_limits(x9_dev *dev, const x9_limits *limits)
{
    pthread_mutex_lock(&dev->lock);
    dev->config.limits = *limits;
    set_rate(&dev->ops, limits->ops_per_second);
    set_rate(&dev->bytes, limits->bytes_per_second);
    __atomic_store_n(&dev->max_write, limits->max_write, __ATOMIC_RELAXED);
    __atomic_store_n(&dev->stream_bytes, limits->stream_bytes, __ATOMIC_RELAXED);
    pthread_cond_broadcast(&dev->idle);
    pthread_mutex_unlock(&dev->lock);
    pthread_mutex_lock(&dev->fids.lock);
    dev->fids.max = limits->max_fids;
    pthread_mutex_unlock(&dev->fids.lock);
    dev_wake(dev); /* it may be asleep until a time that the old rate said */
}
