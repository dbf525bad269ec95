/* The fid of a Tauth: a place for a challenge that the client reads and for the response that it writes. What they mean is
 * Python's (auth.py); C keeps the bytes, because Tread, Twrite and Tclunk are answered here. Such a fid has auth set and is
 * found by fids_get_auth() alone, so every other message on it gets EBADF. */
#include "msg.h"

#define FIDS_MOST 16u /* at once: a client needs one */

struct x9_auth {
    struct x9_dev *dev; /* whose share it takes */
    bool taken;         /* a Tattach has come; below fid->lock, as is have */
    uint32_t have;
    uint8_t challenge[X9_CHALLENGE], response[X9_RESPONSE];
};

void auth_free(struct x9_auth *auth)
{
    __atomic_sub_fetch(&auth->dev->auth_fids, 1, __ATOMIC_RELAXED);
    free(auth);
}

/* Makes num the fid of an authentication. challenge: X9_CHALLENGE bytes. Returns 0, EMFILE (too many), EINVAL (num is in
 * use) or ENOMEM. */
int x9_auth_new(x9_dev *dev, uint32_t num, const uint8_t *challenge)
{
    uint32_t fids = __atomic_add_fetch(&dev->auth_fids, 1, __ATOMIC_RELAXED);
    struct x9_auth *auth = fids <= FIDS_MOST ? calloc(1, sizeof *auth) : NULL;

    if (!auth) {
        __atomic_sub_fetch(&dev->auth_fids, 1, __ATOMIC_RELAXED);
        return fids > FIDS_MOST ? EMFILE : ENOMEM;
    }
    auth->dev = dev;
    memcpy(auth->challenge, challenge, sizeof auth->challenge);
    struct x9_fid *fid = fid_new(num, -1, 0, 0);
    if (!fid) {
        auth_free(auth);
        return ENOMEM;
    }
    fid->auth = auth;
    return fids_add(&dev->fids, fid);
}

/* Hands out a challenge (X9_CHALLENGE bytes) and its response (X9_RESPONSE bytes), once: whatever comes of it, this fid is
 * good for nothing more. Returns 0, EBADF (no such fid) or EKEYREJECTED (used already, or not all of the response has come). */
int x9_auth_take(x9_dev *dev, uint32_t num, uint8_t *challenge, uint8_t *response)
{
    struct x9_fid *fid = fids_get_auth(&dev->fids, num);

    if (!fid)
        return EBADF;
    struct x9_auth *auth = fid->auth;
    pthread_mutex_lock(&fid->lock);
    int err = auth->taken || auth->have < sizeof auth->response ? EKEYREJECTED : 0;
    auth->taken = true;
    memcpy(challenge, auth->challenge, sizeof auth->challenge);
    memcpy(response, auth->response, sizeof auth->response);
    pthread_mutex_unlock(&fid->lock);
    fid_put(fid);
    return err;
}

/* Tread, when it is neither a file's fid nor an attribute's. */
int auth_read(struct x9_call *call, uint32_t num, uint64_t offset, uint32_t count)
{
    struct x9_fid *fid = fids_get_auth(&call->dev->fids, num);

    if (!fid)
        return EBADF;
    uint32_t left = offset < X9_CHALLENGE ? X9_CHALLENGE - (uint32_t)offset : 0, len = count < left ? count : left;
    uint8_t *p = reply(call, 4 + len);
    put32(p, len);
    memcpy(p + 4, fid->auth->challenge + (len ? offset : 0), len);
    fid_put(fid);
    return 0;
}

/* Twrite, the same. The response comes from its start on, and no byte of it twice. */
int auth_write(struct x9_call *call, uint32_t num, uint64_t offset, uint32_t count)
{
    struct x9_fid *fid = fids_get_auth(&call->dev->fids, num);
    int err = 0;

    if (!fid)
        return EBADF;
    struct x9_auth *auth = fid->auth;
    pthread_mutex_lock(&fid->lock);
    if (auth->taken || offset != auth->have) {
        err = EINVAL;
    } else if (count > sizeof auth->response - auth->have) {
        err = ENOSPC;
    } else {
        copy_data(call, auth->response + auth->have, count);
        auth->have += count;
    }
    pthread_mutex_unlock(&fid->lock);
    fid_put(fid);
    if (!err)
        put32(reply(call, 4), count);
    return err;
}

/* Whether a message changes nothing although its type does: a response is written on a read-only device too. */
bool auth_takes(const struct x9_call *call)
{
    if (call->type != P9_TWRITE || call->size < X9_WRITE_HEADER)
        return false;
    struct x9_fid *fid = fids_get_auth(&call->dev->fids, get32(call->msg + X9_HEADER));
    if (fid)
        fid_put(fid);
    return fid;
}
