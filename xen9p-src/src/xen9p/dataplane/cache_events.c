/* What a caching policy is told: many threads write it down, one of Python's reads it, in batches.
 *
 * Only what somebody wants is written down, so that a message costs one look at a word otherwise. The queue is bounded; what
 * does not fit is counted and lost. A path is looked up by who reads. */
#include "x9.h"

#include <sys/stat.h>

#define SLOTS 4096u

struct event {
    struct x9_fid *fid; /* a reference */
    uint32_t kind;
    bool hit;
    uint64_t offset, len;
};

struct x9_events {
    pthread_mutex_t lock;
    uint32_t head, tail;
    uint64_t lost;
    struct event slots[SLOTS];
};

static struct x9_events *queue_of(const struct x9_dev *dev) { return __atomic_load_n(&dev->events, __ATOMIC_ACQUIRE); }

/* fid: what it is about; the caller holds a reference. */
void events_add(struct x9_dev *dev, uint32_t kind, struct x9_fid *fid, uint64_t offset, uint64_t len, bool hit)
{
    if (!events_wanted(dev, kind))
        return;
    struct x9_events *queue = queue_of(dev);
    if (!queue)
        return;
    pthread_mutex_lock(&queue->lock);
    if (queue->head - queue->tail >= SLOTS) {
        queue->lost++;
    } else {
        __atomic_add_fetch(&fid->refs, 1, __ATOMIC_RELAXED);
        queue->slots[queue->head++ % SLOTS] = (struct event){fid, kind, hit, offset, len};
    }
    pthread_mutex_unlock(&queue->lock);
}

static bool take(struct x9_events *queue, struct event *event)
{
    pthread_mutex_lock(&queue->lock);
    bool found = queue->head != queue->tail;
    if (found)
        *event = queue->slots[queue->tail++ % SLOTS];
    pthread_mutex_unlock(&queue->lock);
    return found;
}

/* From now on these kinds (X9_SAW_*, together) are written down; 0 for none. From one thread. */
void x9_events_want(x9_dev *dev, uint32_t kinds)
{
    if (kinds && !dev->events) {
        struct x9_events *made = calloc(1, sizeof *made);
        if (!made)
            return; /* a policy that is told nothing does nothing */
        pthread_mutex_init(&made->lock, NULL);
        __atomic_store_n(&dev->events, made, __ATOMIC_RELEASE);
    }
    __atomic_store_n(&dev->events_wanted, kinds, __ATOMIC_RELAXED);
}

struct packed {
    uint32_t size; /* of all of it */
    uint32_t kind, format, hit;
    uint64_t offset, len;
};

/* Fills buf with events, each followed by its file's path from the export's root on. Returns how many bytes, 0 for none. */
uint32_t x9_events_read(x9_dev *dev, uint8_t *buf, uint32_t cap)
{
    struct x9_events *queue = queue_of(dev);
    char path[PATH_MAX];
    struct event event;
    uint32_t used = 0;

    while (queue && cap - used >= sizeof(struct packed) + PATH_MAX && take(queue, &event)) {
        uint32_t len = obs_path(dev, event.fid, path);
        struct packed head = {(uint32_t)sizeof head + len, event.kind, event.fid->format, event.hit, event.offset, event.len};
        memcpy(buf + used, &head, sizeof head);
        memcpy(buf + used + sizeof head, path, len);
        used += head.size;
        fid_put(event.fid);
    }
    return used;
}

void events_stats(struct x9_dev *dev, x9_stats *out)
{
    struct x9_events *queue = queue_of(dev);

    out->cache_events_lost = 0;
    if (queue) {
        pthread_mutex_lock(&queue->lock);
        out->cache_events_lost = queue->lost;
        pthread_mutex_unlock(&queue->lock);
    }
}

void events_free(struct x9_dev *dev)
{
    struct event event;

    if (!dev->events)
        return;
    while (take(dev->events, &event))
        fid_put(event.fid);
    pthread_mutex_destroy(&dev->events->lock);
    free(dev->events);
}
