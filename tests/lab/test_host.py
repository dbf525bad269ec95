"""The host: Xen, the store, the service."""

from __future__ import annotations

from lab import GUESTS, TAGS, Dom0


def test_it_is_dom0_of_a_real_xen(dom0: Dom0) -> None:
    assert dom0.out("cat /sys/hypervisor/type").strip() == "xen"
    assert "control_d" in dom0.out("cat /proc/xen/capabilities")
    assert "xen_version" in dom0.out("xl info")


def test_the_store_is_btrfs(dom0: Dom0) -> None:
    mount = dom0.host.mount_point("/srv/xen9p")
    assert mount.exists
    assert mount.filesystem == "btrfs"
    uuid = dom0.out("findmnt -no UUID /srv/xen9p").strip()
    assert dom0.out(f"cat /sys/fs/btrfs/{uuid}/checksum").startswith("xxhash64")
    for export in ("home", "course", "golden", *(f"guests/{guest}" for guest in GUESTS)):
        assert dom0.host.file(f"/srv/xen9p/{export}").is_directory


def test_a_guest_root_shares_its_blocks_with_the_golden_tree(dom0: Dom0) -> None:
    # Exclusive bytes of a clone are what its guest has written since.
    usage = dom0.out("btrfs filesystem du --raw -s /srv/xen9p/guests/g1").splitlines()[-1].split()
    total, exclusive = int(usage[0]), int(usage[1])
    assert total > 50_000_000
    assert exclusive < total / 2


def test_the_service_runs_and_starts_at_boot(dom0: Dom0) -> None:
    service = dom0.host.service("xen9pd")
    assert service.is_running
    assert service.is_enabled
    assert "xen9p" in dom0.out("xen9p --version")


def test_status_shows_every_device(dom0: Dom0) -> None:
    status = dom0.status()
    assert {g["name"] for g in status["guests"]} >= set(GUESTS)
    shown = {(d["guest"], d["tag"]): d for d in status["devices"]}
    for guest in GUESTS:
        for tag, access in TAGS.items():
            device = shown[guest, tag]
            assert (device["state"], device["access"]) == ("connected", access)
            assert device["requests"] > 0
    table = dom0.out("xen9p status")
    for guest in GUESTS:
        assert guest in table


def test_the_policy_is_checked(dom0: Dom0) -> None:
    assert dom0.run("xen9p policy check").rc == 0
    result = dom0.run(
        "printf 'version = 1\\n[exports.x]\\npath = \"/nowhere\"\\n' > /tmp/bad.toml; xen9p policy check /tmp/bad.toml"
    )
    dom0.run("rm -f /tmp/bad.toml")
    assert result.rc == 78
    assert "/nowhere" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
