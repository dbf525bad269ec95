/* Shares a ring from a guest's user space: pages from /dev/xen/gntalloc, an event channel from /dev/xen/evtchn.
 *
 * Source: linux-libc-dev's xen/gntalloc.h and xen/evtchn.h; layout of the ring: xen.git docs/misc/9pfs.pandoc. */
#include "front.h"

#include <fcntl.h>
#include <sys/ioctl.h>
#include <sys/mman.h>

/* The kernel's exported headers use these without defining them. */
typedef uint16_t domid_t;
typedef uint32_t grant_ref_t;

#include <xen/evtchn.h>
#include <xen/gntalloc.h>


static int failed(char *reason, size_t size, const char *what)
{
    int err = errno;

    snprintf(reason, size, "%s", what);
    return err ? err : EIO;
}

/* Pages that domid may map and write, with their references; index is what mmap(2) and the notification take. */
static int share(int fd, uint32_t domid, uint32_t count, uint32_t *refs, uint8_t **addr, uint64_t *index)
{
    size_t size = offsetof(struct ioctl_gntalloc_alloc_gref, gref_ids) + count * sizeof *refs;
    struct ioctl_gntalloc_alloc_gref *alloc = calloc(1, size > sizeof *alloc ? size : sizeof *alloc);

    if (!alloc)
        return ENOMEM;
    alloc->domid = (uint16_t)domid;
    alloc->flags = GNTALLOC_FLAG_WRITABLE;
    alloc->count = count;
    int err = ioctl(fd, IOCTL_GNTALLOC_ALLOC_GREF, alloc) ? errno : 0;
    if (!err) {
        memcpy(refs, (uint8_t *)alloc + offsetof(struct ioctl_gntalloc_alloc_gref, gref_ids), count * sizeof *refs);
        *index = alloc->index;
        void *at = mmap(NULL, (size_t)count * X9_PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, (off_t)alloc->index);
        if (at == MAP_FAILED) {
            err = errno;
            struct ioctl_gntalloc_dealloc_gref undo = {.index = alloc->index, .count = count};
            ioctl(fd, IOCTL_GNTALLOC_DEALLOC_GREF, &undo);
        } else {
            *addr = at;
        }
    }
    free(alloc);
    return err;
}

/* When this process ends, however it does, the order in the interface page becomes 0 and the backend gets an event. */
static int announce_end(struct x9_front *front, uint64_t index)
{
    struct ioctl_gntalloc_unmap_notify notify = {
        .index = index + X9_ORDER_OFFSET,
        .action = UNMAP_NOTIFY_CLEAR_BYTE | UNMAP_NOTIFY_SEND_EVENT,
        .event_channel_port = front->xen.port,
    };
    return ioctl(front->xen.gnt_fd, IOCTL_GNTALLOC_SET_UNMAP_NOTIFY, &notify) ? errno : 0;
}

static int open_xen(struct x9_front *front, uint32_t domid, uint32_t order, char *reason, size_t size)
{
    uint32_t refs[1u << X9_MAX_ORDER], pages = 1u << order;
    uint64_t page_index, data_index;

    front->xen.gnt_fd = open("/dev/xen/gntalloc", O_RDWR | O_CLOEXEC);
    if (front->xen.gnt_fd < 0)
        return failed(reason, size, "/dev/xen/gntalloc");
    front->wait_fd = front->notify_fd = open("/dev/xen/evtchn", O_RDWR | O_CLOEXEC | O_NONBLOCK);
    if (front->wait_fd < 0)
        return failed(reason, size, "/dev/xen/evtchn");
    struct ioctl_evtchn_bind_unbound_port bind = {.remote_domain = domid};
    int port = ioctl(front->wait_fd, IOCTL_EVTCHN_BIND_UNBOUND_PORT, &bind);
    if (port < 0)
        return failed(reason, size, "cannot make an event channel");
    front->xen.port = (uint32_t)port;
    if ((errno = share(front->xen.gnt_fd, domid, 1, &front->xen.ref, &front->xen.page, &page_index)))
        return failed(reason, size, "cannot share a page");
    if ((errno = share(front->xen.gnt_fd, domid, pages, refs, &front->xen.data, &data_index)))
        return failed(reason, size, "cannot share the pages of a ring");
    front->xen.pages = pages;
    memset(front->xen.page, 0, X9_PAGE);
    memcpy(front->xen.page + X9_ORDER_OFFSET, &order, sizeof order);
    memcpy(front->xen.page + X9_REFS_OFFSET, refs, pages * sizeof *refs);
    if ((errno = announce_end(front, page_index)))
        return failed(reason, size, "cannot announce the end of the ring");
    if ((errno = ring_init(&front->ring, front->xen.page, front->xen.data, order, X9_FRONTEND)))
        return failed(reason, size, "ring order");
    return 0;
}

/* A ring of 2^order pages that domid may map, and an event channel that it may bind. NULL with *err and reason (a buffer
 * of size bytes) set. ENOSPC: the guest's limit of pages to share (xen_gntalloc.limit) is reached. */
x9_front *x9_front_new_xen(uint32_t domid, uint32_t order, int *err, char *reason, size_t size)
{
    struct x9_front *front = calloc(1, sizeof *front);

    *err = ENOMEM;
    snprintf(reason, size, "a ring");
    if (!front)
        return NULL;
    front->wait_fd = front->xen.gnt_fd = -1;
    *err = order < 1 || order > X9_MAX_ORDER ? EINVAL : open_xen(front, domid, order, reason, size);
    if (!*err)
        return front;
    front_xen_close(front);
    free(front);
    return NULL;
}

uint32_t x9_front_ref(x9_front *front) { return front->xen.ref; }
uint32_t x9_front_port(x9_front *front) { return front->xen.port; }

int front_xen_acknowledge(struct x9_front *front)
{
    uint32_t ports[4];
    ssize_t n = read(front->wait_fd, ports, sizeof ports);

    if (n < 0)
        return errno == EAGAIN || errno == EINTR ? 0 : errno;
    return write(front->wait_fd, ports, (size_t)n) < 0 ? errno : 0;
}

void front_xen_notify(struct x9_front *front)
{
    struct ioctl_evtchn_notify notify = {.port = front->xen.port};

    (void)ioctl(front->wait_fd, IOCTL_EVTCHN_NOTIFY, &notify);
}

/* The pages go first: the event that says so needs its channel. */
void front_xen_close(struct x9_front *front)
{
    if (front->xen.page)
        munmap(front->xen.page, X9_PAGE);
    if (front->xen.data)
        munmap(front->xen.data, (size_t)front->xen.pages * X9_PAGE);
    if (front->xen.gnt_fd >= 0)
        close(front->xen.gnt_fd);
    if (front->wait_fd >= 0)
        close(front->wait_fd);
}
