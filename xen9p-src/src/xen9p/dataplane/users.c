/* Whose rights a thread has, and what the numbers of the guest's users and groups mean here.
 *
 * Two ways. The guest's kernel decides (checks off): threads have all rights on files, and take a user's number only to make
 * something. Or the host's kernel decides (checks on): before anything that it checks, a thread takes the user's numbers and
 * groups and lays down the capabilities that would spare it the check; nothing is checked here that the kernel checks.
 * A change of identity takes up to four system calls, so a thread keeps the one that it has until another is asked for.
 * Whatever acts for the server itself says so: act_as_server(). */
#include "x9.h"

#include <fcntl.h>
#include <linux/capability.h>
#include <linux/securebits.h>
#include <sys/fsuid.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>

#define OVERFLOW_ID 65534u /* as user namespaces show what is not mapped, and who acts for such a user */
#define GROUPS_MOST 1024u  /* of a user */
#define BIT(cap) (UINT32_C(1) << (cap))
/* What it takes to take the next identity. No right on files. */
#define KEPT (BIT(CAP_SETUID) | BIT(CAP_SETGID))

struct user {
    uint32_t uid, ngids;
    const uint32_t *gids; /* the first is its own */
};

/* Made whole and never changed; the device keeps those of before, as messages may be at them. */
struct x9_who {
    struct x9_users is;
    struct user *users; /* by uid, ascending */
    uint32_t nusers;
    uint64_t serial; /* of all that were ever made: tells whose groups a thread has */
    struct x9_who *older;
    uint32_t words[]; /* ranges and groups */
};

static const struct x9_who as_is; /* no checks, all numbers as they are */

__thread struct x9_me me = {.known = true};

/* --- numbers --- */

static uint32_t through(const x9_range *ranges, uint32_t count, uint32_t id, bool back)
{
    for (uint32_t i = 0; i < count; i++) {
        uint32_t from = back ? ranges[i].host : ranges[i].guest, to = back ? ranges[i].guest : ranges[i].host;
        if (id >= from && id - from < ranges[i].count)
            return to + (id - from);
    }
    return X9_NOID;
}

static uint32_t here(const x9_users *is, const x9_range *ranges, uint32_t count, uint32_t squash, uint32_t id)
{
    if (id == X9_NOID)
        return X9_NOID;
    if (is->squash == X9_SQUASH_ALL || (is->squash == X9_SQUASH_ROOT && !id))
        return squash;
    return is->mapped ? through(ranges, count, id, false) : id;
}

static const struct x9_who *who(const struct x9_dev *dev)
{
    const struct x9_who *now = __atomic_load_n(&dev->who, __ATOMIC_ACQUIRE);

    return now ? now : &as_is;
}

static uint32_t uid_here(const struct x9_who *w, uint32_t uid)
{
    return here(&w->is, w->is.uids, w->is.nuids, w->is.squash_uid, uid);
}

static uint32_t gid_here(const struct x9_who *w, uint32_t gid)
{
    return here(&w->is, w->is.gids, w->is.ngids, w->is.squash_gid, gid);
}

/* The host's number for the guest's; X9_NOID if there is none. */
uint32_t host_uid(const struct x9_dev *dev, uint32_t uid) { return uid_here(who(dev), uid); }
uint32_t host_gid(const struct x9_dev *dev, uint32_t gid) { return gid_here(who(dev), gid); }

/* The guest's number for the host's. */
uint32_t shown_uid(const struct x9_dev *dev, uint32_t uid)
{
    const x9_users *is = &who(dev)->is;
    uint32_t id = is->mapped ? through(is->uids, is->nuids, uid, true) : uid;

    return id == X9_NOID ? OVERFLOW_ID : id;
}

uint32_t shown_gid(const struct x9_dev *dev, uint32_t gid)
{
    const x9_users *is = &who(dev)->is;
    uint32_t id = is->mapped ? through(is->gids, is->ngids, gid, true) : gid;

    return id == X9_NOID ? OVERFLOW_ID : id;
}

/* --- rights --- */

static const struct user *user_of(const struct x9_who *w, uint32_t uid)
{
    uint32_t low = 0, high = w->nusers;

    while (low < high) {
        uint32_t mid = (low + high) / 2;
        if (w->users[mid].uid == uid)
            return &w->users[mid];
        if (w->users[mid].uid < uid)
            low = mid + 1;
        else
            high = mid;
    }
    return NULL;
}

/* The permitted ones stay: with them a thread that has laid the others down takes them up again. */
static int have_capabilities(bool all)
{
    struct __user_cap_header_struct header = {_LINUX_CAPABILITY_VERSION_3, 0};
    struct __user_cap_data_struct sets[2];

    if (syscall(SYS_capget, &header, sets))
        return errno;
    sets[0].effective = all ? sets[0].permitted : sets[0].permitted & KEPT;
    sets[1].effective = all ? sets[1].permitted : 0;
    return syscall(SYS_capset, &header, sets) ? errno : 0;
}

/* Whether this process can take other identities at all, and lay capabilities down. Returns 0 or an errno. */
static int can_change(void)
{
    struct __user_cap_header_struct header = {_LINUX_CAPABILITY_VERSION_3, 0};
    struct __user_cap_data_struct sets[2];

    if (syscall(SYS_capget, &header, sets))
        return errno;
    return (sets[0].permitted & KEPT) == KEPT ? 0 : EPERM;
}

/* By system call, as glibc's wrappers are for the whole process and these for the thread. groups NULL: whatever they are. */
static int become(const struct x9_me *want, const struct user *groups)
{
    struct x9_me had = me;
    int err = 0;

    me.known = false; /* until all of it has worked: the next one does all of it again */
    if (!had.known || want->bare != had.bare)
        err = have_capabilities(!want->bare);
    if (!err && groups && (!had.known || want->serial != had.serial || want->groups != had.groups) &&
        syscall(SYS_setgroups, groups->ngids, groups->gids))
        err = errno;
    if (err)
        return err;
    bool other_gid = !had.known || want->gid != had.gid, other_uid = !had.known || want->uid != had.uid;
    if (other_gid)
        setfsgid(want->gid);
    if (other_uid)
        setfsuid(want->uid);
    /* They say what was before, and nothing of failing (setfsuid(2)); -1 changes nothing. */
    bool failed = (other_gid && (uint32_t)setfsgid(X9_NOID) != want->gid) ||
                  (other_uid && (uint32_t)setfsuid(X9_NOID) != want->uid);
    if (failed && (want->bare || !can_change()))
        return EPERM; /* where the guest's kernel decides, a server that never could just owns what is made */
    me = *want;
    if (!groups)
        me.serial = had.serial, me.groups = had.groups;
    me.known = true;
    return 0;
}

/* All rights on files, and root's number. */
void act_as_server(void)
{
    static const struct x9_me root = {.known = true};

    if (!me.known || me.uid || me.gid || me.bare)
        become(&root, NULL);
}

/* As a user of the host with its groups; a user without any listed has the one that is its own. */
static int act_as_user(const struct x9_who *w, uint32_t uid, uint32_t gid, const struct user *user)
{
    static const struct user nobody; /* no groups */
    struct x9_me want = {.known = true, .bare = true, .uid = uid, .gid = gid, .serial = w->serial, .groups = X9_NOID};

    if (user)
        want.groups = uid;
    else
        want.serial = 0; /* no groups are the same in all */
    return become(&want, user ? user : &nobody);
}

static uint32_t own_group(const struct x9_who *w, const struct user *user, uint32_t guest_uid)
{
    uint32_t gid = user ? user->gids[0] : gid_here(w, guest_uid);

    return gid == X9_NOID ? OVERFLOW_ID : gid;
}

/* The slow part of act_as(). Returns 0 or an errno. */
int act_as_slowly(const struct x9_dev *dev, uint32_t guest_uid)
{
    const struct x9_who *w = who(dev);
    uint32_t uid = uid_here(w, guest_uid);

    if (!w->is.checks || !uid) {
        act_as_server();
        return me.known ? 0 : EPERM;
    }
    const struct user *user = uid == X9_NOID ? NULL : user_of(w, uid);
    return act_as_user(w, uid == X9_NOID ? OVERFLOW_ID : uid, own_group(w, user, uid == X9_NOID ? X9_NOID : guest_uid), user);
}

/* For a write to an open file, whose rights were looked at when it was opened: all that matters is that a user's writing
 * takes the set-id bits off, which CAP_FSETID would keep. */
int act_to_write(const struct x9_dev *dev, uint32_t guest_uid)
{
    const struct x9_who *w = who(dev);

    return !w->is.checks || (me.known && me.bare) || !uid_here(w, guest_uid) ? 0 : act_as_slowly(dev, guest_uid);
}

/* For making something that shall belong to this user and group.
 *
 * Where the host checks, the group of the message says nothing about what the caller may do. If it is one of the groups that
 * are listed for the user, what is made gets it. If groups are listed and it is not among them, it gets the user's own. If
 * none are listed, *give is set: give_group() gives it away afterwards.
 * Returns 0 or an errno: EOVERFLOW, for who has no number here. */
int act_to_make(const struct x9_dev *dev, uint32_t guest_uid, uint32_t guest_gid, uint32_t *give)
{
    const struct x9_who *w = who(dev);
    uint32_t uid = uid_here(w, guest_uid), gid = gid_here(w, guest_gid);

    *give = X9_NOID;
    if (uid == X9_NOID || gid == X9_NOID)
        return EOVERFLOW;
    if (!w->is.checks || !uid) {
        struct x9_me want = {.known = true, .uid = uid, .gid = gid};
        return become(&want, NULL);
    }
    const struct user *user = user_of(w, uid);
    uint32_t own = own_group(w, user, guest_uid);
    if (!user && gid != own)
        *give = gid;
    for (uint32_t i = 0; user && i < user->ngids; i++)
        if (user->gids[i] == gid)
            own = gid;
    return act_as_user(w, uid, own, user);
}

/* After something was made: where the guest's kernel decides, threads go back to all rights under root's number. */
void act_done(const struct x9_dev *dev)
{
    if (!who(dev)->is.checks)
        act_as_server();
}

/* Gives what this thread has just made in dir to a group, unless the directory decides about that, or somebody has put
 * another's file under its name meanwhile. Not with the rights of that group: set-group-id goes, and stays the server's to
 * refuse. Returns 0 or an errno. */
int give_group(int dir, int fd, uint32_t gid)
{
    char path[X9_FD_PATH];
    struct stat st;

    if (gid == X9_NOID)
        return 0;
    if (fstatat(dir, "", &st, AT_EMPTY_PATH))
        return errno;
    if (st.st_mode & S_ISGID)
        return 0;
    if (fstatat(fd, "", &st, AT_EMPTY_PATH))
        return errno;
    if (st.st_uid != me.uid || st.st_gid != me.gid)
        return 0;
    act_as_server();
    if (fchownat(fd, "", (uid_t)-1, gid, AT_EMPTY_PATH))
        return errno;
    if (S_ISLNK(st.st_mode) || !(st.st_mode & (S_ISUID | S_ISGID)))
        return 0;
    fd_path(path, fd);
    return chmod(path, st.st_mode & 07777 & ~(mode_t)S_ISGID) ? errno : 0;
}

bool checks_here(const struct x9_dev *dev) { return who(dev)->is.checks; }

/* --- for Python --- */

int x9_act_as(x9_dev *dev, uint32_t guest_uid) { return act_as(dev, guest_uid); }
int x9_act_to_make(x9_dev *dev, uint32_t uid, uint32_t gid, uint32_t *give) { return act_to_make(dev, uid, gid, give); }
void x9_act_as_server(void) { act_as_server(); }
void x9_act_done(x9_dev *dev) { act_done(dev); }
int x9_give_group(int dir, int fd, uint32_t gid) { return give_group(dir, fd, gid); }

/* Changing the filesystem uid must not change capabilities by itself: what a thread has is decided here alone. Inherited by
 * threads that start later. */
int x9_keep_capabilities(void)
{
    return prctl(PR_SET_SECUREBITS, SECBIT_NO_SETUID_FIXUP, 0, 0, 0) ? errno : 0;
}

/* Counts the users in groups: uid, count, gids. Returns -1 if it does not come out even, a count is wrong or uids fall. */
static int64_t count_users(const uint32_t *groups, uint32_t words)
{
    int64_t users = 0, last = -1;

    for (uint32_t at = 0; at < words; users++) {
        if (words - at < 3 || groups[at] <= last || !groups[at + 1] || groups[at + 1] > GROUPS_MOST ||
            groups[at + 1] > words - at - 2)
            return -1;
        last = groups[at];
        at += 2 + groups[at + 1];
    }
    return users;
}

/* What the guest's users are and may from now on, also those that are attached. Copies all of it.
 * Returns 0 or an errno: EPERM, this process cannot act as others; EINVAL. */
int x9_dev_set_users(x9_dev *dev, const x9_users *given)
{
    static uint64_t serials;
    int64_t nusers = count_users(given->groups, given->ngroups);
    int err = given->checks ? can_change() : 0;

    if (err || nusers < 0)
        return err ? err : EINVAL;
    size_t ranges = (size_t)given->nuids + given->ngids, size = ranges * sizeof(x9_range);
    struct x9_who *w = calloc(1, sizeof *w + size + given->ngroups * sizeof(uint32_t));
    struct user *users = calloc((size_t)nusers + 1, sizeof *users);
    if (!w || !users) {
        free(w), free(users);
        return ENOMEM;
    }
    x9_range *uids = (x9_range *)(void *)w->words;
    uint32_t *groups = w->words + size / sizeof(uint32_t);
    if (given->nuids)
        memcpy(uids, given->uids, given->nuids * sizeof *uids);
    if (given->ngids)
        memcpy(uids + given->nuids, given->gids, given->ngids * sizeof *uids);
    if (given->ngroups)
        memcpy(groups, given->groups, given->ngroups * sizeof *groups);
    w->is = *given;
    w->is.uids = uids, w->is.gids = uids + given->nuids, w->is.groups = groups;
    for (uint32_t at = 0; at < given->ngroups; at += 2 + groups[at + 1])
        users[w->nusers++] = (struct user){groups[at], groups[at + 1], groups + at + 2};
    w->users = users;
    w->serial = __atomic_add_fetch(&serials, 1, __ATOMIC_RELAXED);
    w->older = dev->who;
    __atomic_store_n(&dev->who, w, __ATOMIC_RELEASE);
    __atomic_store_n(&dev->act, given->checks || w->older, __ATOMIC_RELEASE);
    return 0;
}

void users_free(struct x9_dev *dev)
{
    for (struct x9_who *w = dev->who, *older; w; w = older) {
        older = w->older;
        free(w->users);
        free(w);
    }
    dev->who = NULL;
}
