"""What the testbed decides before it starts a machine."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from lab import STATE
from testbed import accel, vm


def test_the_probe_for_kvm_boots_a_real_xen(tmp_path: Path) -> None:
    image = Path(json.loads((STATE / "vm.json").read_text())["image"])
    # Emulation stands in for a KVM that works. Two tries: it failed once beside a lab at work, why is not known.
    assert any(accel.xen_boots(vm.QEMU, image, accelerator="tcg", timeout=75) for _ in range(2))
    for name in ("xen", "vmlinuz"):
        shutil.copy(image / name, tmp_path)
    (tmp_path / "initrd.img").write_bytes(b"no user space at all")
    assert not accel.xen_boots(vm.QEMU, tmp_path, accelerator="tcg", timeout=15)
