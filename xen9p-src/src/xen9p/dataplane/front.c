/* The frontend's half of a ring: whole messages out, whole messages in. Used by the Python client, on rings in memory
 * and on rings that a guest shares (front_xen.c). */
#include "x9.h"

#include <poll.h>

#include "front.h"

x9_front *x9_front_new(uint8_t *page, uint8_t *data, uint32_t order, int wait_fd, int notify_fd)
{
    struct x9_front *front = calloc(1, sizeof *front);

    if (front && ring_init(&front->ring, page, data, order, X9_FRONTEND)) {
        free(front);
        return NULL;
    }
    if (front)
        front->wait_fd = wait_fd, front->notify_fd = notify_fd, front->xen.gnt_fd = -1;
    return front;
}

void x9_front_free(x9_front *front)
{
    if (front->xen.gnt_fd >= 0)
        front_xen_close(front);
    if (front->ring.held_tail)
        ring_free(&front->ring);
    free(front);
}

int x9_front_fd(x9_front *front) { return front->wait_fd; }

static int await(struct x9_front *front, int timeout_ms)
{
    struct pollfd fd = {front->wait_fd, POLLIN, 0};
    uint64_t count;
    int n = poll(&fd, 1, timeout_ms);

    if (n < 0)
        return errno == EINTR ? 0 : errno;
    if (!n)
        return ETIMEDOUT;
    if (front->xen.gnt_fd >= 0)
        return front_xen_acknowledge(front);
    (void)!read(front->wait_fd, &count, sizeof count);
    return 0;
}

static void notify(struct x9_front *front)
{
    uint64_t one = 1;

    if (front->xen.gnt_fd >= 0)
        front_xen_notify(front);
    else
        (void)!write(front->notify_fd, &one, sizeof one);
}

/* Returns 0, EMSGSIZE (can never fit), ETIMEDOUT, or EPROTO (the backend's index is out of range). With a timeout of 0
 * it does not wait: after ETIMEDOUT the descriptor becomes readable when it is worth another try. */
int x9_front_send(x9_front *front, const uint8_t *msg, uint32_t len, int timeout_ms)
{
    int64_t room;

    if (len >= front->ring.half)
        return EMSGSIZE;
    while ((room = ring_writable(&front->ring)) < len) {
        int err = room < 0 ? EPROTO : await(front, timeout_ms);
        if (err)
            return err;
    }
    ring_poke(&front->ring, 0, msg, len);
    ring_publish(&front->ring, len);
    notify(front);
    return 0;
}

/* Returns the message's size in bytes, or a negative errno as above. */
int64_t x9_front_recv(x9_front *front, uint8_t *buf, uint32_t cap, int timeout_ms)
{
    for (;;) {
        int64_t have = ring_readable(&front->ring);
        uint8_t header[4];

        if (have < 0)
            return -EPROTO;
        if (have >= X9_HEADER) {
            ring_peek(&front->ring, 0, header, sizeof header);
            uint32_t size = get32(header);
            if (size < X9_HEADER || size > front->ring.half)
                return -EPROTO;
            if (size > cap)
                return -EMSGSIZE;
            if (have >= size) {
                ring_peek(&front->ring, 0, buf, size);
                put32(buf, size);
                ring_consume(&front->ring, size);
                notify(front); /* the backend may be waiting for room */
                return size;
            }
        }
        int err = await(front, timeout_ms);
        if (err)
            return -err;
    }
}
