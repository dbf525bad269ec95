"""Bytes and names: the same in a guest, in dom0 and in the other guest."""

from __future__ import annotations

import pytest

from lab import Dom0, connect, scratch

MSIZE = 512 * 1024
RING_HALF = 1024 * 1024
SIZES = (
    0,
    1,
    4095,
    4096,
    4097,
    MSIZE - 24,
    MSIZE - 11,
    MSIZE,
    MSIZE + 1,
    RING_HALF - 1,
    RING_HALF,
    RING_HALF + 1,
    3 * RING_HALF + 7,
)


def test_bytes_written_in_a_guest(dom0: Dom0) -> None:
    g1, g2 = connect("g1"), connect("g2")
    with scratch(g1, "/home/bytes"):
        sizes = " ".join(map(str, SIZES))
        g1.check_output(f"cd /home/bytes && for n in {sizes}; do head -c $n /dev/urandom > f$n; done; sync")
        sums = {host: g.check_output("cd /home/bytes && sha256sum f* | sort") for host, g in (("g1", g1), ("g2", g2))}
        there = dom0.out("cd /srv/xen9p/home/bytes && sha256sum f* | sort").strip()
        assert sums["g1"] == there
        assert sums["g2"] == there
        assert len(there.splitlines()) == len(SIZES)
        lengths = dom0.out("cd /srv/xen9p/home/bytes && stat -c %s f*").split()
        assert sorted(map(int, lengths)) == sorted(SIZES)


def test_bytes_written_in_dom0(dom0: Dom0) -> None:
    with scratch(dom0.host, "/srv/xen9p/home/given") as path:
        dom0.out(f"head -c {RING_HALF + 5} /dev/urandom > {path}/f")
        want = dom0.out(f"sha256sum < {path}/f")
        for guest in ("g1", "g2"):
            assert connect(guest).check_output("sha256sum < /home/given/f") == want.strip()


def test_bytes_of_a_guest_root(dom0: Dom0) -> None:
    g1 = connect("g1")
    g1.check_output("head -c 700001 /dev/urandom > /root/mine; sync")
    assert dom0.out("sha256sum < /srv/xen9p/guests/g1/root/mine").strip() == g1.check_output("sha256sum < /root/mine")
    assert not dom0.host.file("/srv/xen9p/guests/g2/root/mine").exists
    g1.check_output("rm /root/mine")


def test_a_sparse_gibibyte(dom0: Dom0) -> None:
    g1, g2 = connect("g1"), connect("g2")
    with scratch(g1, "/home/sparse"):
        g1.check_output(
            "truncate -s 1G /home/sparse/f"
            " && printf tail | dd of=/home/sparse/f bs=1 seek=1073741820 conv=notrunc status=none"
        )
        size, blocks = map(int, dom0.out("stat -c '%s %b' /srv/xen9p/home/sparse/f").split())
        assert size == 1 << 30
        assert blocks * 512 < 1 << 20, "the hole takes no space"
        assert g2.check_output("tail -c 8 /home/sparse/f | od -An -c").split() == ["\\0"] * 4 + list("tail")


@pytest.mark.parametrize("where", ["/root", "/home"])
def test_names_and_kinds(dom0: Dom0, where: str) -> None:
    """Links, FIFOs, sockets, devices, odd names, renames: as on any filesystem of the guest."""
    g1 = connect("g1")
    there = {"/root": "/srv/xen9p/guests/g1/root", "/home": "/srv/xen9p/home"}[where]
    with scratch(g1, f"{where}/kinds") as path:
        g1.check_output(
            f"cd {path} && echo a > a && ln a hard && ln -s a soft && mkdir d && mv a d/b && mkfifo fifo"
            " && mknod null c 1 3 && echo x > 'odd name\n' && chown 12:34 d/b && chmod 4751 d/b"
        )
        assert g1.check_output(
            f"cd {path} && cat hard; (echo through > fifo &) ; cat fifo; echo y > null; ls d"
        ).split() == ["a", "through", "b"]
        stat = dom0.out(f"cd {there}/kinds && stat -c '%n %F %a %u %g %h' d/b soft fifo null").splitlines()
        assert stat[0] == "d/b regular file 4751 12 34 2"
        assert [line.split()[1] for line in stat[1:]] == ["symbolic", "fifo", "character"]


def test_an_unlinked_open_file_goes_on_working() -> None:
    program = (
        'open(F, "+>", "/home/gone") or die; unlink("/home/gone") or die; syswrite(F, "kept"); sysseek(F, 0, 0);'
        " sysread(F, $b, 9); print $b"
    )
    g1 = connect("g1")
    assert g1.check_output(f"perl -e '{program}'") == "kept"
    assert not g1.file("/home/gone").exists


def test_owners_are_those_of_the_guest(dom0: Dom0) -> None:
    g1 = connect("g1")
    with scratch(g1, "/home/owners") as path:
        g1.check_output(
            f"chmod 1777 {path} && setpriv --reuid 1234 --regid 2345 --clear-groups"
            f" sh -c 'umask 027; echo x > {path}/f; mkdir {path}/d'"
        )
        got = dom0.out("cd /srv/xen9p/home/owners && stat -c '%n %u %g %a' d f").split("\n")
        assert [line for line in got if line] == ["d 1234 2345 750", "f 1234 2345 640"]
        denied = g1.run(f"setpriv --reuid 99 --regid 99 --clear-groups cat {path}/f")
        assert denied.rc != 0
        assert "Permission denied" in denied.stderr


def test_many_files_in_a_directory(dom0: Dom0) -> None:
    g1, g2 = connect("g1"), connect("g2")
    with scratch(g1, "/home/many") as path:
        dom0.out("cd /srv/xen9p/home/many && seq -f 'file-with-a-long-enough-name-%05g' 3000 | xargs touch")
        want = dom0.out("ls /srv/xen9p/home/many | sha256sum")
        for guest in (g1, g2):
            assert guest.check_output(f"ls {path} | sha256sum") == want.strip()


def test_both_guests_at_once(dom0: Dom0) -> None:
    """Twenty appends from each guest, at the same time, all arrive (O_APPEND is the server's)."""
    g1, g2 = connect("g1"), connect("g2")
    with scratch(g1, "/home/both"):
        work = (
            "(for i in $(seq 20); do echo {} $i >> /home/both/log; done; touch /home/both/{}.done) > /dev/null 2>&1 &"
        )
        for name, guest in (("g1", g1), ("g2", g2)):
            guest.check_output(work.replace("{}", name))
        dom0.out("cd /srv/xen9p/home/both; for i in $(seq 60); do [ -e g1.done -a -e g2.done ] && break; sleep 1; done")
        lines = dom0.out("cat /srv/xen9p/home/both/log").splitlines()
        assert sorted(lines) == sorted(f"{g} {i}" for g in ("g1", "g2") for i in range(1, 21))
