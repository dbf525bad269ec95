/* Standing still for a moment, so that a snapshot of several exports is of one instant.
 *
 * While a device is paused its reader takes no message and its threads begin no request: what comes waits in the ring, and
 * what has been taken waits in its queue. It stands still when nothing that may change a file is being done any more. A
 * pause ends by itself after the time that it was given, for whoever asked for it may be gone. */
#include "x9.h"

#define MOST_MS 10000u

static int64_t paused_until(const struct x9_dev *dev) { return __atomic_load_n(&dev->paused_until, __ATOMIC_ACQUIRE); }

bool dev_paused(const struct x9_dev *dev) { return paused_until(dev); }

/* Whether a request of that type may change what a snapshot has. The others do no harm, however long they take; a lock
 * that is held by somebody else is answered at once. */
static bool may_change(uint8_t type)
{
    return fs_mutates(type) || type == P9_TLOPEN || type == P9_TCLUNK || type == P9_TREMOVE;
}

/* Called with dev->lock held. */
static void unpark(struct x9_dev *dev)
{
    dev->parked = false;
    pthread_cond_broadcast(&dev->pool.more);
    pthread_cond_broadcast(&dev->cold.more);
}

/* What has come begins its time in the ring now. */
static void see(struct x9_dev *dev)
{
    obs_look(dev);
    for (uint32_t i = 0; i < dev->nlinks; i++) {
        int64_t have = dev->links[i]->kind == X9_STREAM ? 0 : ring_readable(&dev->links[i]->ring);
        if (have > 0)
            obs_see(dev->links[i], (uint32_t)have);
    }
}

/* On the reader, between two messages: returns when the pause is over, or the device is ending. */
void dev_stand_still(struct x9_dev *dev)
{
    pthread_mutex_lock(&dev->lock);
    dev->parked = true;
    pthread_cond_broadcast(&dev->idle);
    while (dev->paused_until && !dev_ending(dev)) {
        int64_t left = dev->paused_until - (int64_t)now_ns();
        if (left <= 0) {
            __atomic_store_n(&dev->paused_until, 0, __ATOMIC_RELEASE);
            break;
        }
        pthread_mutex_unlock(&dev->lock);
        /* Whoever waits for room for a reply still needs the peer's signs. */
        int err = dev_wait_events(dev, (int)((left + 999999) / 1000000));
        if (err)
            x9_dev_fail(dev, "waiting for events failed while the device was paused");
        see(dev);
        pthread_mutex_lock(&dev->lock);
    }
    unpark(dev);
    pthread_mutex_unlock(&dev->lock);
}

/* From any thread: has the device stand still for at most so many milliseconds from now on. */
void x9_dev_pause(x9_dev *dev, uint32_t ms)
{
    pthread_mutex_lock(&dev->lock);
    __atomic_store_n(&dev->paused_until, (int64_t)now_ns() + (int64_t)(ms < MOST_MS ? ms : MOST_MS) * 1000000,
                     __ATOMIC_RELEASE);
    pthread_mutex_unlock(&dev->lock);
    dev_wake(dev);
}

/* Called with dev->lock held. */
static uint32_t unfinished(const struct x9_dev *dev)
{
    uint32_t count = dev->serving && !dev->parked; /* the reader itself may be in the middle of one */

    for (const struct x9_req *req = dev->live; req; req = req->next_live)
        count += req->running && !req->replying && may_change(req->type);
    return count;
}

/* Waits at most so many milliseconds until a paused device stands still. Returns how much is still being done: 0, it
 * does. */
uint32_t x9_dev_quiet(x9_dev *dev, uint32_t ms)
{
    struct timespec until;
    uint32_t count;

    deadline_in(&until, ms);
    pthread_mutex_lock(&dev->lock);
    while ((count = unfinished(dev)) && !dev->stop)
        if (pthread_cond_timedwait(&dev->idle, &dev->lock, &until))
            break;
    pthread_mutex_unlock(&dev->lock);
    return count;
}

/* Ends a pause. Returns whether it was still in force: if not, the device went on before this. */
int x9_dev_resume(x9_dev *dev)
{
    pthread_mutex_lock(&dev->lock);
    bool held = dev->paused_until > (int64_t)now_ns();
    __atomic_store_n(&dev->paused_until, 0, __ATOMIC_RELEASE);
    pthread_mutex_unlock(&dev->lock);
    dev_wake(dev);
    return held;
}
