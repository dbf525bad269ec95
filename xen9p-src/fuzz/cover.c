/* Coverage for the fuzzer. gcc's -fsanitize-coverage=trace-pc has every basic block of the data plane call
 * __sanitizer_cov_trace_pc(); a pair of blocks that follow each other in one thread is an edge. This file itself is
 * built without that option, loaded before the data plane, and no part of xen9p. */
#include <stdint.h>
#include <string.h>

#define EDGES (1u << 16)

static uint8_t now[EDGES], ever[EDGES];
static __thread uintptr_t before;

void __sanitizer_cov_trace_pc(void)
{
    uintptr_t here = (uintptr_t)__builtin_return_address(0);

    /* Two threads may write one byte: both write 1. */
    now[(here ^ before * 31) % EDGES] = 1;
    before = here;
}

/* Forgets what was covered since the last call, and returns how many of those edges had never been covered before. */
unsigned cover_take(void)
{
    unsigned fresh = 0;

    for (unsigned i = 0; i < EDGES; i++)
        if (now[i] && !ever[i])
            ever[i] = 1, fresh++;
    memset(now, 0, sizeof now);
    return fresh;
}

/* How many edges have been covered since the start. */
unsigned cover_total(void)
{
    unsigned total = 0;

    for (unsigned i = 0; i < EDGES; i++)
        total += ever[i];
    return total;
}
