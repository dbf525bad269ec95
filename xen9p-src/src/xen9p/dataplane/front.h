/* The frontend's half of a ring, and what it needs to be shared from a guest. Internal to front.c and front_xen.c. */
#ifndef X9_FRONT_H
#define X9_FRONT_H

#include "x9.h"

struct x9_front {
    struct x9_ring ring;
    int wait_fd, notify_fd; /* eventfds, borrowed; with Xen both are /dev/xen/evtchn, our own */
    struct {
        int gnt_fd; /* /dev/xen/gntalloc; -1 for a ring in memory */
        uint32_t port, ref, pages;
        uint8_t *page, *data;
    } xen;
};

int front_xen_acknowledge(struct x9_front *front);
void front_xen_notify(struct x9_front *front);
void front_xen_close(struct x9_front *front);

#endif
