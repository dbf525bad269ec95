/* The time, without a system call.
 *
 * Where the kernel's clock is Xen's, clock_gettime(2) is a system call: 24 us in a dom0 under emulation, where reading
 * the processor's counter takes 17 ns. */
#include "x9.h"

#include <fcntl.h>
#include <time.h>

#define LOOKS 8
#define CALIBRATE_NS 1000000u /* the shortest stretch from which the counter's speed is taken */

static uint64_t base_ticks, base_ns;
static uint64_t ns_per_tick, first_ns_per_tick; /* 32.32 fixed point */
static bool has_counter; /* one that all processors agree on */

uint64_t clock_ns(int clock)
{
    struct timespec at;

    clock_gettime(clock, &at);
    return (uint64_t)at.tv_sec * 1000000000u + (uint64_t)at.tv_nsec;
}

uint64_t ticks(void)
{
#ifdef __x86_64__
    if (has_counter)
        return __builtin_ia32_rdtsc();
#endif
    return clock_ns(CLOCK_MONOTONIC);
}

/* Both clocks at the same moment, as near as it goes: the narrowest of a few looks, for between two of them this thread
 * may lose its processor. */
static void both_clocks(uint64_t *at, uint64_t *ns)
{
    uint64_t narrowest = UINT64_MAX;

    *at = *ns = 0;
    for (int look = 0; look < LOOKS; look++) {
        uint64_t before = ticks(), now = clock_ns(CLOCK_MONOTONIC), width = ticks() - before;

        if (width < narrowest) {
            narrowest = width;
            *at = before + width / 2;
            *ns = now;
        }
    }
}

/* When the library is loaded: a worker that is forked later has a long stretch to take the speed from. */
__attribute__((constructor)) static void clock_base(void)
{
    char name[16] = "";
    int fd = open("/sys/devices/system/clocksource/clocksource0/current_clocksource", O_RDONLY | O_CLOEXEC);

    if (fd >= 0) {
        (void)!read(fd, name, sizeof name - 1);
        close(fd);
    }
    /* These are made from the counter; a kernel that distrusts it uses another. */
    has_counter = !strncmp(name, "tsc", 3) || !strncmp(name, "xen", 3) || !strncmp(name, "kvm-clock", 9);
    both_clocks(&base_ticks, &base_ns);
}

/* Takes the counter's speed from all the time since the start. Cheap, but for the first 1 ms. */
void calibrate(void)
{
    uint64_t ns, at;

    do
        both_clocks(&at, &ns);
    while (ns - base_ns < CALIBRATE_NS);
    if (at <= base_ticks) { /* the host has slept, and its counter began anew: keep the speed */
        base_ticks = at, base_ns = ns;
        return;
    }
    uint64_t speed = (uint64_t)(((unsigned __int128)(ns - base_ns) << 32) / (at - base_ticks)), none = 0;
    __atomic_store_n(&ns_per_tick, speed, __ATOMIC_RELAXED);
    __atomic_compare_exchange_n(&first_ns_per_tick, &none, speed, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);
}

/* For stretches of time; it never jumps, so it keeps the first speed that was measured. */
uint64_t now_ns(void)
{
    if (!__atomic_load_n(&first_ns_per_tick, __ATOMIC_RELAXED))
        calibrate();
    uint64_t speed = __atomic_load_n(&first_ns_per_tick, __ATOMIC_RELAXED);
    return (uint64_t)((unsigned __int128)(ticks() - base_ticks) * speed >> 32);
}

uint64_t now_us(void) { return now_ns() / 1000; }

/* Of a stretch of time. */
uint64_t to_ns(uint64_t stretch)
{
    return (uint64_t)((unsigned __int128)stretch * __atomic_load_n(&ns_per_tick, __ATOMIC_RELAXED) >> 32);
}
