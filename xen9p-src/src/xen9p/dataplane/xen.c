/* Grants and event channels through /dev/xen/gntdev and /dev/xen/evtchn.
 *
 * The ioctls are used directly (linux-libc-dev's xen/gntdev.h and xen/evtchn.h), so the module builds where there is
 * no Xen. Everything that the guest can write is copied once, checked, and used only from the copy (XSA-155). */
#include "x9.h"

#include <fcntl.h>
#include <sys/ioctl.h>
#include <sys/mman.h>

/* The kernel's exported headers use these without defining them. */
typedef uint16_t domid_t;
typedef uint32_t grant_ref_t;

#include <xen/evtchn.h>
#include <xen/gntdev.h>


static int say(struct x9_dev *dev, const char *what, int err)
{
    snprintf(dev->reason, sizeof dev->reason, "%s: %s", what, strerror(err));
    return err;
}

/* A grant or a port that does not work is the guest's fault, unless it was we who ran out of something. */
static int blame(int err) { return err == ENOMEM || err == EMFILE || err == ENOSPC ? err : EPROTO; }

int xen_open(struct x9_dev *dev)
{
    if (dev->gnt_fd < 0 && (dev->gnt_fd = open("/dev/xen/gntdev", O_RDWR | O_CLOEXEC)) < 0)
        return say(dev, "/dev/xen/gntdev", errno);
    if (dev->evt_fd < 0 && (dev->evt_fd = open("/dev/xen/evtchn", O_RDWR | O_CLOEXEC | O_NONBLOCK)) < 0)
        return say(dev, "/dev/xen/evtchn", errno);
    return 0;
}

static int map_grants(struct x9_dev *dev, uint32_t domid, const uint32_t *refs, uint32_t count, void **addr, uint64_t *index)
{
    size_t size = sizeof(struct ioctl_gntdev_map_grant_ref) + count * sizeof(struct ioctl_gntdev_grant_ref);
    struct ioctl_gntdev_map_grant_ref *map = calloc(1, size);

    if (!map)
        return ENOMEM;
    struct ioctl_gntdev_grant_ref *list = (struct ioctl_gntdev_grant_ref *)((char *)map + offsetof(struct ioctl_gntdev_map_grant_ref, refs));
    map->count = count;
    for (uint32_t i = 0; i < count; i++)
        list[i].domid = (domid_t)domid, list[i].ref = refs[i];
    int err = ioctl(dev->gnt_fd, IOCTL_GNTDEV_MAP_GRANT_REF, map) ? errno : 0;
    *index = map->index;
    free(map);
    if (err)
        return err;
    *addr = mmap(NULL, (size_t)count * X9_PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, dev->gnt_fd, (off_t)*index);
    if (*addr != MAP_FAILED)
        return 0;
    err = errno;
    struct ioctl_gntdev_unmap_grant_ref undo = {.index = *index, .count = count};
    ioctl(dev->gnt_fd, IOCTL_GNTDEV_UNMAP_GRANT_REF, &undo);
    *addr = NULL;
    return err;
}

static void unmap_grants(struct x9_dev *dev, void **addr, uint64_t index, uint32_t count)
{
    if (!*addr)
        return;
    munmap(*addr, (size_t)count * X9_PAGE);
    struct ioctl_gntdev_unmap_grant_ref undo = {.index = index, .count = count};
    ioctl(dev->gnt_fd, IOCTL_GNTDEV_UNMAP_GRANT_REF, &undo);
    *addr = NULL;
}

/* Returns 0 or an errno with dev->reason set; EPROTO when it is the guest's fault. Maps 1 + 2^order pages. */
int xen_map(struct x9_link *link, uint32_t domid, uint32_t ref, uint32_t port)
{
    struct x9_dev *dev = link->dev;
    uint32_t refs[1u << X9_MAX_ORDER];

    int err = map_grants(dev, domid, &ref, 1, &link->map_page, &link->page_index);
    if (err)
        return blame(say(dev, "cannot map the interface page", err));
    uint32_t order = __atomic_load_n((uint32_t *)(void *)((uint8_t *)link->map_page + X9_ORDER_OFFSET), __ATOMIC_ACQUIRE);
    if (order < 1 || order > X9_MAX_ORDER) {
        snprintf(dev->reason, sizeof dev->reason, "ring order %u is not between 1 and %u", order, X9_MAX_ORDER);
        return EPROTO;
    }
    uint32_t pages = 1u << order;
    memcpy(refs, (uint8_t *)link->map_page + X9_REFS_OFFSET, pages * sizeof *refs);
    err = map_grants(dev, domid, refs, pages, &link->map_data, &link->data_index);
    if (err)
        return blame(say(dev, "cannot map the ring", err));
    link->data_bytes = (size_t)pages * X9_PAGE;
    if (ring_init(&link->ring, link->map_page, link->map_data, order, X9_BACKEND)) {
        snprintf(dev->reason, sizeof dev->reason, "ring indices are out of range");
        return EPROTO;
    }
    struct ioctl_evtchn_bind_interdomain bind = {.remote_domain = domid, .remote_port = port};
    int local = ioctl(dev->evt_fd, IOCTL_EVTCHN_BIND_INTERDOMAIN, &bind);
    if (local < 0)
        return blame(say(dev, "cannot bind the event channel", errno));
    link->port = (uint32_t)local;
    dev->order = order;
    return 0;
}

void xen_unmap(struct x9_link *link)
{
    struct x9_dev *dev = link->dev;

    if (link->port) {
        struct ioctl_evtchn_unbind unbind = {.port = link->port};
        ioctl(dev->evt_fd, IOCTL_EVTCHN_UNBIND, &unbind);
        link->port = 0;
    }
    unmap_grants(dev, &link->map_data, link->data_index, (uint32_t)(link->data_bytes / X9_PAGE));
    unmap_grants(dev, &link->map_page, link->page_index, 1);
}

void xen_notify(struct x9_link *link)
{
    struct ioctl_evtchn_notify notify = {.port = link->port};

    /* Fails only when the guest is gone, and then nobody waits for it. */
    (void)ioctl(link->dev->evt_fd, IOCTL_EVTCHN_NOTIFY, &notify);
}

/* Takes the pending events and unmasks their ports; the caller looks at its rings after this. */
int xen_acknowledge(struct x9_dev *dev)
{
    uint32_t ports[X9_MAX_RINGS * 2];
    ssize_t n = read(dev->evt_fd, ports, sizeof ports);

    if (n < 0)
        return errno == EAGAIN || errno == EINTR ? 0 : errno;
    return write(dev->evt_fd, ports, (size_t)n) < 0 ? errno : 0;
}
