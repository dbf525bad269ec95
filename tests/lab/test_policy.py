"""Who may have what: read-only, refusals, attach and detach by hand."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from lab import BACKEND, MOUNT, Dom0, connect, scratch, wait_until


def test_readonly_is_readonly(dom0: Dom0) -> None:
    g1 = connect("g1")
    dom0.out("echo lesson > /srv/xen9p/course/lesson-test")
    assert g1.check_output("cat /course/lesson-test") == "lesson"
    assert "Read-only file system" in g1.run("touch /course/mine").stderr
    # The guest's own `ro` flag is not what protects it: the server refuses too.
    remount = g1.run("mount -o remount,rw /course && touch /course/mine")
    g1.run("mount -o remount,ro /course")
    assert "Read-only file system" in remount.stderr
    assert g1.run("rm /course/lesson-test").rc != 0
    assert dom0.out("ls /srv/xen9p/course/ | grep -c mine || true").strip() == "0"
    dom0.out("rm /srv/xen9p/course/lesson-test")


def test_another_guests_root_is_refused(dom0: Dom0) -> None:
    result = dom0.run("xen9p attach g1 g2-root")
    assert result.rc == 1
    assert "g2-root" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert "Traceback" not in result.stderr
    assert dom0.device("g1", "g2-root") is None


def test_unknown_things_are_named(dom0: Dom0) -> None:
    for command, name in (
        ("xen9p attach nobody home", "nobody"),
        ("xen9p attach g1 nothing", "nothing"),
        ("xen9p detach g1 nothing", "nothing"),
    ):
        result = dom0.run(command)
        assert result.rc == 1
        assert name in result.stderr
        assert len(result.stderr.strip().splitlines()) == 1


def test_a_forged_aname_is_refused(dom0: Dom0) -> None:
    g1 = connect("g1")
    result = g1.run(f"mkdir -p /mnt/x; {MOUNT},aname=/srv/xen9p/guests/g2 home /mnt/x")
    g1.run("umount /mnt/x; rmdir /mnt/x")
    assert result.rc != 0
    # The failed mount has taken the tag's device over: mount it again.
    g1.check_output("umount -l /home; mount /home")
    assert g1.run("ls /home").rc == 0


def test_detach_and_attach_by_hand(dom0: Dom0) -> None:
    g1 = connect("g1")
    before = dom0.device("g1", "course")
    assert before is not None
    g1.check_output("umount /course")
    dom0.out("xen9p detach g1 course")
    wait_until("the device is gone", lambda: dom0.device("g1", "course") is None, 20)
    assert str(before["devid"]) not in dom0.backends(before["domid"])
    assert dom0.run(f"test -d /proc/{before['pid']}").rc != 0
    assert "home" in g1.check_output("cat /proc/mounts"), "the others go on"

    dom0.out("xen9p attach g1 course")
    wait_until("the device is back", lambda: dom0.connected("g1", "course"), 30)
    g1.check_output("mount /course")
    assert g1.run("touch /course/x").rc != 0
    assert dom0.store(f"{BACKEND}/{before['domid']}/{dom0.device('g1', 'course')['devid']}/state") == "4"  # type: ignore[index]


def test_a_rule_added_while_guests_run(dom0: Dom0) -> None:
    """A new export and rule reach a running guest by a reload; taking them away again disturbs no mount."""
    g1 = connect("g1")
    pids = dom0.pids()
    dom0.out(
        "mkdir -p /srv/xen9p/extra && echo extra > /srv/xen9p/extra/f && cp /etc/xen9p/policy.toml /tmp/policy.keep"
    )
    try:
        dom0.out(
            'printf \'\\n[exports.extra]\\npath = "/srv/xen9p/extra"\\n[[rules]]\\nguest = "g1"\\nexport = "extra"\\n'
            'tag = "extra"\\naccess = "rw"\\nattach = "auto"\\n\' >> /etc/xen9p/policy.toml && systemctl reload xen9pd'
        )
        wait_until("the new device is connected", lambda: dom0.connected("g1", "extra"), 30)
        g1.check_output(f"mkdir -p /mnt/extra && {MOUNT},cache=none extra /mnt/extra")
        assert g1.check_output("cat /mnt/extra/f") == "extra"
        g1.check_output("echo back > /mnt/extra/g && umount /mnt/extra")
        assert dom0.out("cat /srv/xen9p/extra/g").strip() == "back"
    finally:
        dom0.run(
            "xen9p detach g1 extra; cp /tmp/policy.keep /etc/xen9p/policy.toml; systemctl reload xen9pd;"
            " rm -rf /srv/xen9p/extra"
        )
    wait_until("the device is gone", lambda: dom0.device("g1", "extra") is None, 20)
    assert dom0.pids() == pids


def test_a_bad_policy_changes_nothing(dom0: Dom0) -> None:
    pids = dom0.pids()
    dom0.out("cp /etc/xen9p/policy.toml /tmp/policy.keep; echo 'nonsense = 1' >> /etc/xen9p/policy.toml")
    dom0.run("systemctl reload xen9pd")
    try:
        assert dom0.host.service("xen9pd").is_running
        assert dom0.pids() == pids
        assert "nonsense" in dom0.out("journalctl -u xen9pd -n 20 --no-pager")
    finally:
        dom0.out("cp /tmp/policy.keep /etc/xen9p/policy.toml; systemctl reload xen9pd")


# What a guest's users may, and what they are on the host.

# A user that the guest's root has made, with the right to pass by its kernel's checks.
LIAR = (
    "setpriv --reuid 1002 --regid 1002 --clear-groups --inh-caps +dac_override,+dac_read_search"
    " --ambient-caps +dac_override,+dac_read_search"
)
KEEP = "/tmp/policy.keep"


@contextmanager
def rules(dom0: Dom0, text: str, tags: dict[str, str]) -> Iterator[None]:
    """More rules while the block runs, and afterwards none of the devices (guest -> tag) that they gave."""
    dom0.out(f"cp /etc/xen9p/policy.toml {KEEP}")
    try:
        set_rules(dom0, text)
        yield
    finally:
        dom0.out(f"cp {KEEP} /etc/xen9p/policy.toml && systemctl reload xen9pd")
        for guest, tag in tags.items():
            dom0.run(f"xen9p detach {guest} {tag}")
            wait_until("the device is gone", lambda guest=guest, tag=tag: dom0.device(guest, tag) is None, 20)  # type: ignore[misc]


def set_rules(dom0: Dom0, text: str) -> None:
    dom0.out(f"cp {KEEP} /etc/xen9p/policy.toml && cat >> /etc/xen9p/policy.toml <<'EOF'\n{text}\nEOF\n")
    dom0.out("xen9p policy check && systemctl reload xen9pd")


def rule(guest: str, export: str, path: str, terms: str) -> str:
    return f"""
[exports.{export}]
path = "{path}"
[[rules]]
guest = "{guest}"
export = "{export}"
access = "rw"
{terms}
"""


@contextmanager
def in_guest(dom0: Dom0, guest: str, tag: str) -> Iterator[str]:
    """The device mounted, without a cache."""
    g, path = connect(guest), f"/mnt/{tag}"
    wait_until("the device is connected", lambda: dom0.device(guest, tag) is not None, 30)
    g.check_output(f"mkdir -p {path} && {MOUNT},cache=none {tag} {path}")
    try:
        yield path
    finally:
        g.run(f"umount {path} || umount -l {path}; rmdir {path}")


def test_the_host_checks_what_a_user_may(dom0: Dom0) -> None:
    """A 0600 file of another is not to be read, whatever the guest's kernel lets through; on its own root it is."""
    g1 = connect("g1")
    with scratch(g1, "/home/checked") as shared, scratch(g1, "/var/tmp/unchecked") as own:
        for path in (shared, own):
            g1.check_output(
                f"chmod 1777 {path}; echo secret > {path}/f; chown 1001:1001 {path}/f; chmod 600 {path}/f;"
                f" mkdir {path}/d; chown 1001:1001 {path}/d; chmod 700 {path}/d"
            )
        assert g1.check_output(f"{LIAR} cat {own}/f") == "secret"
        for command in (f"cat {shared}/f", f"ls {shared}/d", f"sh -c 'echo x >> {shared}/f'", f"touch {shared}/d/x",
                        f"mv {shared}/f {shared}/mine", f"rm -f {shared}/f"):  # fmt: skip
            result = g1.run(f"{LIAR} {command}")
            assert result.rc != 0, command
            assert "ermission denied" in result.stderr or "not permitted" in result.stderr, command
        assert g1.check_output(f"setpriv --reuid 1001 --regid 1001 --clear-groups cat {shared}/f") == "secret"
        assert dom0.out("cat /srv/xen9p/home/checked/f").strip() == "secret"


def test_numbers_and_terms_change_under_a_mount(dom0: Dom0) -> None:
    """Ranges, then a squash, then no special files, by reload: worker, mount and open files stay."""
    g1, path = connect("g1"), "/srv/xen9p/home/.mapped"
    dom0.out(
        f"mkdir -p {path} && chmod 777 {path}"
    )  # sticky: a guest with fs.protected_regular refuses files of others
    ranges = rule("g1", "mapped", path, "special = true\nidentity = {map = [[0, 100000, 65536]]}")
    squash = rule("g1", "mapped", path, "identity = {squash = {uid = 4321, gid = 4322}}")
    try:
        with rules(dom0, ranges, {"g1": "mapped"}), in_guest(dom0, "g1", "mapped") as there:
            g1.check_output(f"cd {there} && echo root > r && mkfifo fifo && setpriv --reuid 1000 --regid 1000"
                            f" --clear-groups sh -c 'umask 077; echo user > u'")  # fmt: skip
            assert dom0.out(f"cd {path} && stat -c '%n %u %g' r u").split("\n")[:2] == [
                "r 100000 100000",
                "u 101000 101000",
            ]
            assert g1.check_output(f"cd {there} && stat -c '%n %u %g' r u").split("\n") == ["r 0 0", "u 1000 1000"]
            # Root of the guest is nobody in particular, though its own kernel lets it do all.
            assert "ermission denied" in g1.run(f"cat {there}/u").stderr
            dom0.out(f"echo host > {path}/h && chmod 644 {path}/h")
            assert g1.check_output(f"stat -c '%u %g' {there}/h; cat {there}/h").split() == ["65534", "65534", "host"]
            assert g1.run(f"chown 0 {there}/h").rc != 0
            assert g1.run(f"mknod {there}/null c 1 3").rc != 0

            pid = dom0.pid("g1", "mapped")
            g1.check_output(f"(exec 3> {there}/open; sleep 8; echo late >&3) > /dev/null 2>&1 &")
            wait_until("the file is open", lambda: g1.run(f"test -e {there}/open").rc == 0, 10)
            set_rules(dom0, squash)
            wait_until("the new terms are in force", lambda: g1.run(f"mkfifo {there}/fifo2").rc != 0, 15)
            g1.check_output(f"echo x > {there}/squashed")
            assert dom0.out(f"stat -c '%u %g' {path}/squashed").split() == ["4321", "4322"]
            wait_until("the file that was open is written", lambda: dom0.out(f"cat {path}/open").strip() == "late", 30)
            assert dom0.pid("g1", "mapped") == pid

            set_rules(dom0, squash.replace('"rw"', '"ro"'))
            device = dom0.device("g1", "mapped")
            assert device is not None
            assert device["pending"] == "access ro"
            assert "pending g1 mapped: at its next attach: access ro" in dom0.out("xen9p status")
            g1.check_output(f"echo x > {there}/still-writable")
    finally:
        dom0.out(f"rm -rf {path}")


def test_no_special_files(dom0: Dom0) -> None:
    """Not even by the guest's root, where the guest checks."""
    g1, path = connect("g1"), "/srv/xen9p/home/.plain"
    dom0.out(f"mkdir -p {path}")
    try:
        with (
            rules(dom0, rule("g1", "plain", path, 'checks = "guest"'), {"g1": "plain"}),
            in_guest(dom0, "g1", "plain") as there,
        ):
            for command in ("mkfifo {}/x", "mknod {}/x c 1 3", "mknod {}/x b 7 0"):
                assert "not permitted" in g1.run(command.format(there)).stderr
            g1.check_output(f"touch {there}/f && ln -s f {there}/l")
        assert sorted(dom0.out(f"ls {path}").split()) == ["f", "l"]
    finally:
        dom0.out(f"rm -rf {path}")


def test_a_quota_stops_one_guest(dom0: Dom0) -> None:
    """btrfs: g1 gets EDQUOT in its export, and g2 goes on in its own on the same filesystem."""
    names, store = {"g1": "one", "g2": "two"}, "/srv/xen9p"
    dom0.out(f"btrfs quota enable {store}")
    dom0.out(" && ".join(f"btrfs -q subvolume create {store}/.quota-{name}" for name in names.values()))
    text = "".join(
        rule(g, n, f"{store}/.quota-{n}", 'quota = {bytes = "8M"}' if g == "g1" else "") for g, n in names.items()
    )
    try:
        with rules(dom0, text, names), in_guest(dom0, "g1", "one") as one, in_guest(dom0, "g2", "two") as two:
            explained = json.loads(dom0.out("xen9p policy explain g1 --json"))
            assert [got["quota"] for got in explained["gets"] if got["tag"] == "one"] == [
                {"bytes": 8 << 20, "files": 0}
            ]
            result = connect("g1").run(f"dd if=/dev/zero of={one}/f bs=1M count=16 conv=fsync")
            assert result.rc != 0
            assert "quota exceeded" in result.stderr.lower()
            connect("g2").check_output(f"dd if=/dev/zero of={two}/f bs=1M count=16 conv=fsync")
            connect("g1").check_output("touch /home/.elsewhere && rm /home/.elsewhere")
    finally:
        dom0.out(" && ".join(f"btrfs -q subvolume delete {store}/.quota-{name}" for name in names.values()))
        dom0.out(f"btrfs quota disable {store}")


@pytest.mark.long
def test_a_quota_that_goes_while_the_service_is_down(dom0: Dom0) -> None:
    """The next start takes it away; one that somebody has set by hand stays."""
    store, terms = "/srv/xen9p", 'quota = {bytes = "8M"}'
    ours, foreign = f"{store}/.quota-ours", f"{store}/.quota-foreign"

    def most(path: str) -> str:
        return dom0.out(f"btrfs qgroup show -r -f --raw {path} | tail -1").split()[3]

    dom0.out(f"btrfs quota enable {store} && for p in {ours} {foreign}; do btrfs -q subvolume create $p; done")
    dom0.out(f"btrfs qgroup limit 4M {foreign}")
    try:
        with rules(dom0, rule("g1", "ours", ours, terms), {"g1": "ours"}):
            wait_until("the quota is in force", lambda: most(ours) == str(8 << 20), 30)
            dom0.out(
                f"systemctl stop xen9pd && sed -i 's/^{terms}$//' /etc/xen9p/policy.toml && systemctl start xen9pd"
            )
            wait_until("it is gone", lambda: most(ours) == "none", 30)
            assert most(foreign) == str(4 << 20)
    finally:
        dom0.out(f"btrfs -q subvolume delete {ours} {foreign}; btrfs quota disable {store}")


@pytest.mark.long
def test_a_quota_of_files_and_bytes_on_ext4(dom0: Dom0) -> None:
    folder = "/var/tmp/ext4-quota"
    dom0.out(
        f"mkdir -p {folder} && truncate -s 64M {folder}.img && mkfs.ext4 -q -O quota,project -E quotatype=prjquota"
        f" {folder}.img && mount -o loop,prjquota {folder}.img {folder} && mkdir {folder}/export"
    )
    terms = 'quota = {bytes = "8M", files = 24}'
    try:
        with (
            rules(dom0, rule("g1", "ext4", f"{folder}/export", terms), {"g1": "ext4"}),
            in_guest(dom0, "g1", "ext4") as there,
        ):
            g1 = connect("g1")
            assert g1.run(f"dd if=/dev/zero of={there}/f bs=1M count=16 conv=fsync").rc != 0
            assert g1.run(f"rm {there}/f; cd {there} && touch $(seq 30)").rc != 0
            assert 10 < len(g1.check_output(f"ls {there}").split()) < 24
    finally:
        dom0.out(f"umount {folder} && rm -r {folder} {folder}.img")


def test_what_the_policy_gives_and_why(dom0: Dom0) -> None:
    text = dom0.out("xen9p policy explain g1")
    assert "tag root: rule" in text
    assert "the guest's kernel; its root may do everything" in text
    assert "the host's kernel" in text
    assert 'rule 1 (guest "g1") is not about it' in dom0.out("xen9p policy explain nobody")


# Keys and limits.

KEYED = """
[[rules]]
guest = "g1"
export = "home"
tag = "keyed"
access = "rw"
attach = "manual"
frontend = "user"
keys = "/run/keyed.keys"
"""


def test_a_device_that_wants_a_key(dom0: Dom0) -> None:
    """The right guest is not enough; a wrong key, and none, are one line each, and the right one opens."""
    g1 = connect("g1")
    dom0.out("rm -f /run/keyed.keys /run/wrong.keys")
    dom0.out("xen9p key make /run/keyed.keys --name alice && xen9p key make /run/wrong.keys --name alice")
    try:
        with rules(dom0, KEYED, {"g1": "keyed"}):
            wait_until("the rule is in force", lambda: dom0.run("xen9p attach g1 home --tag keyed").rc == 0, 20)
            for name in ("keyed", "wrong"):
                content = dom0.out(f"cat /run/{name}.keys")
                g1.check_output(f"umask 077 && cat > /root/{name}.keys <<'EOF'\n{content}\nEOF\n")
            for option, said in (("", "--key"), ("--key /root/wrong.keys", "alice")):
                refused = g1.run(f"xen9p ls {option} keyed:/")
                assert refused.rc == 1
                assert said in refused.stderr
                assert len(refused.stderr.strip().splitlines()) == 1
            assert g1.run("xen9p ls --key /root/keyed.keys keyed:/").rc == 0
    finally:
        dom0.run("rm -f /run/keyed.keys /run/wrong.keys")
        g1.run("rm -f /root/keyed.keys /root/wrong.keys")


SLOW = """
[exports.slow]
path = "/srv/xen9p/slow"
[[rules]]
guest = "g1"
export = "slow"
access = "rw"
[rules.limits]
operations_per_second = 3
"""


def test_a_limit_slows_its_device_and_no_other(dom0: Dom0) -> None:
    g1 = connect("g1")
    stat_all = (
        "s=$(date +%s%N); for i in $(seq 20); do stat -t {0}/$i > /dev/null 2>&1; done; echo $(($(date +%s%N) - s))"
    )
    dom0.out("mkdir -p /srv/xen9p/slow")
    try:
        with rules(dom0, SLOW, {"g1": "slow"}):
            wait_until("the new device is there", lambda: dom0.device("g1", "slow") is not None, 30)
            try:
                g1.check_output(f"mkdir -p /mnt/slow && {MOUNT},cache=none slow /mnt/slow")
                slow, free = (int(g1.check_output(stat_all.format(path))) / 1e9 for path in ("/mnt/slow", "/home"))
            finally:
                g1.run("umount /mnt/slow; rmdir /mnt/slow")
        # Each of the 20 looks is a request at least; a second's worth may be saved up.
        assert slow > 20 / 3 - 1.5
        assert dom0.device("g1", "home")["throttled"] == 0  # type: ignore[index]
        assert free < slow
    finally:
        dom0.run("rmdir /srv/xen9p/slow")


@pytest.mark.long
def test_many_writers_fit_into_a_ring_if_their_writes_are_small(dom0: Dom0) -> None:
    """16 that begin in one moment: Linux's frontend never wakes who finds a ring full. See docs/troubleshooting.md."""
    g1, path = connect("g1"), "/srv/xen9p/home/.writers"
    small = '[rules.limits]\nbytes_in_write = "60K"'
    write = "head -c 1M /dev/zero | tr '\\0' $i | dd of={}/$i bs=1M iflag=fullblock 2> /dev/null & "
    letters = "a b c d e f g h i j k l m n o p"
    dom0.out(f"mkdir -p {path}")
    try:
        with (
            rules(dom0, rule("g1", "writers", path, small), {"g1": "writers"}),
            in_guest(dom0, "g1", "writers") as there,
        ):
            work = f"for i in {letters}; do {write.format(there)} done; wait"
            assert g1.run(f'timeout -s KILL 120 sh -c "{work.replace("$", chr(92) + "$")}"').rc == 0
        sums = dom0.out(f"cd {path} && for i in {letters}; do tr -d $i < $i | wc -c; stat -c %s $i; done").split()
        assert sums == ["0", str(1 << 20)] * 16
    finally:
        dom0.out(f"rm -rf {path}")
