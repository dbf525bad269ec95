/* Internal to the data plane: the ring, fids, requests and devices. */
#ifndef X9_H
#define X9_H

#include <errno.h>
#include <limits.h>
#include <pthread.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#include "api.h"

/* --- 9P2000.L on the wire (diod protocol.md; Linux include/net/9p/9p.h) --- */

enum {
    P9_RLERROR = 7,
    P9_TSTATFS = 8,
    P9_TLOPEN = 12,
    P9_TLCREATE = 14,
    P9_TSYMLINK = 16,
    P9_TMKNOD = 18,
    P9_TRENAME = 20,
    P9_TREADLINK = 22,
    P9_TGETATTR = 24,
    P9_TSETATTR = 26,
    P9_TXATTRWALK = 30,
    P9_TXATTRCREATE = 32,
    P9_TREADDIR = 40,
    P9_TFSYNC = 50,
    P9_TLOCK = 52,
    P9_TGETLOCK = 54,
    P9_TLINK = 70,
    P9_TMKDIR = 72,
    P9_TRENAMEAT = 74,
    P9_TUNLINKAT = 76,
    /* Ours, of numbers that 9P2000.L and Linux leave free: lease.c. */
    P9_TLEASE = 90,
    P9_TREVOKE = 92,
    P9_TVERSION = 100,
    P9_TAUTH = 102,
    P9_TATTACH = 104,
    P9_TFLUSH = 108,
    P9_TWALK = 110,
    P9_TREAD = 116,
    P9_TWRITE = 118,
    P9_TCLUNK = 120,
    P9_TREMOVE = 122,
};

#define X9_HEADER 7u
#define X9_READ_HEADER 11u   /* Rread, Rreaddir: header and count[4] */
#define X9_IO_HEADER 24u     /* what clients take off msize for the header of a Tread or Twrite */
#define X9_WRITE_HEADER 23u  /* Twrite: header, fid[4], offset[8], count[4] */
#define X9_UNLEASED 0x80u    /* in a reply's type, to a client with a lease session: nothing of this may be kept */
#define X9_NOFID 0xffffffffu
#define X9_NOTAG 0xffffu
#define X9_MAX_WALK 16u
#define X9_NAME_MAX 255u
#define X9_MIN_MSIZE 4096u
#define X9_SMALL 8192u /* largest reply that is not file or directory data */
#define X9_FD_PATH 32u
#define X9_MAX_RINGS 8u
#define X9_MAX_ORDER 9u /* what we publish as max-ring-page-order */

static inline uint16_t get16(const uint8_t *p) { return (uint16_t)(p[0] | p[1] << 8); }
static inline uint32_t get32(const uint8_t *p)
{
    return (uint32_t)p[0] | (uint32_t)p[1] << 8 | (uint32_t)p[2] << 16 | (uint32_t)p[3] << 24;
}
static inline uint64_t get64(const uint8_t *p) { return get32(p) | (uint64_t)get32(p + 4) << 32; }
static inline void put16(uint8_t *p, uint16_t v) { p[0] = (uint8_t)v, p[1] = (uint8_t)(v >> 8); }
static inline void put32(uint8_t *p, uint32_t v) { put16(p, (uint16_t)v), put16(p + 2, (uint16_t)(v >> 16)); }
static inline void put64(uint8_t *p, uint64_t v) { put32(p, (uint32_t)v), put32(p + 4, (uint32_t)(v >> 32)); }

static inline void put_header(uint8_t *p, uint32_t size, uint8_t type, uint16_t tag)
{
    put32(p, size);
    p[4] = type;
    put16(p + 5, tag);
}

/* --- one half of a ring pair (xen.git docs/misc/9pfs, io/9pfs.h) --- */

#define X9_PAGE 4096u
#define X9_ORDER_OFFSET 128u /* in the interface page: ring_order[4], */
#define X9_REFS_OFFSET 132u  /* and the grant references of the data pages */

/* A stretch of the ring that is still being read; it is given back when all before it is. */
struct x9_held {
    uint32_t len;
    bool done;
    struct x9_held *next;
};

enum x9_side { X9_BACKEND, X9_FRONTEND };

struct x9_ring {
    uint32_t *tx_prod, *tx_cons, *rx_prod, *rx_cons; /* in the shared interface page */
    uint8_t *tx_data, *rx_data;
    uint32_t half; /* bytes a direction */
    const uint8_t *order; /* in the interface page: 0 when a frontend in user space has ended (front_xen.c) */
    /* Messages that were taken and not yet given back, in the order of the ring; empty most of the time. */
    pthread_mutex_t held_lock;
    struct x9_held *held, **held_tail;
    uint32_t rx_given; /* atomic: room up to here has been given back; the private copy of *rx_cons */
    /* The peer can write the shared copies of our own indices too, so these private ones are what counts. */
    uint32_t tx_pos, rx_pos;
};

int ring_init(struct x9_ring *ring, uint8_t *page, uint8_t *data, uint32_t order, enum x9_side side);
int64_t ring_readable(const struct x9_ring *ring);
int64_t ring_writable(const struct x9_ring *ring);
bool ring_abandoned(const struct x9_ring *ring);
void ring_copy(const struct x9_ring *ring, uint32_t pos, uint8_t *to, uint32_t len);
void ring_peek(const struct x9_ring *ring, uint32_t skip, uint8_t *to, uint32_t len);
int ring_rx_iov(const struct x9_ring *ring, uint32_t pos, uint32_t len, struct iovec iov[2]);
int ring_consume(struct x9_ring *ring, uint32_t len);
struct x9_held *ring_hold(struct x9_ring *ring, uint32_t len);
uint32_t ring_release(struct x9_ring *ring, struct x9_held *held);
uint32_t ring_room(const struct x9_ring *ring);
void ring_free(struct x9_ring *ring);
void ring_poke(struct x9_ring *ring, uint32_t skip, const uint8_t *from, uint32_t len);
int ring_tx_iov(const struct x9_ring *ring, uint32_t skip, uint32_t len, struct iovec iov[2]);
void ring_publish(struct x9_ring *ring, uint32_t len);

/* --- fids --- */

struct x9_auth;
struct x9_xattr;
struct x9_ahead;
struct x9_origin;

/* Reads of one fid in a row; streams.c. Only the reader writes it, but for what is said. */
struct x9_flow {
    uint64_t start, end;    /* end: atomic */
    bool left;              /* atomic: it has gone elsewhere, what was read ahead is for nobody */
    bool busy;              /* atomic: a thread is at work on ahead, or will be */
    struct x9_ahead *ahead; /* atomic; NULL: this is no stream. Belongs to who has busy */
};
#define X9_NOWHERE UINT64_MAX
struct x9_locks;
/* Whether there is an origin: that is known, or of no use; a read may look for it; a thread is looking. */
enum x9_origin_state { X9_ORIGIN_KNOWN, X9_ORIGIN_WANTED, X9_ORIGIN_SOUGHT };

struct x9_fid {
    uint32_t num;
    int path_fd;
    int io_fd;
    uint32_t uid;
    uint32_t format;
    uint32_t refs;
    bool plain_read, plain_write; /* RWF_NOWAIT leads nowhere here: leave it to the pool at once */
    uint64_t dir_pos;
    uint64_t dir_end; /* atomic; of a directory stream: where there was nothing more; X9_NOWHERE: nobody knows */
    uint64_t stream_end, stream_sent; /* a sequential writer: where it is, and up to where writeback has been started */
    uint64_t stream_own;     /* from where on it writes pages that nobody had before; X9_NOWHERE: nobody knows */
    uint64_t stream_dropped; /* up to where these are out of the page cache again */
    struct x9_flow flow;     /* a sequential reader; streams.c */
    uint8_t origin_state;     /* atomic; enum x9_origin_state */
    struct x9_origin *origin; /* atomic; the same file in the tree that this was cloned from, or NULL; origin.c */
    pthread_mutex_t lock; /* Tlopen's change of state, the position of a directory stream, what came for an xattr */
    struct x9_xattr *xattr; /* this fid is an extended attribute and no file; from its making to its end */
    struct x9_auth *auth;   /* it is that of a Tauth; from its making to its end */
    uint64_t lease_key;     /* atomic; 0: not asked for yet */
    struct x9_locks *locks; /* where locks that were taken through this fid are, if there were any */
    struct x9_fid *next;
};

struct x9_fids {
    pthread_mutex_t lock;
    struct x9_fid **buckets;
    uint32_t mask, count, max;
};

int fids_init(struct x9_fids *fids, uint32_t max);
void fids_clear(struct x9_fids *fids);
void fids_free(struct x9_fids *fids);
struct x9_fid *fid_new(uint32_t num, int path_fd, uint32_t format, uint32_t uid);
struct x9_fid *fids_get(struct x9_fids *fids, uint32_t num);
bool fids_has(struct x9_fids *fids, uint32_t num);
int fids_add(struct x9_fids *fids, struct x9_fid *fid);
int fids_swap(struct x9_fids *fids, struct x9_fid *old, struct x9_fid *fid);
struct x9_fid *fids_get_xattr(struct x9_fids *fids, uint32_t num);
struct x9_fid *fids_get_auth(struct x9_fids *fids, uint32_t num);
struct x9_fid *fids_take(struct x9_fids *fids, uint32_t num);
int fids_drop(struct x9_fids *fids, uint32_t num);
void fid_put(struct x9_fid *fid);

/* --- what can be seen (observe.c) --- */

/* A counter that several threads add to. */
static inline void count_shared(uint64_t *counter, uint64_t n) { __atomic_add_fetch(counter, n, __ATOMIC_RELAXED); }

enum { X9_READ = 1, X9_WRITE, X9_LOOKUP, X9_OPEN, X9_READDIR, X9_CHANGE, X9_SYNC, X9_XATTR, X9_LOCK }; /* 0: the session */
enum x9_stage { X9_RING, X9_QUEUE, X9_FILESYSTEM, X9_TOTAL };

/* [0] counts what took less than 1 us, [i] what took less than 2^i us, the last one all the rest. */
struct x9_histogram {
    uint64_t count[X9_BUCKETS], ticks;
};

struct x9_times {
    struct x9_histogram h[X9_GROUPS][X9_STAGES];
};

struct x9_record;
struct x9_trace;
struct x9_events;

/* A message's times, in ticks, and its record if it is traced. All 0: nobody wants to know. */
struct x9_note {
    uint64_t seen, taken, begun, done;
    bool queued;
    struct x9_record *record;
};

/* What lies before end in a ring has been there since then. */
struct x9_mark {
    uint32_t end;
    uint64_t since;
};
#define X9_MARKS 8u

/* --- devices --- */

enum x9_kind { X9_XEN, X9_MEMORY, X9_STREAM };

/* What a change has taken from other clients; see lease.c. */
#define X9_CLAIMED 8u /* buckets: a rename has two names, with their directories and files */
struct x9_claim {
    bool made, shared, late;
    uint32_t count, buckets[X9_CLAIMED];
    uint16_t places[X9_CLAIMED];
    uint64_t told[X9_CLAIMED];
    int64_t since;
};

/* A device's part in leases; see lease.c. */
#define X9_REVOKED 512u /* buckets in a Rrevoke: it fits the smallest msize */
struct x9_lease {
    x9_leases *table; /* NULL: nobody gets any */
    uint32_t record, peer;
    int64_t term_ns;
    uint32_t slot;             /* atomic; X9_NOID: there is no session */
    int64_t granted, granting; /* atomic: until when it is, or is about to be */
    int64_t refused_until;     /* the reader's, as is condemned: it is to be renewed no more */
    bool condemned;
    uint64_t voided;           /* atomic */
    bool running;              /* below dev->lock, as is all that follows */
    pthread_t thread;
    struct x9_req *poll, *parked;
    uint64_t batch, told, waits, waited_ns;
    bool unconfirmed, sent_everything;
    uint32_t nsent, sent[X9_REVOKED];
    int64_t sent_at, debt, debt_at;
};

/* The byte-range locks that one peer holds; see locks.c. */
struct x9_locks {
    pthread_mutex_t lock;
    struct x9_owner *owners;
    uint32_t nowners, nranges, nlinks;
};

/* A rate; see limits.c. Atomic. */
struct x9_bucket {
    uint64_t per_second; /* 0: no limit */
    int64_t due;         /* ns on the clock of now_ns() */
};

/* A way to the peer: one ring pair, or one byte stream. Replies go back on the link of their request. */
struct x9_link {
    struct x9_dev *dev;
    enum x9_kind kind;
    pthread_mutex_t tx_lock;
    struct x9_ring ring;
    int wait_fd, notify_fd; /* X9_MEMORY: eventfds; X9_STREAM: wait_fd is the stream */
    uint32_t port;          /* X9_XEN: our local event channel */
    void *map_page, *map_data;
    size_t data_bytes;
    uint64_t page_index, data_index; /* of /dev/xen/gntdev */
    uint8_t *stream_buf;
    uint32_t stream_have;
    /* The reader's: when what is in the ring was seen first. */
    struct x9_mark marks[X9_MARKS];
    uint32_t first_mark, nmarks;
    int64_t held_since; /* ns; 0: no limit holds its first message back. The reader's, changed below dev->lock */
};

/* A stretch that a sequential writer has left behind: worth writing back already. */
struct x9_stream {
    struct x9_fid *fid; /* a reference, or NULL */
    uint64_t from, to;
    struct x9_dev *dev;
    bool reading; /* it is a reader's: the next step of reading ahead and dropping behind */
};

struct x9_flush {
    uint16_t tag;
    struct x9_link *link;
};

/* A Tflush that waits for the reader to reach a place in each of the other rings. */
struct x9_late {
    uint16_t tag, old;
    struct x9_link *link;
    uint32_t until[X9_MAX_RINGS];
};

struct x9_req {
    uint16_t tag;
    uint8_t type;
    uint32_t size;
    uint8_t *msg;
    struct x9_link *link;
    struct x9_held *held; /* a Twrite whose data is still in the ring, at data_pos; msg is just its header then */
    uint32_t data_pos;
    struct x9_stream stream; /* a job of our own and no request: start writing this back */
    uint32_t promised;       /* bytes of its reply that its rate has been charged with already */
    uint64_t weight;         /* its part of dev->nbytes */
    struct x9_claim claim;
    bool parked; /* it waits for clients to give up what it changes, in dev->lease.parked */
    bool running;
    bool replying; /* its reply is leaving: the peer may use the tag again any moment */
    struct x9_flush *flushes; /* the Tflush requests that wait for this one */
    uint32_t nflushes;
    struct x9_note note;
    struct x9_req *next;      /* in its queue */
    struct x9_req *next_live; /* among all that are in flight */
};

struct x9_queue {
    struct x9_req *head, **tail;
    pthread_cond_t more;
};

struct x9_dev {
    struct x9_config config;
    struct x9_who *who; /* atomic; NULL: as if there were no mapping and no checks */
    bool act;           /* atomic: threads may have another identity than the server's */
    uint64_t root_dev, root_ino;
    uint32_t msize; /* 0 until Tversion */
    struct x9_fids fids;
    struct x9_locks locks;
    struct x9_lease lease;
    uint32_t xattr_fids, xattr_bytes, auth_fids; /* atomic */
    struct x9_link *links[X9_MAX_RINGS];
    uint32_t nlinks;
    int gnt_fd, evt_fd, wake_fd;
    uint32_t order;

    pthread_mutex_t lock; /* everything from here to the statistics */
    struct x9_queue pool, cold;
    struct x9_req *live;
    uint32_t nlive, npool, nidle, nqueued; /* nqueued: in the pool's queue */
    uint64_t nbytes; /* that live requests bind */
    uint64_t throttled, throttled_ns;
    pthread_cond_t idle; /* nlive fell */
    pthread_cond_t room; /* the peer gave a sign: there may be room for a reply */
    uint32_t room_waiters;
    uint64_t signs; /* counts the signs of the peer, so that none is missed */
    pthread_t threads[16];
    char reason[160];
    int verdict;

    bool serving; /* x9_dev_run is at work */
    bool parked;  /* the reader stands still, and nobody begins a request; see pause.c */
    int64_t paused_until; /* atomic, changed below the lock: ns; 0: it is not paused */

    bool stop;  /* everybody out */
    bool drain; /* take nothing new, finish what is here */
    struct x9_bucket ops, bytes;
    uint32_t max_write; /* atomic; as in x9_limits */
    int64_t held_until; /* the reader's: ns when a message may be taken that may not yet; 0: there is none */
    uint64_t slow_until; /* the reader's: us until which it takes no chances */
    struct x9_late *late; /* the reader's */
    uint32_t nlate;
    uint8_t *buf; /* the reader's: msize bytes */
    uint64_t requests, read_bytes, written_bytes, errors, by_type[128];

    uint64_t errnos[X9_ERRNOS];
    uint64_t stamp; /* the reader's: when it was last seen working */
    struct x9_times times[2]; /* [1] is the reader's own */
    bool tracing;
    struct x9_trace *trace; /* NULL until there was one */

    uint64_t stream_bytes; /* atomic: as in x9_limits */
    uint32_t nstreams;     /* atomic: readers that have a struct x9_ahead */
    bool writing_out;      /* atomic: a thread waits for the disk, to drop what a stream has written */
    uint64_t read_hits, read_misses, hit_bytes, miss_bytes;
    uint64_t streams, streamed_bytes, dropped_bytes, spared_bytes, shared_bytes;
    uint32_t events_wanted; /* atomic: X9_SAW_* */
    struct x9_events *events; /* atomic; NULL until somebody wanted some */
};

/* What a handler says besides an errno (positive) or "reply is in out" (0). */
#define X9_LATER (-1)     /* it would block: give it to the pool */
#define X9_DONE (-2)      /* it has replied by itself */
#define X9_MALFORMED (-3) /* the message does not parse */

struct x9_call {
    struct x9_dev *dev;
    struct x9_link *link;
    struct x9_req *req; /* NULL on the reader */
    const uint8_t *msg; /* private copy; of a Twrite in the ring just its header */
    uint32_t size;
    uint16_t tag;
    uint8_t type;
    bool may_block;     /* on a pool thread, or on the reader by chance */
    bool data_in_ring;  /* Twrite: the data is still in the ring, at data_pos */
    uint32_t data_pos;
    struct x9_held *held; /* set by who leaves it there for the pool */
    struct x9_stream stream;
    struct x9_note note;
    uint32_t promised; /* as in x9_req */
    struct x9_claim claim; /* the reader's; a request that has been queued has its own */
    bool unleased;         /* the reply says that nothing of it may be kept */
    uint8_t *big;       /* msize bytes, or NULL: allocated on first use */
    uint8_t out[X9_SMALL];
    uint32_t out_len;
};

/* What the reader knows of its waiting; all times in us. */
struct x9_spin {
    uint64_t idle_since; /* 0 while there is work */
    uint64_t last_look, shy_until;
    bool dense;
};

bool spin_on(struct x9_spin *spin, uint32_t limit_us);
void spin_found(struct x9_spin *spin, uint32_t limit_us);

/* clock.c */
uint64_t now_ns(void);
uint64_t now_us(void);
uint64_t clock_ns(int clock);
uint64_t ticks(void);
uint64_t to_ns(uint64_t ticks);
void calibrate(void);

int fs_handle(struct x9_call *call);
void fs_write_back(struct x9_stream *stream);
bool fs_mutates(uint8_t type);
bool fs_is_cold(uint8_t type);
bool fs_is_known(uint8_t type);
bool fs_wants_pool(uint8_t type);
bool fs_is_quick(const struct x9_call *call);
bool chance_begins(struct x9_dev *dev);
void chance_ends(struct x9_dev *dev, uint64_t began, uint32_t slow_us);
int fs_qid(struct x9_dev *dev, int fd, uint8_t *qid, uint32_t *format);
int fs_reopen(int fd, int flags);
int open_fid(struct x9_call *call, uint32_t num, uint32_t format, struct x9_fid **out);
void fd_path(char path[X9_FD_PATH], int fd);

int h_xattrwalk(struct x9_call *call);
int h_xattrcreate(struct x9_call *call);
int xattr_read(struct x9_call *call, uint32_t num, uint64_t offset, uint32_t count);
int xattr_write(struct x9_call *call, uint32_t num, uint64_t offset, uint32_t count);
bool xattr_is_to_set(struct x9_dev *dev, uint32_t num);
int xattr_end(struct x9_fid *fid);
void xattr_free(struct x9_xattr *xattr);

int auth_read(struct x9_call *call, uint32_t num, uint64_t offset, uint32_t count);
int auth_write(struct x9_call *call, uint32_t num, uint64_t offset, uint32_t count);
bool auth_takes(const struct x9_call *call);
void auth_free(struct x9_auth *auth);

/* --- whose rights a thread has (users.c) --- */

struct x9_me {
    uint32_t uid, gid, groups; /* the host's; groups: whose, X9_NOID for none */
    uint64_t serial;           /* by which struct x9_who the groups are */
    bool bare;                 /* without the capabilities that spare checks */
    bool known;
};
extern __thread struct x9_me me;

int act_as_slowly(const struct x9_dev *dev, uint32_t guest_uid);
int act_to_write(const struct x9_dev *dev, uint32_t guest_uid);
int act_to_make(const struct x9_dev *dev, uint32_t guest_uid, uint32_t guest_gid, uint32_t *give);
int give_group(int dir, int fd, uint32_t gid);
void act_as_server(void);
void act_done(const struct x9_dev *dev);
bool checks_here(const struct x9_dev *dev);
uint32_t host_uid(const struct x9_dev *dev, uint32_t uid);
uint32_t host_gid(const struct x9_dev *dev, uint32_t gid);
uint32_t shown_uid(const struct x9_dev *dev, uint32_t uid);
uint32_t shown_gid(const struct x9_dev *dev, uint32_t gid);
void users_free(struct x9_dev *dev);

/* Takes what rights a user of the guest has for what this thread does next; all of them where the guest's kernel decides.
 * Returns 0 or an errno. */
static inline int act_as(const struct x9_dev *dev, uint32_t guest_uid)
{
    if (!__atomic_load_n(&dev->act, __ATOMIC_ACQUIRE) && me.known && !me.bare && !me.uid)
        return 0;
    return act_as_slowly(dev, guest_uid);
}

uint64_t lease_key(uint64_t st_dev, uint64_t ino);
uint64_t lease_fid_key(struct x9_fid *fid);
bool lease_has_session(const struct x9_dev *dev);
void lease_file(struct x9_call *call, struct x9_fid *fid);
void lease_name(struct x9_call *call, int fd, const char *name);
bool lease_may_begin(struct x9_dev *dev, struct x9_claim *claim, const uint8_t *msg, uint32_t size);
void lease_done(struct x9_dev *dev, struct x9_claim *claim, const uint8_t *msg, uint32_t size);
void lease_release(struct x9_dev *dev, struct x9_claim *claim);
int lease_start(struct x9_dev *dev);
void lease_wake(struct x9_dev *dev);
void lease_end(struct x9_dev *dev);
void lease_free(struct x9_dev *dev);
int h_lease(struct x9_call *call);
int h_revoke(struct x9_call *call);
int lease_poll_later(struct x9_call *call);
void dev_unpark(struct x9_dev *dev, struct x9_req *req);
void dev_cancel_parked(struct x9_dev *dev);

int h_lock(struct x9_call *call);
int h_getlock(struct x9_call *call);
void locks_forget(struct x9_fid *fid);

uint64_t limits_waited(int64_t since);
bool limits_admit(struct x9_link *link, uint8_t type);
int limits_pause(const struct x9_dev *dev);
void limits_charge(struct x9_call *call);
void limits_settle(struct x9_dev *dev, uint32_t *promised, uint32_t len);
uint64_t limits_weight(const struct x9_call *call);
bool limits_full(const struct x9_dev *dev, uint64_t weight);

int link_wait_room(struct x9_link *link, uint32_t len);
void link_notify(struct x9_link *link);
void call_send(struct x9_call *call, uint8_t *msg, uint32_t len);
void dev_wake(struct x9_dev *dev);
bool dev_stopping(struct x9_dev *dev);
bool dev_ending(struct x9_dev *dev);
bool dev_idle(struct x9_dev *dev);
void dev_count_io(struct x9_dev *dev, uint64_t read, uint64_t written);
int dev_drain(struct x9_dev *dev);
int dev_wait_events(struct x9_dev *dev, int timeout_ms);
bool dev_paused(const struct x9_dev *dev);
void dev_stand_still(struct x9_dev *dev);
void deadline_in(struct timespec *at, long ms);

void obs_init(struct x9_dev *dev);
void obs_free(struct x9_dev *dev);
void obs_errno(struct x9_dev *dev, uint32_t err);
void obs_look(struct x9_dev *dev);
void obs_see(struct x9_link *link, uint32_t visible);
void obs_take(struct x9_call *call, uint32_t visible);
void obs_begin(struct x9_call *call);
void obs_start(struct x9_note *note);
void obs_done(struct x9_dev *dev, struct x9_note *note, const uint8_t *msg, uint32_t len);
void obs_done_read(struct x9_call *call, const uint8_t *header, uint32_t got);
void obs_end(struct x9_dev *dev, struct x9_note *note, uint8_t type, bool reader);

uint32_t obs_path(struct x9_dev *dev, const struct x9_fid *fid, char path[PATH_MAX]);

/* streams.c: who reads or writes on and on */
void streams_read(struct x9_call *call, struct x9_fid *fid, uint64_t offset, uint32_t count);
void streams_step(struct x9_stream *stream);
void streams_begin_write(struct x9_fid *fid, uint64_t end);
void streams_drop_written(struct x9_stream *stream);
void streams_end(struct x9_fid *fid);
void streams_count(struct x9_dev *dev, bool hit, uint64_t bytes);
void streams_stats(struct x9_dev *dev, x9_stats *out);

/* page_cache.c: what is in the kernel's page cache */
#define X9_MOST_PAGES 512u /* that pages_resident() looks at in one go */
int pages_resident(int fd, uint64_t offset, uint32_t pages, uint8_t resident[X9_MOST_PAGES]);
int open_beneath(int dir, const char *name, uint64_t flags, uint64_t mode, uint64_t resolve);

/* origin.c: reading unchanged files of a clone through the tree that it was made of */
bool origin_seek(struct x9_dev *dev, struct x9_fid *fid, bool may_block, int *fd);
int origin_open(struct x9_dev *dev, int fd, const char *path, struct x9_origin *origin, uint64_t resolve);
int origin_fd(struct x9_dev *dev, struct x9_fid *fid);
void origin_free(struct x9_origin *origin);

/* cache_events.c: what a caching policy is told */
void events_add(struct x9_dev *dev, uint32_t kind, struct x9_fid *fid, uint64_t offset, uint64_t len, bool hit);
void events_free(struct x9_dev *dev);
void events_stats(struct x9_dev *dev, x9_stats *out);
static inline bool events_wanted(const struct x9_dev *dev, uint32_t kind)
{
    return __atomic_load_n(&dev->events_wanted, __ATOMIC_RELAXED) & kind;
}

int xen_open(struct x9_dev *dev);
int xen_map(struct x9_link *link, uint32_t domid, uint32_t ref, uint32_t port);
void xen_unmap(struct x9_link *link);
void xen_notify(struct x9_link *link);
int xen_acknowledge(struct x9_dev *dev);

#endif
