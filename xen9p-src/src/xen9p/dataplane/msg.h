/* Taking a message apart and putting a reply together, for the files that have handlers. */
#ifndef MSG_H
#define MSG_H

#include "x9.h"

struct cursor {
    const uint8_t *at, *end;
    bool bad;
};

static inline struct cursor body(const struct x9_call *call)
{
    return (struct cursor){call->msg + X9_HEADER, call->msg + call->size, false};
}

static inline const uint8_t *take(struct cursor *c, size_t n)
{
    static const uint8_t zeros[8];

    if (c->bad || (size_t)(c->end - c->at) < n) {
        c->bad = true;
        return zeros;
    }
    c->at += n;
    return c->at - n;
}

static inline uint8_t take8(struct cursor *c) { return *take(c, 1); }
static inline uint16_t take16(struct cursor *c) { return get16(take(c, 2)); }
static inline uint32_t take32(struct cursor *c) { return get32(take(c, 4)); }
static inline uint64_t take64(struct cursor *c) { return get64(take(c, 8)); }
static inline bool complete(const struct cursor *c) { return !c->bad && c->at == c->end; }

/* A string where it stands in the message, *len bytes; NULL, and c->bad, if the message is shorter. */
static inline const uint8_t *take_string(struct cursor *c, uint16_t *len)
{
    *len = take16(c);
    if (c->bad || (size_t)(c->end - c->at) < *len) {
        c->bad = true;
        return NULL;
    }
    return take(c, *len);
}

/* The header of the reply; its len bytes of body are written by the caller. */
static inline uint8_t *reply(struct x9_call *call, uint32_t len)
{
    call->out_len = X9_HEADER + len;
    put_header(call->out, call->out_len, (uint8_t)(call->type + 1), call->tag);
    return call->out + X9_HEADER;
}

/* count bytes of a Twrite's data, wherever they are. */
static inline void copy_data(struct x9_call *call, uint8_t *to, uint32_t count)
{
    if (call->data_in_ring)
        ring_copy(&call->link->ring, call->data_pos, to, count);
    else
        memcpy(to, call->msg + X9_WRITE_HEADER, count);
}

#endif
