/* Waiting for work: look for a while, then sleep.
 *
 * Looking costs a processor; sleeping costs a wake-up, which the peer waits for. What a wake-up costs differs by a factor
 * of fifty between a plain machine and an emulated one, so it is measured. Looking for as long as a few wake-ups take
 * is never much dearer than the better of the two (the ski rental problem), as long as nobody else wants the processor. */
#include "x9.h"

#include <poll.h>
#include <sched.h>
#include <sys/eventfd.h>

#define ROUNDS 15
#define REST_US 500         /* between two rounds, so that the sleeper really sleeps */
/* Look for as long as so many wake-ups take. What is measured is the least that one costs: an event channel, Xen and a
 * processor that has gone to sleep come to it. A guest that boots leaves five to ten of them between two requests. */
#define WAKEUPS 12
#define LEAST_US 50u
#define MOST_US 2500u
/* How long to leave the processor to others that want it. Not longer: on a machine that itself runs on a busy one, most of
 * what looks like others is its own processor being away, and a sleep for each request after it costs a fifth. */
#define SHY_US 500u

struct sleeper {
    int wake_fd, done_fd;
    uint64_t woken; /* us */
};

static void *sleep_and_say(void *arg)
{
    struct sleeper *sleeper = arg;
    uint64_t count;

    for (int i = 0; i < ROUNDS; i++) {
        struct pollfd fd = {sleeper->wake_fd, POLLIN, 0};

        while (poll(&fd, 1, -1) < 0 && errno == EINTR)
            ;
        __atomic_store_n(&sleeper->woken, now_us(), __ATOMIC_RELAXED);
        (void)!read(sleeper->wake_fd, &count, sizeof count);
        count = 1;
        (void)!write(sleeper->done_fd, &count, sizeof count);
    }
    return NULL;
}

static int ascending(const void *a, const void *b)
{
    uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;

    return (x > y) - (x < y);
}

/* Keeps two threads on two processors, if this process may use two: a guest runs on another one than its reader does.
 * Returns in all what this thread may use. */
static void part(pthread_t other, cpu_set_t *all)
{
    cpu_set_t one;
    int first = -1, last = -1;

    if (pthread_getaffinity_np(pthread_self(), sizeof *all, all))
        CPU_ZERO(all);
    for (int cpu = 0; cpu < CPU_SETSIZE; cpu++)
        if (CPU_ISSET(cpu, all))
            first = first < 0 ? cpu : first, last = cpu;
    if (first == last)
        return;
    CPU_ZERO(&one);
    CPU_SET(first, &one);
    pthread_setaffinity_np(pthread_self(), sizeof one, &one);
    CPU_ZERO(&one);
    CPU_SET(last, &one);
    pthread_setaffinity_np(other, sizeof one, &one);
}

/* Microseconds from waking a thread that sleeps in poll(2) on another processor until it runs: the lower quartile of a few,
 * for whatever else happens only adds to it. 0 if that fails. */
static uint64_t measure_wakeup(void)
{
    struct sleeper sleeper = {eventfd(0, EFD_CLOEXEC), eventfd(0, EFD_CLOEXEC), 0};
    uint64_t took[ROUNDS] = {0}, one = 1, count;
    pthread_t thread;
    cpu_set_t all;

    if (sleeper.wake_fd >= 0 && sleeper.done_fd >= 0 && !pthread_create(&thread, NULL, sleep_and_say, &sleeper)) {
        part(thread, &all);
        for (int i = 0; i < ROUNDS; i++) {
            usleep(REST_US);
            uint64_t began = now_us();
            (void)!write(sleeper.wake_fd, &one, sizeof one);
            (void)!read(sleeper.done_fd, &count, sizeof count);
            took[i] = __atomic_load_n(&sleeper.woken, __ATOMIC_RELAXED) - began;
        }
        pthread_join(thread, NULL);
        if (CPU_COUNT(&all))
            pthread_setaffinity_np(pthread_self(), sizeof all, &all);
    }
    if (sleeper.wake_fd >= 0)
        close(sleeper.wake_fd);
    if (sleeper.done_fd >= 0)
        close(sleeper.done_fd);
    qsort(took, ROUNDS, sizeof *took, ascending);
    return took[ROUNDS / 4];
}

/* How long looking pays on this machine, in microseconds. */
uint32_t x9_spin_us(void)
{
    uint64_t us = WAKEUPS * measure_wakeup();

    return us < LEAST_US ? LEAST_US : us > MOST_US ? MOST_US : (uint32_t)us;
}

/* Whether to look once more before sleeping: only while requests have been following each other about that closely, and
 * nobody else wants this processor. */
bool spin_on(struct x9_spin *spin, uint32_t limit_us)
{
    if (!limit_us)
        return false;
    uint64_t now = now_us();
    if (!spin->idle_since)
        spin->idle_since = now;
    else if (now - spin->last_look > limit_us / 2 + LEAST_US)
        spin->shy_until = now + SHY_US; /* somebody else ran here meanwhile */
    spin->last_look = now;
    if (!spin->dense || now < spin->shy_until || now - spin->idle_since >= limit_us)
        return false;
#ifdef __x86_64__
    __builtin_ia32_pause();
#endif
    return true;
}

/* There was work. */
void spin_found(struct x9_spin *spin, uint32_t limit_us)
{
    if (!spin->idle_since)
        return;
    spin->dense = now_us() - spin->idle_since < 2 * (uint64_t)limit_us;
    spin->idle_since = 0;
}
