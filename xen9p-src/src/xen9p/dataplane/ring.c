/* One half of a ring pair: indices, barriers and copies.
 *
 * Source: xen.git docs/misc/9pfs.pandoc, public/io/9pfs.h and io/ring.h. The interface page holds in_cons @0, in_prod @4,
 * out_cons @64, out_prod @68; the first half of the data area is `in` (to the frontend), the second `out`. Indices
 * run free and are masked with half - 1. */
#include "x9.h"

static uint32_t load(const uint32_t *index) { return __atomic_load_n(index, __ATOMIC_ACQUIRE); }

uint64_t x9_ring_data_bytes(uint32_t order) { return UINT64_C(4096) << order; }

/* Returns 0, or EINVAL when the shared indices contradict each other. */
int ring_init(struct x9_ring *ring, uint8_t *page, uint8_t *data, uint32_t order, enum x9_side side)
{
    uint32_t *index = (uint32_t *)(void *)page;
    uint32_t *in_cons = index, *in_prod = index + 1, *out_cons = index + 16, *out_prod = index + 17;

    if (order < 1 || order > X9_MAX_ORDER)
        return EINVAL;
    ring->half = UINT32_C(1) << (order + 11);
    ring->order = page + X9_ORDER_OFFSET;
    if (side == X9_BACKEND) {
        ring->tx_prod = in_prod, ring->tx_cons = in_cons, ring->tx_data = data;
        ring->rx_prod = out_prod, ring->rx_cons = out_cons, ring->rx_data = data + ring->half;
    } else {
        ring->tx_prod = out_prod, ring->tx_cons = out_cons, ring->tx_data = data + ring->half;
        ring->rx_prod = in_prod, ring->rx_cons = in_cons, ring->rx_data = data;
    }
    pthread_mutex_init(&ring->held_lock, NULL);
    ring->held = NULL, ring->held_tail = &ring->held;
    /* A worker that takes over from a dead one goes on where that one stopped. */
    ring->tx_pos = load(ring->tx_prod);
    ring->rx_pos = ring->rx_given = load(ring->rx_cons);
    return ring_readable(ring) < 0 || ring_writable(ring) < 0 ? EINVAL : 0;
}

/* Bytes that can be read, or -1 when the peer's index is out of range. */
int64_t ring_readable(const struct x9_ring *ring)
{
    uint32_t have = load(ring->rx_prod) - ring->rx_pos;

    return have > ring->half ? -1 : (int64_t)have;
}

/* Bytes that can be written, or -1 when the peer's index is out of range. One byte always stays free, because
 * QEMU takes an exactly full ring for an empty one. */
int64_t ring_writable(const struct x9_ring *ring)
{
    uint32_t used = ring->tx_pos - load(ring->tx_cons);

    if (used > ring->half)
        return -1;
    return used == ring->half ? 0 : (int64_t)(ring->half - used - 1);
}

/* Whether the frontend has ended without a word: its kernel then clears this byte, and sends an event. */
bool ring_abandoned(const struct x9_ring *ring) { return !__atomic_load_n(ring->order, __ATOMIC_ACQUIRE); }

static int span(uint8_t *data, uint32_t half, uint32_t pos, uint32_t len, struct iovec iov[2])
{
    uint32_t at = pos & (half - 1), first = half - at < len ? half - at : len;

    iov[0] = (struct iovec){data + at, first};
    iov[1] = (struct iovec){data, len - first};
    return first == len ? 1 : 2;
}

/* At a position and not at the reader's: that may have moved on. */
int ring_rx_iov(const struct x9_ring *ring, uint32_t pos, uint32_t len, struct iovec iov[2])
{
    return span(ring->rx_data, ring->half, pos, len, iov);
}

int ring_tx_iov(const struct x9_ring *ring, uint32_t skip, uint32_t len, struct iovec iov[2])
{
    return span(ring->tx_data, ring->half, ring->tx_pos + skip, len, iov);
}

/* Copies what is at a position, without consuming it. */
void ring_copy(const struct x9_ring *ring, uint32_t pos, uint8_t *to, uint32_t len)
{
    struct iovec iov[2];

    ring_rx_iov(ring, pos, len, iov);
    memcpy(to, iov[0].iov_base, iov[0].iov_len);
    memcpy(to + iov[0].iov_len, iov[1].iov_base, iov[1].iov_len);
}

/* The same from the reader's position on; the caller has checked ring_readable(). */
void ring_peek(const struct x9_ring *ring, uint32_t skip, uint8_t *to, uint32_t len)
{
    ring_copy(ring, ring->rx_pos + skip, to, len);
}

/* Called with held_lock held. The peer may overwrite what lies before the first stretch that is not done. */
static void give_back(struct x9_ring *ring)
{
    uint32_t kept = 0;

    for (struct x9_held *held; (held = ring->held) && held->done; free(held))
        if (!(ring->held = held->next))
            ring->held_tail = &ring->held;
    for (struct x9_held *held = ring->held; held; held = held->next)
        kept += held->len;
    __atomic_store_n(&ring->rx_given, ring->rx_pos - kept, __ATOMIC_RELAXED);
    /* Release: our reads of the data come before the peer may overwrite it. */
    __atomic_store_n(ring->rx_cons, ring->rx_pos - kept, __ATOMIC_RELEASE);
}

static struct x9_held *hold(struct x9_ring *ring, uint32_t len, bool done)
{
    struct x9_held *held = malloc(sizeof *held);

    if (!held)
        return NULL;
    *held = (struct x9_held){len, done, NULL};
    *ring->held_tail = held;
    ring->held_tail = &held->next;
    ring->rx_pos += len;
    return held;
}

/* Takes len bytes and leaves them in the ring until ring_release(). NULL, and nothing taken, without memory. */
struct x9_held *ring_hold(struct x9_ring *ring, uint32_t len)
{
    pthread_mutex_lock(&ring->held_lock);
    struct x9_held *held = hold(ring, len, false);
    pthread_mutex_unlock(&ring->held_lock);
    return held;
}

static uint32_t room_after(const struct x9_ring *ring, uint32_t given)
{
    uint32_t used = load(ring->rx_prod) - given;

    return used < ring->half ? ring->half - used : 0;
}

/* Bytes that the peer can still put there, as it sees the ring: what is held takes room. From any thread. */
uint32_t ring_room(const struct x9_ring *ring)
{
    return room_after(ring, __atomic_load_n(&ring->rx_given, __ATOMIC_RELAXED));
}

/* Callable from any thread. Returns the room that there was before, for a peer that found too little may be waiting. */
uint32_t ring_release(struct x9_ring *ring, struct x9_held *held)
{
    pthread_mutex_lock(&ring->held_lock);
    uint32_t given = ring->rx_given;
    held->done = true;
    give_back(ring);
    /* The peer puts a message and then looks for room; we give room and then look for messages: one of us sees the other. */
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    uint32_t room = room_after(ring, given);
    pthread_mutex_unlock(&ring->held_lock);
    return room;
}

/* Takes len bytes and gives them back, as soon as all before them is. Returns 0 or ENOMEM. */
int ring_consume(struct x9_ring *ring, uint32_t len)
{
    int err = 0;

    pthread_mutex_lock(&ring->held_lock);
    if (ring->held)
        err = hold(ring, len, true) ? 0 : ENOMEM;
    else
        ring->rx_pos += len;
    if (!err)
        give_back(ring);
    pthread_mutex_unlock(&ring->held_lock);
    return err;
}

void ring_free(struct x9_ring *ring)
{
    while (ring->held) {
        struct x9_held *held = ring->held;
        ring->held = held->next;
        free(held);
    }
    pthread_mutex_destroy(&ring->held_lock);
}

/* Writes behind the published index; the caller has checked ring_writable(). */
void ring_poke(struct x9_ring *ring, uint32_t skip, const uint8_t *from, uint32_t len)
{
    struct iovec iov[2];

    ring_tx_iov(ring, skip, len, iov);
    memcpy(iov[0].iov_base, from, iov[0].iov_len);
    memcpy(iov[1].iov_base, from + iov[0].iov_len, iov[1].iov_len);
}

void ring_publish(struct x9_ring *ring, uint32_t len)
{
    ring->tx_pos += len;
    __atomic_store_n(ring->tx_prod, ring->tx_pos, __ATOMIC_RELEASE);
}
