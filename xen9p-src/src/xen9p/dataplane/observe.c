/* What can be seen of a device: how long messages take, which errnos they get, and a mirror of them for a trace.
 *
 * Every message is stamped, with ticks (clock.c). The reader counts alone, without locked instructions; all other
 * threads share a second set of counters. A trace never makes a message wait: what does not fit into its queue is
 * dropped and counted. */
#include "x9.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <time.h>

#define LONG_NS 50000u        /* on the reader: look what came meanwhile */
#define MOST_STORED 8192u     /* bytes of a message that is no file data */
#define MOST_BYTES (16u << 20) /* of all records that wait for their reader */

/* --- counting --- */

/* Counters of two processors can differ a little: what would be negative is 0. */
static uint64_t between(uint64_t from, uint64_t to) { return to > from ? to - from : 0; }

static const uint8_t groups[128] = {
    [P9_TREAD] = X9_READ, [P9_TWRITE] = X9_WRITE,
    [P9_TWALK] = X9_LOOKUP, [P9_TGETATTR] = X9_LOOKUP, [P9_TREADLINK] = X9_LOOKUP, [P9_TSTATFS] = X9_LOOKUP,
    [P9_TLOPEN] = X9_OPEN, [P9_TCLUNK] = X9_OPEN,
    [P9_TREADDIR] = X9_READDIR,
    [P9_TLCREATE] = X9_CHANGE, [P9_TSETATTR] = X9_CHANGE, [P9_TMKDIR] = X9_CHANGE, [P9_TSYMLINK] = X9_CHANGE,
    [P9_TMKNOD] = X9_CHANGE, [P9_TLINK] = X9_CHANGE, [P9_TRENAME] = X9_CHANGE, [P9_TRENAMEAT] = X9_CHANGE,
    [P9_TUNLINKAT] = X9_CHANGE, [P9_TREMOVE] = X9_CHANGE,
    [P9_TFSYNC] = X9_SYNC,
    [P9_TXATTRWALK] = X9_XATTR, [P9_TXATTRCREATE] = X9_XATTR,
    [P9_TLOCK] = X9_LOCK, [P9_TGETLOCK] = X9_LOCK,
};

static uint32_t bucket(uint64_t stretch)
{
    uint64_t us = to_ns(stretch) / 1000;
    uint32_t i = us ? 64u - (uint32_t)__builtin_clzll(us) : 0;

    return i < X9_BUCKETS ? i : X9_BUCKETS - 1;
}

static void count_alone(uint64_t *counter, uint64_t n)
{
    __atomic_store_n(counter, __atomic_load_n(counter, __ATOMIC_RELAXED) + n, __ATOMIC_RELAXED);
}

static void count(struct x9_dev *dev, uint8_t type, enum x9_stage stage, uint64_t stretch, bool reader)
{
    struct x9_histogram *h = &dev->times[reader].h[groups[type & 127]][stage];
    uint64_t *counter = &h->count[bucket(stretch)];

    if (reader) {
        count_alone(counter, 1);
        count_alone(&h->ticks, stretch);
    } else {
        count_shared(counter, 1);
        count_shared(&h->ticks, stretch);
    }
}

/* counts: [group][stage][bucket]; ns: [group][stage], all of that stage's time together. */
void x9_dev_times(x9_dev *dev, uint64_t *counts, uint64_t *ns)
{
    calibrate();
    for (int group = 0; group < X9_GROUPS; group++)
        for (int stage = 0; stage < X9_STAGES; stage++) {
            uint64_t sum = 0;
            for (int i = 0; i < X9_BUCKETS; i++)
                counts[i] = 0;
            for (int who = 0; who < 2; who++) {
                const struct x9_histogram *h = &dev->times[who].h[group][stage];
                for (int i = 0; i < X9_BUCKETS; i++)
                    counts[i] += __atomic_load_n(&h->count[i], __ATOMIC_RELAXED);
                sum += __atomic_load_n(&h->ticks, __ATOMIC_RELAXED);
            }
            counts += X9_BUCKETS, *ns++ = to_ns(sum);
        }
}

void obs_errno(struct x9_dev *dev, uint32_t err)
{
    count_shared(&dev->errnos[err < X9_ERRNOS ? err : 0], 1);
}

/* out[X9_ERRNOS]: how often each has been answered; [0] counts those that have no place. */
void x9_dev_errnos(x9_dev *dev, uint64_t *out)
{
    for (int i = 0; i < X9_ERRNOS; i++)
        out[i] = __atomic_load_n(&dev->errnos[i], __ATOMIC_RELAXED);
}

/* --- the trace's queue: many producers, one consumer --- */

#define SLOTS 4096u

/* A message on its way to the trace; after it, request_len bytes of the request and reply_len of the reply. */
struct x9_record {
    struct x9_fid *fid; /* a reference: its path is looked up by who reads the trace, not by who serves */
    uint64_t seen, taken, begun, done, sent;
    uint32_t request_len, reply_len, link;
    uint8_t bytes[];
};

struct x9_trace {
    uint64_t head, tail, dropped;
    uint64_t bytes; /* in all records that live */
    uint32_t snap;
    struct x9_record *slots[SLOTS];
};

static void record_free(struct x9_trace *trace, struct x9_record *record)
{
    __atomic_sub_fetch(&trace->bytes, sizeof *record + record->request_len + record->reply_len, __ATOMIC_RELAXED);
    if (record->fid)
        fid_put(record->fid);
    free(record);
}

static void push(struct x9_dev *dev, struct x9_record *record)
{
    struct x9_trace *trace = dev->trace;
    uint64_t head = __atomic_load_n(&trace->head, __ATOMIC_RELAXED);

    do
        if (head - __atomic_load_n(&trace->tail, __ATOMIC_ACQUIRE) >= SLOTS) {
            count_shared(&trace->dropped, 1);
            record_free(trace, record);
            return;
        }
    while (!__atomic_compare_exchange_n(&trace->head, &head, head + 1, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
    __atomic_store_n(&trace->slots[head % SLOTS], record, __ATOMIC_RELEASE);
}

static struct x9_record *pull(struct x9_trace *trace)
{
    struct x9_record **slot = &trace->slots[trace->tail % SLOTS], *record = __atomic_load_n(slot, __ATOMIC_ACQUIRE);

    if (record) {
        __atomic_store_n(slot, NULL, __ATOMIC_RELAXED);
        __atomic_store_n(&trace->tail, trace->tail + 1, __ATOMIC_RELEASE);
    }
    return record;
}

static void discard(struct x9_trace *trace)
{
    for (struct x9_record *record; (record = pull(trace));)
        record_free(trace, record);
}

/* Begins to mirror messages, with at most snap bytes of file data each. One trace at a time. Returns 0 or an errno. */
int x9_trace_start(x9_dev *dev, uint32_t snap)
{
    if (dev->tracing)
        return EBUSY;
    if (!dev->trace && !(dev->trace = calloc(1, sizeof *dev->trace)))
        return ENOMEM;
    discard(dev->trace);
    dev->trace->snap = snap < X9_MOST_SNAP ? snap : X9_MOST_SNAP;
    __atomic_store_n(&dev->trace->dropped, 0, __ATOMIC_RELAXED);
    __atomic_store_n(&dev->tracing, true, __ATOMIC_RELEASE);
    return 0;
}

/* What is under way still goes into the queue, which the next start or the end empties. */
void x9_trace_stop(x9_dev *dev) { __atomic_store_n(&dev->tracing, false, __ATOMIC_RELEASE); }

uint64_t x9_trace_dropped(x9_dev *dev)
{
    return dev->trace ? __atomic_load_n(&dev->trace->dropped, __ATOMIC_RELAXED) : 0;
}

void obs_free(struct x9_dev *dev)
{
    if (dev->trace)
        discard(dev->trace);
    free(dev->trace);
}

/* --- mirroring --- */

static bool is_data(uint8_t type) { return type == P9_TWRITE || type == P9_TREAD + 1 || type == P9_TREADDIR + 1; }

static uint32_t stored(const struct x9_trace *trace, uint8_t type, uint32_t size)
{
    uint32_t most = !is_data(type) ? MOST_STORED
                    : trace->snap + (type == P9_TWRITE ? X9_WRITE_HEADER : X9_READ_HEADER);

    return size < most ? size : most;
}

static bool may_grow(struct x9_trace *trace, uint32_t more)
{
    if (__atomic_add_fetch(&trace->bytes, more, __ATOMIC_RELAXED) <= MOST_BYTES)
        return true;
    __atomic_sub_fetch(&trace->bytes, more, __ATOMIC_RELAXED);
    return false;
}

static void copy_from(uint8_t *to, uint32_t len, const struct iovec *iov, int n)
{
    for (int i = 0; i < n && len; i++) {
        uint32_t part = iov[i].iov_len < len ? (uint32_t)iov[i].iov_len : len;
        memcpy(to, iov[i].iov_base, part);
        to += part, len -= part;
    }
}

/* The message's own fid; every request that has one has it first. */
static bool has_fid(uint8_t type)
{
    return fs_is_known(type) && type != P9_TVERSION && type != P9_TAUTH && type != P9_TATTACH && type != P9_TFLUSH;
}

static struct x9_record *record_new(struct x9_call *call)
{
    struct x9_trace *trace = call->dev->trace;
    uint32_t len = stored(trace, call->type, call->size), head = call->data_in_ring ? X9_WRITE_HEADER : len;
    struct x9_record *record = NULL;

    if (!may_grow(trace, (uint32_t)sizeof *record + len) || !(record = calloc(1, sizeof *record + len))) {
        count_shared(&trace->dropped, 1);
        return NULL;
    }
    record->request_len = len;
    memcpy(record->bytes, call->msg, head < len ? head : len);
    if (call->data_in_ring) {
        struct iovec iov[2];
        int n = ring_rx_iov(&call->link->ring, call->data_pos, call->size - X9_WRITE_HEADER, iov);
        copy_from(record->bytes + head, len - head, iov, n);
    }
    if (has_fid(call->type) && call->size >= X9_HEADER + 4)
        record->fid = fids_get(&call->dev->fids, get32(call->msg + X9_HEADER));
    for (uint32_t i = 0; i < call->dev->nlinks; i++)
        if (call->dev->links[i] == call->link)
            record->link = i;
    return record;
}

/* Adds the reply to a message's record. */
static void mirror_reply(struct x9_dev *dev, struct x9_note *note, const struct iovec *iov, int n)
{
    struct x9_record *record = note->record, *bigger;
    const uint8_t *head = iov[0].iov_base;
    uint32_t len = stored(dev->trace, head[4], get32(head));

    if (record->reply_len || !may_grow(dev->trace, len))
        return;
    if (!(bigger = realloc(record, sizeof *record + record->request_len + len))) {
        __atomic_sub_fetch(&dev->trace->bytes, len, __ATOMIC_RELAXED);
        return;
    }
    note->record = bigger;
    bigger->reply_len = len;
    copy_from(bigger->bytes + bigger->request_len, len, iov, n);
}

/* --- the stations of a message --- */

static bool timed(const struct x9_dev *dev)
{
    return dev->config.timing || __atomic_load_n(&dev->tracing, __ATOMIC_RELAXED);
}

/* Before each look at the links that follows one in vain. */
void obs_look(struct x9_dev *dev)
{
    if (timed(dev))
        dev->stamp = ticks();
}

/* What lies before end in a link's ring was there by then. When there are too many marks, the last one gives way. */
static void mark(struct x9_link *link, uint32_t end, uint64_t since)
{
    struct x9_mark *last = &link->marks[(link->first_mark + link->nmarks - 1) % X9_MARKS];

    if (link->nmarks && (int32_t)(end - last->end) <= 0)
        return;
    if (link->nmarks == X9_MARKS)
        last->end = end;
    else
        link->marks[(link->first_mark + link->nmarks++) % X9_MARKS] = (struct x9_mark){end, since};
}

/* The reader has not looked for long: what came meanwhile has been waiting from then on, at the most. */
static void look_back(struct x9_dev *dev, uint64_t since)
{
    for (uint32_t i = 0; i < dev->nlinks; i++) {
        struct x9_link *link = dev->links[i];
        int64_t have = link->kind == X9_STREAM ? 0 : ring_readable(&link->ring);
        if (have > 0)
            mark(link, link->ring.rx_pos + (uint32_t)have, since);
    }
}

/* A message has been found that is not taken yet, with visible bytes as below: its time in the ring begins. */
void obs_see(struct x9_link *link, uint32_t visible)
{
    if (timed(link->dev))
        mark(link, link->ring.rx_pos + visible, link->dev->stamp);
}

/* A whole message has been found, with visible bytes from its start to the end of what the peer has published. It has
 * been in the ring since the look that first saw it; when it came before that look, nobody knows. */
void obs_take(struct x9_call *call, uint32_t visible)
{
    struct x9_link *link = call->link;
    struct x9_dev *dev = call->dev;

    call->note = (struct x9_note){0};
    if (!timed(dev))
        return;
    call->note.seen = call->note.taken = call->note.begun = dev->stamp;
    if (link->kind == X9_STREAM)
        return;
    uint32_t start = link->ring.rx_pos, end = start + visible;
    while (link->nmarks && (int32_t)(link->marks[link->first_mark % X9_MARKS].end - start) <= 0)
        link->first_mark++, link->nmarks--;
    mark(link, end, dev->stamp);
    call->note.seen = link->marks[link->first_mark % X9_MARKS].since;
}

/* On the reader, before anything is done with a message. */
void obs_begin(struct x9_call *call)
{
    if (__atomic_load_n(&call->dev->tracing, __ATOMIC_RELAXED)) {
        __atomic_thread_fence(__ATOMIC_ACQUIRE);
        call->note.record = record_new(call);
    }
}

/* On the thread that it has been waiting for. */
void obs_start(struct x9_note *note)
{
    if (note->taken)
        note->begun = ticks(), note->queued = true;
}

static void stamp_done(struct x9_dev *dev, struct x9_note *note)
{
    if (!note->taken)
        return;
    note->done = ticks();
    if (!note->queued && to_ns(between(note->begun, note->done)) > LONG_NS)
        look_back(dev, note->begun);
}

/* Before a reply is sent. */
void obs_done(struct x9_dev *dev, struct x9_note *note, const uint8_t *msg, uint32_t len)
{
    stamp_done(dev, note);
    if (note->record)
        mirror_reply(dev, note, &(struct iovec){(void *)(uintptr_t)msg, len}, 1);
}

/* The same for an Rread whose data the filesystem has put into the ring already, behind the header. */
void obs_done_read(struct x9_call *call, const uint8_t *header, uint32_t got)
{
    struct iovec iov[3] = {{(void *)(uintptr_t)header, X9_READ_HEADER}};

    stamp_done(call->dev, &call->note);
    if (call->note.record)
        mirror_reply(call->dev, &call->note, iov, 1 + ring_tx_iov(&call->link->ring, X9_READ_HEADER, got, iov + 1));
}

/* After the reply, or after it has become clear that there will be none. */
void obs_end(struct x9_dev *dev, struct x9_note *note, uint8_t type, bool reader)
{
    if (!note->taken && !note->record && !(reader && timed(dev)))
        return;
    uint64_t now = ticks();
    if (reader)
        dev->stamp = now; /* the next message is looked at right now */
    if (note->taken && note->done) {
        count(dev, type, X9_RING, between(note->seen, note->taken), reader);
        if (note->queued)
            count(dev, type, X9_QUEUE, between(note->taken, note->begun), reader);
        count(dev, type, X9_FILESYSTEM, between(note->begun, note->done), reader);
        count(dev, type, X9_TOTAL, between(note->seen, now), reader);
    }
    if (note->record) {
        struct x9_record *record = note->record;
        record->seen = note->seen, record->taken = note->taken, record->begun = note->begun;
        record->done = note->done, record->sent = note->done ? now : 0;
        push(dev, record);
    }
    *note = (struct x9_note){0};
}

/* --- reading the trace --- */

struct packed {
    uint32_t size; /* of all of it */
    uint16_t link, path_len;
    uint32_t request_len, reply_len;
    uint64_t times[5]; /* seen, taken, begun, done, sent: ns since 1970, 0 for never */
};

/* Where a fid's file is, from the export's root on; "" without one. Returns its length. */
uint32_t obs_path(struct x9_dev *dev, const struct x9_fid *fid, char path[PATH_MAX])
{
    char link[X9_FD_PATH], root[PATH_MAX];

    if (!fid)
        return 0;
    fd_path(link, fid->path_fd);
    ssize_t n = readlink(link, path, PATH_MAX);
    fd_path(link, dev->config.root_fd);
    ssize_t r = readlink(link, root, sizeof root);
    if (n <= 0 || r <= 0)
        return 0;
    if (r == 1)
        r = 0; /* the export is "/" */
    if (n < r || memcmp(path, root, (size_t)r) || (n > r && path[r] != '/'))
        return 0;
    static const char gone[] = " (deleted)"; /* the kernel's word for a file without a name; a file may be called so */
    struct stat st;
    if (n > r + (ssize_t)sizeof gone && !memcmp(path + n - (sizeof gone - 1), gone, sizeof gone - 1) &&
        !fstatat(fid->path_fd, "", &st, AT_EMPTY_PATH) && !st.st_nlink)
        n -= (ssize_t)sizeof gone - 1;
    if (n == r)
        path[n++] = '/';
    memmove(path, path + r, (size_t)(n - r));
    return (uint32_t)(n - r);
}

/* Fills buf, at least X9_TRACE_BUFFER bytes, with the records that are there. Returns how many bytes, 0 for none. Only
 * one thread may read. */
uint32_t x9_trace_read(x9_dev *dev, uint8_t *buf, uint32_t cap)
{
    struct x9_trace *trace = dev->trace;
    uint64_t now = ticks(), real = clock_ns(CLOCK_REALTIME);
    char path[PATH_MAX];
    uint32_t used = 0;

    while (cap - used >= X9_TRACE_BUFFER) {
        struct x9_record *record = pull(trace);
        if (!record)
            break;
        uint64_t stamps[5] = {record->seen, record->taken, record->begun, record->done, record->sent};
        struct packed head = {
            .link = (uint16_t)record->link, .path_len = (uint16_t)obs_path(dev, record->fid, path),
            .request_len = record->request_len, .reply_len = record->reply_len,
        };
        for (int i = 0; i < 5; i++)
            head.times[i] = stamps[i] ? real - to_ns(between(stamps[i], now)) : 0;
        head.size = (uint32_t)sizeof head + head.path_len + head.request_len + head.reply_len;
        memcpy(buf + used, &head, sizeof head);
        memcpy(buf + used + sizeof head, path, head.path_len);
        memcpy(buf + used + sizeof head + head.path_len, record->bytes, head.request_len + head.reply_len);
        used += head.size;
        record_free(trace, record);
    }
    return used;
}

void obs_init(struct x9_dev *dev)
{
    calibrate();
    dev->stamp = ticks();
}
