/* What Python sees of the data plane. Read by cffi and by the C compiler alike: keep it to plain declarations. */

typedef struct x9_dev x9_dev;
typedef struct x9_front x9_front;

typedef struct x9_req x9_req; /* a cold message; Python's from x9_next_cold until x9_reply* */
typedef struct x9_fid x9_fid; /* a reference, from x9_fid_get until x9_fid_put */

typedef struct x9_leases x9_leases; /* the lease table that devices share */

typedef struct x9_lease_stats {
    uint64_t sessions; /* that there are now */
    uint64_t opened, revoked, voided;
} x9_lease_stats;

typedef struct x9_lease_counts {
    uint64_t sessions;    /* 1 or 0 */
    uint64_t revocations; /* buckets that its client has been told to give up */
    uint64_t voided;      /* sessions of its client that ended because it did not */
    uint64_t waits;       /* changes that had to wait for other clients, */
    uint64_t waited_us;   /* and for how long */
} x9_lease_counts;

typedef struct x9_stats {
    uint64_t requests;
    uint64_t read_bytes;
    uint64_t written_bytes;
    uint64_t errors;
    uint64_t fids;
    uint64_t in_flight;
    uint64_t queued; /* of those in flight: waiting for a thread */
    uint64_t bytes;  /* that those in flight bind */
    uint64_t throttled;    /* messages that a limit has held up, */
    uint64_t throttled_us; /* and for how long */
    uint64_t read_hits, read_misses;     /* Treads that the page cache had all of, and those that it had not */
    uint64_t hit_bytes, miss_bytes;      /* what these have read */
    uint64_t streams;                    /* sequential reads and writes that were found to be streams; of these, */
    uint64_t streamed_bytes;             /* bytes that were read ahead, */
    uint64_t dropped_bytes;              /* that were dropped behind, and */
    uint64_t spared_bytes;               /* that were left alone: they had been there before the stream came */
    uint64_t shared_bytes;               /* read through the file of the tree that this one was cloned from */
    uint64_t cache_events_lost;
    uint64_t by_type[128];
} x9_stats;

/* What a peer may hold and use. Can be changed while a device serves. */
typedef struct x9_limits {
    uint32_t max_fids;
    uint32_t max_queued; /* requests waiting for or held by the pool and Python together */
    uint64_t max_bytes;  /* of these and their replies; 0: a few times the largest message */
    uint64_t ops_per_second;   /* messages; 0: no limit */
    uint64_t bytes_per_second; /* of messages both ways; 0: no limit */
    uint32_t max_write; /* bytes of data in a Twrite that clients are asked to keep to; 0: as much as fits */
    uint64_t stream_bytes;     /* of one file in a row, from which on they are a stream; 0: nothing is */
} x9_limits;

typedef struct x9_config {
    int root_fd;         /* directory descriptor of the export; borrowed, stays open while the device lives */
    int origin_fd;       /* the same of the read-only tree that it was cloned from, to read unchanged files through; or -1 */
    int readonly;
    uint32_t max_msize;  /* bytes */
    x9_limits limits;
    uint32_t pool_threads;
    uint32_t spin_us;    /* how long to look for work before sleeping; 0: not at all */
    int timing;          /* whether to measure how long messages take */
} x9_config;

/* Why x9_dev_run came back. */
#define X9_STOPPED 0  /* x9_dev_stop */
#define X9_HANGUP 1   /* the peer of a stream closed it */
#define X9_PROTOCOL 2 /* the peer broke the protocol; x9_dev_reason says how */
#define X9_SYSTEM 3   /* a system call failed; x9_dev_reason says which */

#define X9_NOID 0xffffffffu
#define X9_SQUASH_ROOT 1
#define X9_SQUASH_ALL 2

/* count numbers from guest on are the host's from host on. */
typedef struct x9_range {
    uint32_t guest, host, count;
} x9_range;

/* What the guest's users are here, and may. */
typedef struct x9_users {
    int checks;     /* the host's kernel checks what they may; 0: the guest's has done so */

    int squash;     /* 0, X9_SQUASH_ROOT, X9_SQUASH_ALL: who is squash_uid and squash_gid */
    uint32_t squash_uid, squash_gid;
    int mapped;     /* numbers go through these ranges, and what is in none is nobody; 0: as they are */
    uint32_t nuids, ngids, ngroups;
    const x9_range *uids, *gids;
    const uint32_t *groups; /* ngroups words: uid, count, gids of which the first is its own; the host's, uids ascending */
} x9_users;

uint32_t x9_spin_us(void);
x9_dev *x9_dev_new(const x9_config *config);
void x9_dev_free(x9_dev *dev);
int x9_dev_add_stream(x9_dev *dev, int fd);
int x9_dev_add_memory_ring(x9_dev *dev, uint8_t *page, uint8_t *data, uint32_t order, int wait_fd, int notify_fd);
int x9_dev_open_xen(x9_dev *dev);
int x9_dev_add_xen_ring(x9_dev *dev, uint32_t domid, uint32_t ref, uint32_t port);
uint32_t x9_dev_order(x9_dev *dev);
int x9_dev_run(x9_dev *dev);
void x9_dev_stop(x9_dev *dev);
void x9_dev_fail(x9_dev *dev, const char *reason);
const char *x9_dev_reason(x9_dev *dev);
void x9_dev_stats(x9_dev *dev, x9_stats *out);
void x9_dev_set_limits(x9_dev *dev, const x9_limits *limits);
void x9_dev_pause(x9_dev *dev, uint32_t ms);
uint32_t x9_dev_quiet(x9_dev *dev, uint32_t ms);
int x9_dev_resume(x9_dev *dev);

x9_leases *x9_leases_open(int fd);
void x9_leases_close(x9_leases *table);
void x9_leases_freeze(x9_leases *table);
uint32_t x9_leases_owed(x9_leases *table);
void x9_leases_thaw(x9_leases *table);
uint32_t x9_leases_recover(x9_leases *table, uint32_t pid);
uint32_t x9_leases_pids(x9_leases *table, uint32_t *pids, uint32_t count);
void x9_leases_stats(x9_leases *table, x9_lease_stats *out);
void x9_dev_set_leases(x9_dev *dev, x9_leases *table, uint32_t term_ms, uint32_t peer);
void x9_dev_lease_stats(x9_dev *dev, x9_lease_counts *out);

x9_req *x9_next_cold(x9_dev *dev);
void x9_reply(x9_dev *dev, x9_req *req, const uint8_t *msg, uint32_t len);
void x9_reply_errno(x9_dev *dev, x9_req *req, uint32_t err);

x9_fid *x9_fid_get(x9_dev *dev, uint32_t num);
void x9_fid_put(x9_fid *fid);
int x9_fid_attach(x9_dev *dev, uint32_t num, uint32_t uid);
int x9_fid_clunk(x9_dev *dev, uint32_t num);
#define X9_CHALLENGE 40 /* bytes that the client reads from the fid of a Tauth, */
#define X9_RESPONSE 64  /* and that it writes: auth.py */
int x9_auth_new(x9_dev *dev, uint32_t num, const uint8_t *challenge);
int x9_auth_take(x9_dev *dev, uint32_t num, uint8_t *challenge, uint8_t *response);
int x9_qid(x9_dev *dev, int fd, uint8_t *qid13);
void x9_fd_path(int fd, char *path32);
int x9_link_fd(int fd, int dir_fd, const char *name);
int x9_locate(x9_dev *dev, int fd, char *name256);
int x9_dev_set_users(x9_dev *dev, const x9_users *users);
int x9_act_as(x9_dev *dev, uint32_t guest_uid);
int x9_act_to_make(x9_dev *dev, uint32_t guest_uid, uint32_t guest_gid, uint32_t *give);
int x9_give_group(int dir, int fd, uint32_t gid);
void x9_act_as_server(void);
void x9_act_done(x9_dev *dev);

int x9_keep_capabilities(void);

int x9_cage_alone(void);
int x9_cage_build(const char *path, int readonly, const char *origin, const char **step);
int x9_cage_shut(const char **step);
int x9_drop_capabilities(uint64_t keep);
int x9_no_new_privileges(void);
int x9_landlock(int export_fd, int readonly, int remove_fd, int origin_fd);
int x9_seccomp_prepare(void);
int x9_seccomp(void);

x9_front *x9_front_new(uint8_t *page, uint8_t *data, uint32_t order, int wait_fd, int notify_fd);
x9_front *x9_front_new_xen(uint32_t domid, uint32_t order, int *err, char *reason, size_t size);
uint32_t x9_front_ref(x9_front *front);
uint32_t x9_front_port(x9_front *front);
int x9_front_fd(x9_front *front);
void x9_front_free(x9_front *front);
int x9_front_send(x9_front *front, const uint8_t *msg, uint32_t len, int timeout_ms);
int64_t x9_front_recv(x9_front *front, uint8_t *buf, uint32_t cap, int timeout_ms);

uint64_t x9_ring_data_bytes(uint32_t order);

/* What can be seen of a device; observe.c says more. */
#define X9_GROUPS 10   /* of message types */
#define X9_STAGES 4    /* in the ring, in the queue, in the filesystem, all together */
#define X9_BUCKETS 25  /* powers of 2 of microseconds */
#define X9_ERRNOS 134
#define X9_MOST_SNAP 16384    /* bytes of file data in a trace's record */
#define X9_TRACE_BUFFER 65536 /* bytes that one record fits into */
void x9_dev_times(x9_dev *dev, uint64_t *counts, uint64_t *ns);
void x9_dev_errnos(x9_dev *dev, uint64_t *out);
int x9_trace_start(x9_dev *dev, uint32_t snap);
void x9_trace_stop(x9_dev *dev);
uint64_t x9_trace_dropped(x9_dev *dev);
uint32_t x9_trace_read(x9_dev *dev, uint8_t *buf, uint32_t cap);

/* What a caching policy is told, and how it reads ahead; cache_events.c and page_cache.c say more. */
#define X9_SAW_ATTACH 1u
#define X9_SAW_LOOKUP 2u
#define X9_SAW_OPEN 4u
#define X9_SAW_READ 8u
#define X9_SAW_LIST 16u
#define X9_SAW_STREAM 32u
#define X9_SAW_CLOSE 64u
#define X9_EVENT_BUFFER 65536 /* bytes; one event is always less than a tenth of it */
void x9_events_want(x9_dev *dev, uint32_t kinds);
uint32_t x9_events_read(x9_dev *dev, uint8_t *buf, uint32_t cap);
int x9_ahead_open(x9_dev *dev, const char *path);
int64_t x9_ahead(int fd, uint64_t offset, uint64_t len);
int x9_ahead_wait(int fd, uint64_t offset);
int64_t x9_drop(int fd, uint64_t offset, uint64_t len);
int x9_idle_io(void);
