/* The floor: what the rings alone cost. A 9P server that answers at once and from memory, with no filesystem behind it.
 *
 * It is built from the data plane's own ring, Xen, waiting and clock, so that the difference to a worker is what a worker
 * does between a request and its reply. It serves one directory of files read-0, read-1, ..., all of one size and content;
 * they can be walked to, opened and read, by one thread. A benchmark's part: it trusts its peer more than a worker does. */
#include "msg.h"

#include <poll.h>
#include <sys/eventfd.h>
#include <sys/stat.h>

#define FLOOR_FIDS 65536u
#define FLOOR_ROOT 1u /* what a fid is: 0 none, 1 the directory, 2 + n the file read-n */
#define FLOOR_FILE 2u
#define FLOOR_BUDGET 64
#define FLOOR_IO (512u * 1024)

static const char PREFIX[] = "read-";

typedef struct floor_server {
    struct x9_dev dev;
    struct x9_call call;
    uint64_t size;
    uint32_t files, spin_us;
    uint32_t fids[FLOOR_FIDS];
    uint8_t content[FLOOR_IO], in[FLOOR_IO];
} floor_server;

static void put_qid(uint8_t *p, uint32_t what)
{
    p[0] = what == FLOOR_ROOT ? 0x80 : 0;
    put32(p + 1, 0);
    put64(p + 5, what);
}

static int errno_reply(struct x9_call *call, int err)
{
    put_header(call->out, 11, P9_RLERROR, call->tag);
    put32(call->out + X9_HEADER, (uint32_t)err);
    call->out_len = 11;
    return 0;
}

static uint32_t *fid_of(floor_server *floor, uint32_t num) { return num < FLOOR_FIDS ? &floor->fids[num] : NULL; }

static int version(floor_server *floor, struct x9_call *call, struct cursor *c)
{
    uint32_t msize = take32(c);

    if (msize > floor->dev.config.max_msize)
        msize = floor->dev.config.max_msize;
    memset(floor->fids, 0, sizeof floor->fids);
    floor->dev.msize = msize;
    uint8_t *p = reply(call, 14);
    put32(p, msize);
    put16(p + 4, 8);
    memcpy(p + 6, "9P2000.L", 8);
    return 0;
}

static int attach(floor_server *floor, struct x9_call *call, struct cursor *c)
{
    uint32_t *fid = fid_of(floor, take32(c));

    if (!fid)
        return EMFILE;
    *fid = FLOOR_ROOT;
    put_qid(reply(call, 13), *fid);
    return 0;
}

/* What a name in the directory leads to, 0 for nothing. */
static uint32_t lookup(const floor_server *floor, const uint8_t *name, uint32_t len)
{
    uint32_t number = 0;

    if (len < sizeof PREFIX || len > sizeof PREFIX + 4 || memcmp(name, PREFIX, sizeof PREFIX - 1))
        return 0;
    for (uint32_t i = sizeof PREFIX - 1; i < len; i++) {
        if (name[i] < '0' || name[i] > '9')
            return 0;
        number = number * 10 + (uint32_t)(name[i] - '0');
    }
    return number < floor->files ? FLOOR_FILE + number : 0;
}

static int walk(floor_server *floor, struct x9_call *call, struct cursor *c)
{
    uint32_t *from = fid_of(floor, take32(c)), *to = fid_of(floor, take32(c)), what;
    uint16_t count = take16(c), len = 0;

    if (!from || !*from)
        return EBADF;
    if (!to)
        return EMFILE;
    what = *from;
    if (count > 1)
        return ENOENT;
    if (count) {
        const uint8_t *name = take_string(c, &len);
        what = name && what == FLOOR_ROOT ? lookup(floor, name, len) : 0;
        if (!what)
            return ENOENT;
    }
    *to = what;
    uint8_t *p = reply(call, 2 + 13u * count);
    put16(p, count);
    if (count)
        put_qid(p + 2, what);
    return 0;
}

static int getattr(floor_server *floor, struct x9_call *call, struct cursor *c)
{
    uint32_t *fid = fid_of(floor, take32(c));

    if (!fid || !*fid)
        return EBADF;
    uint8_t *p = reply(call, 153);
    memset(p, 0, 153);
    put64(p, 0x7ff);
    put_qid(p + 8, *fid);
    put32(p + 21, *fid == FLOOR_ROOT ? S_IFDIR | 0755 : S_IFREG | 0644);
    put64(p + 33, 1);
    put64(p + 49, *fid == FLOOR_ROOT ? 0 : floor->size);
    put64(p + 57, 4096);
    put64(p + 65, *fid == FLOOR_ROOT ? 0 : floor->size / 512);
    return 0;
}

static int lopen(floor_server *floor, struct x9_call *call, struct cursor *c)
{
    uint32_t *fid = fid_of(floor, take32(c));

    if (!fid || !*fid)
        return EBADF;
    uint8_t *p = reply(call, 17);
    put_qid(p, *fid);
    put32(p + 13, 0);
    return 0;
}

static int statfs_(struct x9_call *call)
{
    uint8_t *p = reply(call, 60);

    memset(p, 0, 60);
    put32(p, 0x01021997);
    put32(p + 4, 4096);
    put32(p + 56, 255);
    return 0;
}

static bool has_room(floor_server *floor, struct x9_link *link, uint32_t len);

/* The data go from memory into the ring by one copy, as a worker's go there from the page cache. */
static int read_(floor_server *floor, struct x9_call *call, struct cursor *c)
{
    struct x9_ring *ring = &call->link->ring;
    uint32_t *fid = fid_of(floor, take32(c));
    uint64_t offset = take64(c);
    uint32_t count = take32(c);
    struct iovec iov[2];
    uint8_t head[X9_READ_HEADER];

    if (c->bad || !fid || *fid < FLOOR_FILE)
        return EBADF;
    if (count > floor->dev.msize - X9_READ_HEADER)
        count = floor->dev.msize - X9_READ_HEADER;
    if (offset >= floor->size)
        count = 0;
    else if (count > floor->size - offset)
        count = (uint32_t)(floor->size - offset);
    if (!has_room(floor, call->link, X9_READ_HEADER + count))
        return X9_DONE;
    int parts = ring_tx_iov(ring, X9_READ_HEADER, count, iov);
    memcpy(iov[0].iov_base, floor->content, iov[0].iov_len);
    if (parts == 2)
        memcpy(iov[1].iov_base, floor->content + iov[0].iov_len, iov[1].iov_len);
    put_header(head, X9_READ_HEADER + count, P9_TREAD + 1, call->tag);
    put32(head + X9_HEADER, count);
    ring_poke(ring, 0, head, sizeof head);
    call->out_len = 0;
    ring_publish(ring, X9_READ_HEADER + count);
    return 0;
}

static int empty_reply(struct x9_call *call)
{
    reply(call, 0);
    return 0;
}

static int clunk(floor_server *floor, struct x9_call *call, struct cursor *c)
{
    uint32_t *fid = fid_of(floor, take32(c));

    if (!fid || !*fid)
        return EBADF;
    *fid = 0;
    return empty_reply(call);
}

static int handle(floor_server *floor, struct x9_call *call)
{
    struct cursor c = body(call);

    switch (call->type) {
    case P9_TREAD: return read_(floor, call, &c);
    case P9_TWALK: return walk(floor, call, &c);
    case P9_TGETATTR: return getattr(floor, call, &c);
    case P9_TLOPEN: return lopen(floor, call, &c);
    case P9_TCLUNK: return clunk(floor, call, &c);
    case P9_TVERSION: return version(floor, call, &c);
    case P9_TATTACH: return attach(floor, call, &c);
    case P9_TSTATFS: return statfs_(call);
    case P9_TREADDIR: put32(reply(call, 4), 0); return 0;
    case P9_TFLUSH:
    case P9_TFSYNC: return empty_reply(call);
    default: return EOPNOTSUPP;
    }
}

static void notify(struct x9_link *link)
{
    uint64_t one = 1;

    if (link->kind == X9_XEN)
        xen_notify(link);
    else
        (void)!write(link->notify_fd, &one, sizeof one);
}

static int wait_for_events(floor_server *floor, int timeout_ms)
{
    struct x9_dev *dev = &floor->dev;
    struct pollfd fds[X9_MAX_RINGS + 2];
    uint64_t count;
    nfds_t n = 0;

    fds[n++] = (struct pollfd){dev->wake_fd, POLLIN, 0};
    if (dev->evt_fd >= 0)
        fds[n++] = (struct pollfd){dev->evt_fd, POLLIN, 0};
    for (uint32_t i = 0; i < dev->nlinks; i++)
        if (dev->links[i]->kind == X9_MEMORY)
            fds[n++] = (struct pollfd){dev->links[i]->wait_fd, POLLIN, 0};
    if (poll(fds, n, timeout_ms) < 0 && errno != EINTR)
        return errno;
    if (fds[0].revents)
        dev->stop = true;
    for (uint32_t i = 0; i < dev->nlinks; i++)
        if (dev->links[i]->kind == X9_MEMORY)
            (void)!read(dev->links[i]->wait_fd, &count, sizeof count);
    return dev->evt_fd >= 0 ? xen_acknowledge(dev) : 0;
}

/* Waits for room for a reply; false when it is over. */
static bool has_room(floor_server *floor, struct x9_link *link, uint32_t len)
{
    int64_t room;

    while (!floor->dev.stop && (room = ring_writable(&link->ring)) < len)
        if (room < 0 || len >= link->ring.half || wait_for_events(floor, 100))
            floor->dev.stop = true;
    return !floor->dev.stop;
}

static int serve(floor_server *floor, struct x9_link *link)
{
    struct x9_ring *ring = &link->ring;
    struct x9_call *call = &floor->call;
    int taken = 0;

    for (; taken < FLOOR_BUDGET && !floor->dev.stop; taken++) {
        int64_t have = ring_readable(ring);
        if (have < 0 || (!have && !taken && ring_abandoned(ring)))
            floor->dev.stop = true;
        if (have < X9_HEADER)
            break;
        ring_peek(ring, 0, floor->in, X9_HEADER);
        uint32_t size = get32(floor->in);
        if (size < X9_HEADER || size > sizeof floor->in)
            floor->dev.stop = true;
        if (floor->dev.stop || have < size)
            break;
        ring_peek(ring, 0, floor->in, size);
        ring_consume(ring, size);
        call->link = link, call->msg = floor->in, call->size = size;
        call->type = floor->in[4], call->tag = get16(floor->in + 5);
        floor->dev.requests++;
        int err = handle(floor, call);
        if (err > 0)
            errno_reply(call, err);
        if (call->out_len && err >= 0) {
            if (!has_room(floor, link, call->out_len))
                break;
            ring_poke(ring, 0, call->out, call->out_len);
            ring_publish(ring, call->out_len);
        }
        notify(link);
    }
    return taken;
}

/* --- what Python calls --- */

floor_server *floor_new(uint64_t size, uint32_t files, uint32_t spin_us)
{
    floor_server *floor = calloc(1, sizeof *floor);

    if (!floor)
        return NULL;
    floor->size = size, floor->files = files, floor->spin_us = spin_us;
    floor->dev.gnt_fd = floor->dev.evt_fd = -1;
    floor->dev.wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    floor->dev.config.max_msize = FLOOR_IO;
    memset(floor->content, 0x5a, sizeof floor->content);
    return floor;
}

static struct x9_link *add(floor_server *floor, enum x9_kind kind)
{
    struct x9_link *link = floor->dev.nlinks < X9_MAX_RINGS ? calloc(1, sizeof *link) : NULL;

    if (link) {
        link->dev = &floor->dev, link->kind = kind;
        floor->dev.links[floor->dev.nlinks++] = link;
    }
    return link;
}

static void clamp(floor_server *floor, uint32_t order)
{
    uint32_t most = UINT32_C(1) << (order + 10);

    if (floor->dev.config.max_msize > most)
        floor->dev.config.max_msize = most;
}

int floor_add_memory(floor_server *floor, uint8_t *page, uint8_t *data, uint32_t order, int wait_fd, int notify_fd)
{
    struct x9_link *link = add(floor, X9_MEMORY);

    if (!link)
        return ENOMEM;
    link->wait_fd = wait_fd, link->notify_fd = notify_fd;
    clamp(floor, order);
    return ring_init(&link->ring, page, data, order, X9_BACKEND);
}

int floor_add_xen(floor_server *floor, uint32_t domid, uint32_t ref, uint32_t port)
{
    int err = xen_open(&floor->dev);
    struct x9_link *link = err ? NULL : add(floor, X9_XEN);

    if (!link)
        return err ? err : ENOMEM;
    if (!(err = xen_map(link, domid, ref, port)))
        clamp(floor, floor->dev.order);
    return err;
}

/* Serves until floor_stop(), or until the peer has gone. */
void floor_run(floor_server *floor)
{
    struct x9_spin spin = {0};

    while (!floor->dev.stop) {
        int taken = 0;

        for (uint32_t i = 0; i < floor->dev.nlinks; i++)
            taken += serve(floor, floor->dev.links[i]);
        if (taken) {
            spin_found(&spin, floor->spin_us);
            continue;
        }
        if (!floor->dev.stop && !spin_on(&spin, floor->spin_us) && wait_for_events(floor, -1))
            break;
    }
}

void floor_stop(floor_server *floor)
{
    uint64_t one = 1;

    (void)!write(floor->dev.wake_fd, &one, sizeof one);
}

uint64_t floor_requests(floor_server *floor) { return floor->dev.requests; }
const char *floor_reason(floor_server *floor) { return floor->dev.reason; }

void floor_free(floor_server *floor)
{
    for (uint32_t i = 0; i < floor->dev.nlinks; i++) {
        struct x9_link *link = floor->dev.links[i];
        if (link->kind == X9_XEN)
            xen_unmap(link);
        if (link->ring.held_tail)
            ring_free(&link->ring);
        free(link);
    }
    if (floor->dev.evt_fd >= 0)
        close(floor->dev.evt_fd);
    if (floor->dev.gnt_fd >= 0)
        close(floor->dev.gnt_fd);
    close(floor->dev.wake_fd);
    free(floor);
}
