/* Internal to leases: the table in memory that devices share, and what its files ask of each other. */
#ifndef LEASE_H
#define LEASE_H

#include "msg.h"

#define MAGIC 0x39706c31u /* changes with the layout */
#define BUCKETS 65536u
#define SESSIONS 64u
#define WORDS (BUCKETS / 64)
#define GROUPS (WORDS / 64)
#define RECORDS 256u  /* devices of one table that can be cleaned up after */
#define RECORDED 256u /* buckets that a device may be changing at once and that can be */
#define REFUSED_TERMS 5
#define PEERS 1024u   /* two peers with the same number modulo this are refused together */
#define IDLE_NS INT64_C(5000000000)

/* All fields are atomic; times are CLOCK_MONOTONIC in ns, which all processes of a host share. */
struct session {
    int64_t oldest;  /* since when something is to be given up; 0: nothing is */
    uint32_t everything, everything_sent;
    uint32_t peer; /* whose it is, and the term that it has */
    int64_t term;
    uint64_t groups[GROUPS]; /* which words of pending have bits */
    uint64_t pending[WORDS]; /* buckets to be given up, */
    uint64_t sent[WORDS];    /* and those of them that the client has been told and has not confirmed */
};

/* What a device is changing, so that it can be undone when its process has died. */
struct record {
    uint32_t pid;
    uint32_t buckets[RECORDED]; /* number + 1 */
};

struct x9_leases {
    uint32_t magic, signal; /* signal: a futex, counts whatever somebody may wait for */
    uint32_t active, frozen;
    uint64_t opened, revoked, voided;
    int64_t refused[PEERS];    /* until when a peer gets no session; 0 is nobody's number */
    int64_t expires[SESSIONS]; /* 0: there is no such session. Who sets it to 0 ends it */
    struct record records[RECORDS];
    struct session sessions[SESSIONS];
    uint32_t changing[BUCKETS];
    uint64_t masks[BUCKETS];
};

static inline uint32_t load32(const uint32_t *p) { return __atomic_load_n(p, __ATOMIC_SEQ_CST); }
static inline uint64_t load64(const uint64_t *p) { return __atomic_load_n(p, __ATOMIC_SEQ_CST); }
static inline int64_t load_time(const int64_t *p) { return __atomic_load_n(p, __ATOMIC_SEQ_CST); }
static inline int64_t lease_now(void) { return (int64_t)clock_ns(CLOCK_MONOTONIC); }

/* lease_table.c */
void leases_signal(struct x9_leases *table);
void leases_wait(struct x9_leases *table, uint32_t seen, int64_t ns);
void leases_expire(struct x9_leases *table, uint32_t number, int64_t expires);
void leases_refuse(struct x9_leases *table, uint32_t peer, int64_t term);
bool leases_pending(const struct session *session);
void leases_post_begin(struct session *session);
void leases_post(struct x9_leases *table, uint32_t number, uint32_t bucket);
bool leases_owes(struct x9_leases *table, uint32_t number, uint32_t bucket, int64_t *until);
uint64_t leases_post_everything(struct x9_leases *table);
void leases_wait_everything(struct x9_leases *table, uint64_t told, const struct x9_dev *dev);
void leases_forget_change(struct x9_leases *table, struct record *record, uint32_t slot, uint32_t bucket);

static inline uint32_t lease_bucket(uint64_t key) { return (uint32_t)key % BUCKETS; }
uint32_t lease_bucket_of_name(uint64_t dir_key, const char *name);
uint64_t lease_fd_key(int fd);

/* lease_change.c */
bool lease_settled(struct x9_leases *table, struct x9_claim *claim, int64_t *until);

#endif
