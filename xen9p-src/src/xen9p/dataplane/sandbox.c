/* Shutting a worker in: a file system with nothing but its export, no rights but those on files, and of the kernel's system
 * calls those that serving takes.
 *
 * Landlock by system calls, as glibc has no functions for it. libseccomp is opened when it is needed: every Debian has the
 * library (apt wants it), and building takes no headers of it. */
#include "x9.h"

#include <dlfcn.h>
#include <fcntl.h>
#include <linux/capability.h>
#include <linux/fs.h>
#include <linux/ioprio.h>
#include <linux/landlock.h>
#include <linux/sched.h>
#include <sched.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>

typedef uint16_t domid_t;
typedef uint32_t grant_ref_t;

#include <xen/evtchn.h>
#include <xen/gntdev.h>

/* --- the file system --- */

#define CAGE "/tmp" /* where the new root is put together, out of everybody's sight; any directory would do */
#define PLAIN (MS_NOSUID | MS_NODEV | MS_NOEXEC)

/* Names the step that failed. */
static int at(const char **step, const char *name)
{
    *step = name;
    return errno ? errno : EINVAL;
}

/* Puts the calling process, which has no other thread, into namespaces of its own: no network, no System V objects. */
int x9_cage_alone(void) { return unshare(CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWUTS) ? errno : 0; }

/* A directory to be mounted at another place, without what is mounted below it. Returns a descriptor, or -1 with errno. */
static int take_tree(const char *path, bool readonly)
{
    struct mount_attr attr = {
        .attr_set = MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV | MOUNT_ATTR_NOEXEC | (readonly ? MOUNT_ATTR_RDONLY : 0),
    };
    int tree = (int)syscall(SYS_open_tree, AT_FDCWD, path, OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC);

    if (tree >= 0 && syscall(SYS_mount_setattr, tree, "", AT_EMPTY_PATH, &attr, sizeof attr)) {
        int err = errno;
        close(tree);
        errno = err;
        return -1;
    }
    return tree;
}

/* Puts what take_tree() gave into the new root. Returns whether that went well. */
static bool place_tree(int tree, const char *path)
{
    return !mkdir(path, 0555) && !syscall(SYS_move_mount, tree, "", AT_FDCWD, path, MOVE_MOUNT_F_EMPTY_PATH);
}

/* Builds a new root at CAGE: export/ is the directory at path without what is mounted below it, origin/, if that is not NULL,
 * the one that it was cloned from, proc/ shows this process alone. The old root can still be reached, until x9_cage_shut(). Returns 0 or an errno, and names the step. */
int x9_cage_build(const char *path, int readonly, const char *origin, const char **step)
{
    struct stat st;
    int err = 0;

    errno = 0;
    if (unshare(CLONE_NEWNS))
        return at(step, "making a mount namespace");
    /* What is mounted here stays here, and what the host mounts later does not come in. */
    if (mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL))
        return at(step, "making mounts private");
    int tree = take_tree(path, readonly);
    if (tree < 0)
        return at(step, "taking the export");
    int origin_tree = origin ? take_tree(origin, true) : -1; /* if it is gone, then without */
    if (fstat(tree, &st) || !S_ISDIR(st.st_mode))
        errno = ENOTDIR, err = at(step, "taking the export");
    else if (mount("none", CAGE, "tmpfs", PLAIN, "size=64k,nr_inodes=8,mode=0755"))
        err = at(step, "mounting a new root");
    else if (mkdir(CAGE "/proc", 0555))
        err = at(step, "making the new root");
    else if (!place_tree(tree, CAGE "/export"))
        err = at(step, "mounting the export");
    else if (origin_tree >= 0 && !place_tree(origin_tree, CAGE "/origin"))
        err = at(step, "mounting what the export was cloned from");
    /* /proc/self/fd turns an O_PATH descriptor into one for I/O. Other processes are not to be seen. */
    else if (mount("proc", CAGE "/proc", "proc", PLAIN | MS_RDONLY, "hidepid=ptraceable,subset=pid"))
        err = at(step, "mounting proc");
    else if (mount(NULL, CAGE, NULL, PLAIN | MS_REMOUNT | MS_BIND | MS_RDONLY, NULL))
        err = at(step, "making the new root read-only");
    close(tree);
    if (origin_tree >= 0)
        close(origin_tree);
    return err;
}

/* The new root becomes the root; nothing leads back. The caller holds no directory of the old one any more. */
int x9_cage_shut(const char **step)
{
    errno = 0;
    if (chdir(CAGE) || syscall(SYS_pivot_root, ".", "."))
        return at(step, "changing the root");
    /* Now the old root lies over the new one. */
    if (umount2(".", MNT_DETACH) || chdir("/"))
        return at(step, "leaving the old root");
    return 0;
}

/* --- rights --- */

/* Keeps these capabilities (bit n: capability n) at the most, in every set, for good. */
int x9_drop_capabilities(uint64_t keep)
{
    struct __user_cap_header_struct header = {_LINUX_CAPABILITY_VERSION_3, 0};
    struct __user_cap_data_struct sets[2];

    for (int cap = 0; cap < 64; cap++)
        /* EINVAL: the kernel knows no more. EPERM: an unprivileged server has none to give away. */
        if (!(keep >> cap & 1) && prctl(PR_CAPBSET_DROP, cap, 0, 0, 0) && errno != EINVAL && errno != EPERM)
            return errno;
    prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0);
    if (syscall(SYS_capget, &header, sets))
        return errno;
    for (int i = 0; i < 2; i++) {
        sets[i].permitted &= (uint32_t)(keep >> 32 * i);
        sets[i].effective = sets[i].permitted;
        sets[i].inheritable = 0;
    }
    return syscall(SYS_capset, &header, sets) ? errno : 0;
}

/* No program gives new rights, nobody looks into our memory, no core files. */
int x9_no_new_privileges(void)
{
    if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) || prctl(PR_SET_DUMPABLE, 0, 0, 0, 0))
        return errno;
    return 0;
}

/* --- Landlock --- */

/* Newer than the headers of Debian 12. */
#define TRUNCATE (UINT64_C(1) << 14)
#define IOCTL_DEV (UINT64_C(1) << 15)
#define NET_BIND_CONNECT UINT64_C(3)
#define SCOPE_ABSTRACT_AND_SIGNAL UINT64_C(3)

static int allow_beneath(int ruleset, int fd, uint64_t rights)
{
    struct landlock_path_beneath_attr rule = {.allowed_access = rights, .parent_fd = fd};

    return (int)syscall(SYS_landlock_add_rule, ruleset, LANDLOCK_RULE_PATH_BENEATH, &rule, 0);
}

/* From now on this process opens and changes nothing but what is beneath export_fd; beneath remove_fd, if that is not -1, it
 * may remove files, and beneath origin_fd, if that is not -1, read. Wants no_new_privs. Returns the version of Landlock, 0
 * where there is none that does, or -errno. */
int x9_landlock(int export_fd, int readonly, int remove_fd, int origin_fd)
{
    struct {
        uint64_t fs, net, scoped;
    } attr = {0};
    int abi = (int)syscall(SYS_landlock_create_ruleset, NULL, 0, LANDLOCK_CREATE_RULESET_VERSION);

    /* Version 1 forbids every rename from one directory to another. */
    if (abi < 2)
        return 0;
    attr.fs = (LANDLOCK_ACCESS_FS_REFER << 1) - 1;
    if (abi >= 3)
        attr.fs |= TRUNCATE;
    if (abi >= 5)
        attr.fs |= IOCTL_DEV;
    attr.net = NET_BIND_CONNECT, attr.scoped = SCOPE_ABSTRACT_AND_SIGNAL;
    size_t size = abi >= 6 ? sizeof attr : abi >= 4 ? 2 * sizeof(uint64_t) : sizeof(uint64_t);
    int ruleset = (int)syscall(SYS_landlock_create_ruleset, &attr, size, 0);
    if (ruleset < 0)
        return -errno;
    uint64_t reading = LANDLOCK_ACCESS_FS_READ_FILE | LANDLOCK_ACCESS_FS_READ_DIR;
    uint64_t all = attr.fs & ~(LANDLOCK_ACCESS_FS_EXECUTE | IOCTL_DEV);
    int err = 0;
    if (allow_beneath(ruleset, export_fd, readonly ? reading : all) ||
        (remove_fd >= 0 && allow_beneath(ruleset, remove_fd, LANDLOCK_ACCESS_FS_REMOVE_FILE)) ||
        (origin_fd >= 0 && allow_beneath(ruleset, origin_fd, reading)) ||
        syscall(SYS_landlock_restrict_self, ruleset, 0))
        err = errno;
    close(ruleset);
    return err ? -err : abi;
}

/* --- system calls --- */

/* What serving takes: files by descriptor, the rings, sockets that are there already, threads, time, memory. */
static const char *const allowed[] = {
    /* files */
    "open", "openat", "openat2", "close", "close_range", "dup", "read", "write", "readv", "writev", "pread64", "pwrite64", "preadv",
    "preadv2", "pwritev", "pwritev2", "lseek", "getdents64", "newfstatat", "fstat", "stat", "lstat", "statx", "fstatfs", "statfs",
    "readlinkat", "readlink", "access", "faccessat", "faccessat2", "mkdirat", "mkdir", "mknodat", "mknod", "unlinkat", "unlink",
    "rmdir", "renameat", "renameat2", "rename", "linkat", "link", "symlinkat", "symlink", "fchmod", "fchmodat", "chmod", "fchown",
    "fchownat", "chown", "lchown", "truncate", "ftruncate", "fallocate", "utimensat", "fsync", "fdatasync", "sync_file_range", "syncfs", "copy_file_range", "fadvise64", "mincore", "umask", "flock",
    "fcntl", "getxattr", "lgetxattr", "fgetxattr", "setxattr", "lsetxattr", "fsetxattr", "listxattr", "llistxattr", "flistxattr",
    "removexattr", "lremovexattr", "fremovexattr", "getcwd",
    /* for whom: per thread, and never more than the process has */
    "setfsuid", "setfsgid", "setgroups", "getgroups", "capget", "capset", "getuid", "geteuid", "getgid", "getegid",
    /* sockets: what is there, and who knocks; nothing new */
    "accept", "accept4", "recvfrom", "recvmsg", "sendto", "sendmsg", "shutdown", "getsockopt", "setsockopt", "getsockname",
    "getpeername",
    /* waiting */
    "poll", "ppoll", "select", "pselect6", "epoll_create1", "epoll_ctl", "epoll_wait", "epoll_pwait", "eventfd2", "pipe2",
    "timerfd_create", "timerfd_settime", "futex", "sched_yield", "nanosleep", "clock_nanosleep", "clock_gettime", "clock_getres",
    "gettimeofday", "time", "restart_syscall",
    /* threads, memory, ourselves */
    "brk", "munmap", "mremap", "madvise", "membarrier", "rseq", "set_robust_list", "get_robust_list", "set_tid_address",
    "sched_getaffinity", "sched_setaffinity", "getpid", "gettid", "getppid", "getrandom", "getrusage", "times", "sysinfo",
    "uname", "getcpu", "rt_sigaction", "rt_sigprocmask", "rt_sigreturn", "sigaltstack", "exit", "exit_group",
};

/* ioctl(2) by request: the rings' devices, and what Python asks of sockets and files. */
static const unsigned long requests[] = {
    IOCTL_EVTCHN_NOTIFY, IOCTL_EVTCHN_BIND_INTERDOMAIN, IOCTL_EVTCHN_UNBIND, IOCTL_GNTDEV_MAP_GRANT_REF,
    IOCTL_GNTDEV_UNMAP_GRANT_REF, FIONBIO, FIOCLEX, TCGETS, FS_IOC_GETVERSION,
};

/* The ABI of libseccomp 2, as far as it is used (seccomp.h of libseccomp). */
enum { OP_EQ = 4, OP_MASKED_EQ = 7 };
enum { ATTR_SSB = 7, ATTR_OPTIMIZE = 8 };
#define ACT_ALLOW 0x7fff0000u
#define ACT_ERRNO(e) (0x00050000u | (uint32_t)(e))

struct arg_cmp {
    unsigned int arg;
    int op;
    uint64_t a, b;
};

struct seccomp {
    void *(*init)(uint32_t);
    int (*attr_set)(void *, int, uint32_t);
    int (*resolve)(const char *);
    int (*rule_add)(void *, uint32_t, int, unsigned int, const struct arg_cmp *);
    int (*load)(const void *);
    void (*release)(void *);
};

static bool find(void *library, const char *name, void *to)
{
    void *symbol = dlsym(library, name);

    memcpy(to, &symbol, sizeof symbol); /* ISO C has no cast from a pointer to data to one to a function */
    return symbol;
}

static int rule(const struct seccomp *s, void *to, uint32_t action, const char *name, struct arg_cmp *cmp)
{
    int number = s->resolve(name);

    /* This machine may not have it (an old kernel's, or another architecture's). */
    return number < 0 ? 0 : s->rule_add(to, action, number, cmp ? 1 : 0, cmp);
}

static int fill(const struct seccomp *s, void *to)
{
    struct arg_cmp thread = {0, OP_MASKED_EQ, CLONE_THREAD, CLONE_THREAD};
    struct arg_cmp no_exec = {2, OP_MASKED_EQ, PROT_EXEC, 0};
    struct arg_cmp myself = {0, OP_EQ, 0, 0};
    struct arg_cmp naming = {0, OP_EQ, PR_SET_NAME, 0};
    struct arg_cmp own_io[2] = {{0, OP_EQ, IOPRIO_WHO_PROCESS, 0}, {1, OP_EQ, 0, 0}};
    int err = 0;

    for (size_t i = 0; i < sizeof allowed / sizeof *allowed && !err; i++)
        err = rule(s, to, ACT_ALLOW, allowed[i], NULL);
    for (size_t i = 0; i < sizeof requests / sizeof *requests && !err; i++) {
        struct arg_cmp request = {1, OP_MASKED_EQ, 0xffffffff, requests[i]}; /* the kernel looks at 32 bits */
        err = rule(s, to, ACT_ALLOW, "ioctl", &request);
    }
    /* Threads yes, processes and namespaces no. clone3 hides its flags, so it is not there; glibc falls back. */
    err = err ? err : rule(s, to, ACT_ALLOW, "clone", &thread);
    err = err ? err : rule(s, to, ACT_ERRNO(ENOSYS), "clone3", NULL);
    /* No new code. */
    err = err ? err : rule(s, to, ACT_ALLOW, "mmap", &no_exec);
    err = err ? err : rule(s, to, ACT_ALLOW, "mprotect", &no_exec);
    err = err ? err : rule(s, to, ACT_ALLOW, "prlimit64", &myself);
    err = err ? err : rule(s, to, ACT_ALLOW, "prctl", &naming);
    int ioprio_set = s->resolve("ioprio_set"); /* of the thread that asks alone */
    err = err ? err : s->rule_add(to, ACT_ALLOW, ioprio_set, 2, own_io);
    return err;
}

static struct seccomp seccomp;
static void *filter; /* stays for good: a zygote makes it once for all its workers */

/* Finds libseccomp and makes the filter, while there are files to be found. Returns 0 or an errno: ENOENT without it. */
int x9_seccomp_prepare(void)
{
    struct seccomp *s = &seccomp;

    if (filter)
        return 0;
    void *library = dlopen("libseccomp.so.2", RTLD_NOW | RTLD_LOCAL);
    if (!library)
        return ENOENT;
    if (!find(library, "seccomp_init", &s->init) || !find(library, "seccomp_attr_set", &s->attr_set) ||
        !find(library, "seccomp_syscall_resolve_name", &s->resolve) || !find(library, "seccomp_rule_add_array", &s->rule_add) ||
        !find(library, "seccomp_load", &s->load) || !find(library, "seccomp_release", &s->release))
        return ENOENT;
    void *made = s->init(ACT_ERRNO(EPERM));
    if (!made)
        return ENOMEM;
    s->attr_set(made, ATTR_OPTIMIZE, 2); /* a tree and no list; older versions do not know it */
    s->attr_set(made, ATTR_SSB, 1);      /* kernels before 5.16 make a filtered process slow without it */
    int err = fill(s, made);
    if (err)
        s->release(made);
    else
        filter = made;
    return -err;
}

/* Allows the system calls above to this thread and those that it starts, and answers all others with EPERM. After
 * x9_seccomp_prepare(). Returns 0 or an errno. */
int x9_seccomp(void) { return filter ? -seccomp.load(filter) : ENOENT; }
