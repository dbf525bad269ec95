/* Streams: files that are read or written on and on, once, and would push out of the page cache what others use.
 *
 * Who has read some MiB of a file in a row is a stream. From then on it is read ahead of in steps, and each step is looked
 * at before: pages that were there already are somebody's, and are left alone; the others are dropped when the stream is
 * well past them. A guest has two rings, and requests of one file come through both, so "in a row" is within a window.
 *
 * Who writes in a row beyond the end of a file makes pages that nobody had before. They are dropped when the disk has them.
 *
 * The reader counts and decides, and a thread of the pool does what may wait; one at a time for a fid. */
#include "x9.h"

#include <fcntl.h>
#include <sys/stat.h>

#define STEP ((uint64_t)X9_MOST_PAGES * X9_PAGE)
#define WINDOW (UINT64_C(4) << 20)
#define AHEAD (4 * STEP)  /* how far it is read ahead of */
#define BEHIND (2 * STEP) /* how far behind pages may be dropped: requests are in flight side by side */
#define STEPS 8u
#define MOST_STREAMS 64u /* of a device; the others are as if there were no streams */
#define WRITE_STEP (UINT64_C(4) << 20)
#define WRITE_BEHIND (2 * WRITE_STEP)

/* A step that was read ahead: which of its pages were there before. */
struct step {
    uint64_t at;
    uint32_t pages;
    uint8_t there[X9_MOST_PAGES / 8];
};

struct x9_ahead {
    struct x9_dev *dev;
    uint64_t next; /* up to where it has been read ahead */
    uint32_t first, count;
    struct step steps[STEPS];
};

/* A Tread has been answered; hit: the page cache had all that there was to read. */
void streams_count(struct x9_dev *dev, bool hit, uint64_t bytes)
{
    if (!bytes)
        return;
    count_shared(hit ? &dev->read_hits : &dev->read_misses, 1);
    count_shared(hit ? &dev->hit_bytes : &dev->miss_bytes, bytes);
}

void streams_stats(struct x9_dev *dev, x9_stats *out)
{
    struct {
        const uint64_t *from;
        uint64_t *to;
    } all[] = {
        {&dev->read_hits, &out->read_hits},
        {&dev->read_misses, &out->read_misses},
        {&dev->hit_bytes, &out->hit_bytes},
        {&dev->miss_bytes, &out->miss_bytes},
        {&dev->streams, &out->streams},
        {&dev->streamed_bytes, &out->streamed_bytes},
        {&dev->dropped_bytes, &out->dropped_bytes},
        {&dev->spared_bytes, &out->spared_bytes},
        {&dev->shared_bytes, &out->shared_bytes},
    };

    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        *all[i].to = __atomic_load_n(all[i].from, __ATOMIC_RELAXED);
}

/* --- reading --- */

static struct x9_ahead *begin(struct x9_dev *dev, uint64_t end)
{
    struct x9_ahead *ahead = NULL;

    if (__atomic_add_fetch(&dev->nstreams, 1, __ATOMIC_RELAXED) <= MOST_STREAMS)
        ahead = calloc(1, sizeof *ahead);
    if (!ahead) {
        __atomic_sub_fetch(&dev->nstreams, 1, __ATOMIC_RELAXED);
        return NULL;
    }
    ahead->dev = dev;
    ahead->next = (end + STEP - 1) / STEP * STEP;
    count_shared(&dev->streams, 1);
    return ahead;
}

/* On the reader, before a Tread: where messages are in order. May leave a job in call->stream. */
void streams_read(struct x9_call *call, struct x9_fid *fid, uint64_t offset, uint32_t count)
{
    struct x9_dev *dev = call->dev;
    struct x9_flow *flow = &fid->flow;
    uint64_t limit = __atomic_load_n(&dev->stream_bytes, __ATOMIC_RELAXED);
    uint64_t end = flow->end, after = offset + count;
    bool goes_on = offset <= end ? end - offset <= WINDOW : offset - end <= WINDOW;

    if (!goes_on)
        flow->start = offset, __atomic_store_n(&flow->end, after, __ATOMIC_RELAXED);
    else if (after > end)
        __atomic_store_n(&flow->end, after, __ATOMIC_RELAXED);
    if (__atomic_load_n(&flow->busy, __ATOMIC_ACQUIRE)) {
        if (!goes_on)
            __atomic_store_n(&flow->left, true, __ATOMIC_RELAXED);
        return;
    }
    struct x9_ahead *ahead = __atomic_load_n(&flow->ahead, __ATOMIC_RELAXED);
    if (!ahead) {
        if (!limit || flow->end - flow->start < limit || !(ahead = begin(dev, flow->end)))
            return;
        flow->left = false;
        __atomic_store_n(&flow->ahead, ahead, __ATOMIC_RELAXED);
        events_add(dev, X9_SAW_STREAM, fid, flow->start, flow->end - flow->start, false);
    } else if (!goes_on) {
        flow->left = true;
    }
    if (!flow->left && ahead->next >= flow->end + AHEAD)
        return;
    __atomic_store_n(&flow->busy, true, __ATOMIC_RELAXED);
    call->stream = (struct x9_stream){.fid = fid, .dev = dev, .reading = true};
    __atomic_add_fetch(&fid->refs, 1, __ATOMIC_RELAXED);
}

/* Reads one step ahead, and notes which of its pages are somebody's. */
static void read_step(struct x9_ahead *ahead, int fd, uint64_t size)
{
    uint8_t resident[X9_MOST_PAGES];
    struct step *step = &ahead->steps[(ahead->first + ahead->count) % STEPS];
    uint64_t len = size - ahead->next < STEP ? size - ahead->next : STEP;
    uint32_t absent = 0;

    memset(step, 0, sizeof *step);
    step->at = ahead->next, step->pages = (uint32_t)((len + X9_PAGE - 1) / X9_PAGE);
    ahead->next += STEP;
    if (pages_resident(fd, step->at, step->pages, resident))
        return; /* what we know nothing of we leave alone */
    for (uint32_t i = 0; i < step->pages; i++)
        if (resident[i])
            step->there[i / 8] |= (uint8_t)(1u << i % 8);
        else
            absent++;
    ahead->count++;
    count_shared(&ahead->dev->spared_bytes, (uint64_t)(step->pages - absent) * X9_PAGE);
    if (absent) {
        posix_fadvise(fd, (off_t)step->at, (off_t)len, POSIX_FADV_WILLNEED);
        count_shared(&ahead->dev->streamed_bytes, (uint64_t)absent * X9_PAGE);
    }
}

/* Drops what a step has brought. */
static void drop_step(struct x9_ahead *ahead, int fd)
{
    const struct step *step = &ahead->steps[ahead->first % STEPS];
    uint32_t from = 0, dropped = 0;

    for (uint32_t i = 0; i <= step->pages; i++)
        if (i == step->pages || (step->there[i / 8] >> i % 8 & 1)) {
            if (i > from && !posix_fadvise(fd, (off_t)(step->at + (uint64_t)from * X9_PAGE),
                                           (off_t)(i - from) * X9_PAGE, POSIX_FADV_DONTNEED))
                dropped += i - from;
            from = i + 1;
        }
    ahead->first = (ahead->first + 1) % STEPS, ahead->count--;
    count_shared(&ahead->dev->dropped_bytes, (uint64_t)dropped * X9_PAGE);
}

static void end(struct x9_flow *flow, int fd)
{
    struct x9_ahead *ahead = flow->ahead;

    while (ahead->count)
        drop_step(ahead, fd);
    __atomic_sub_fetch(&ahead->dev->nstreams, 1, __ATOMIC_RELAXED);
    __atomic_store_n(&flow->ahead, NULL, __ATOMIC_RELAXED);
    free(ahead);
}

/* On a thread of the pool. */
void streams_step(struct x9_stream *stream)
{
    struct x9_fid *fid = stream->fid;
    struct x9_flow *flow = &fid->flow;
    struct x9_ahead *ahead = flow->ahead;
    uint64_t at = __atomic_load_n(&flow->end, __ATOMIC_RELAXED);
    struct stat st;

    int fd;
    origin_seek(stream->dev, fid, true, &fd);
    bool known = __atomic_load_n(&fid->origin_state, __ATOMIC_ACQUIRE) == X9_ORIGIN_KNOWN;
    act_as_server(); /* to see what is there; the file is open */
    if (__atomic_load_n(&flow->left, __ATOMIC_RELAXED)) {
        end(flow, fd);
        posix_fadvise(fd, 0, 0, POSIX_FADV_NORMAL);
    } else if (known) { /* what is noted of one file must not be taken for the other's */
        posix_fadvise(fd, 0, 0, POSIX_FADV_RANDOM); /* no reading ahead but ours: what is not looked at is not dropped */
        while (ahead->count && ahead->steps[ahead->first].at + STEP + BEHIND <= at)
            drop_step(ahead, fd);
        while (!fstat(fd, &st) && ahead->count < STEPS && ahead->next < at + AHEAD && ahead->next < (uint64_t)st.st_size)
            read_step(ahead, fd, (uint64_t)st.st_size);
        if (ahead->next < at)
            ahead->next = (at + STEP - 1) / STEP * STEP; /* it was faster than we: what it has read itself stays */
    }
    __atomic_store_n(&flow->busy, false, __ATOMIC_RELEASE);
    fid_put(fid);
    stream->fid = NULL;
}

/* The last reference to a fid is gone. */
void streams_end(struct x9_fid *fid)
{
    if (fid->flow.ahead)
        end(&fid->flow, fid->origin ? origin_fd(fid->flow.ahead->dev, fid) : fid->io_fd);
}

/* --- writing --- */

/* A sequential writer has begun with a write up to end: what it writes after that is its own if the file ends there. */
void streams_begin_write(struct x9_fid *fid, uint64_t end)
{
    struct stat st;
    bool own = !fstat(fid->io_fd, &st) && (uint64_t)st.st_size == end;

    __atomic_store_n(&fid->stream_own, own ? end : X9_NOWHERE, __ATOMIC_RELAXED);
    __atomic_store_n(&fid->stream_dropped, end, __ATOMIC_RELAXED);
}

/* After writeback of stream's range has been started: waits for what lies well behind it, and drops that. So a writer has
 * no more than some MiB of dirty pages. Only one thread of a device waits; the others come back with the next step. */
void streams_drop_written(struct x9_stream *stream)
{
    struct x9_fid *fid = stream->fid;
    struct x9_dev *dev = stream->dev;
    uint64_t limit = __atomic_load_n(&dev->stream_bytes, __ATOMIC_RELAXED);
    uint64_t own = __atomic_load_n(&fid->stream_own, __ATOMIC_RELAXED);
    uint64_t from = __atomic_load_n(&fid->stream_dropped, __ATOMIC_RELAXED);
    uint64_t to = stream->from > WRITE_BEHIND ? stream->from - WRITE_BEHIND : 0;

    if (!limit || own == X9_NOWHERE || to < own || stream->to - own < limit || to < from || to - from < WRITE_STEP ||
        __atomic_exchange_n(&dev->writing_out, true, __ATOMIC_ACQUIRE))
        return;
    if (__atomic_compare_exchange_n(&fid->stream_dropped, &from, to, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
        if (from == own)
            count_shared(&dev->streams, 1), events_add(dev, X9_SAW_STREAM, fid, own, stream->to - own, true);
        if (!sync_file_range(fid->io_fd, (off64_t)from, (off64_t)(to - from),
                             SYNC_FILE_RANGE_WAIT_BEFORE | SYNC_FILE_RANGE_WRITE | SYNC_FILE_RANGE_WAIT_AFTER) &&
            !posix_fadvise(fid->io_fd, (off_t)from, (off_t)(to - from), POSIX_FADV_DONTNEED))
            count_shared(&dev->dropped_bytes, to - from);
    }
    __atomic_store_n(&dev->writing_out, false, __ATOMIC_RELEASE);
}
