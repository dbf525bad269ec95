"""Who may have what: read-only, refusals, attach and detach by hand."""

from __future__ import annotations

from lab import BACKEND, Dom0, connect, wait_until

MOUNT = "mount -t 9p -o trans=xen,version=9p2000.L,msize=524288"


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
