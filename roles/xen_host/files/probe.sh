#!/bin/sh
# Says what the host is, one word or pair a line: dom0, grub, secureboot, release ID VERSION, missing PACKAGE.
# Environment: PACKAGES, the wanted packages; ROOT, where the filesystem begins (empty but in tests).
set -u
root=${ROOT:-}
grep -qs control_d "$root/proc/xen/capabilities" && echo dom0
[ "$(cat "$root/sys/hypervisor/type" 2> /dev/null)" = xen ] && [ -e "$root/dev/xen/xenbus_backend" ] && echo dom0
[ -x "$root/usr/sbin/update-grub" ] && echo grub
# Four bytes of attributes, then the value.
for variable in "$root"/sys/firmware/efi/efivars/SecureBoot-*; do
  [ "$(tail -c +5 "$variable" 2> /dev/null | od -An -tu1 | tr -d ' ')" = 1 ] && echo secureboot
done
# shellcheck source=/dev/null
(. "$root/etc/os-release" && echo "release ${ID:-unknown} ${VERSION_ID:-unknown}") 2> /dev/null
# shellcheck disable=SC2086 # a list of names
found=" $(dpkg-query -W -f '${Package}:${db:Status-Status} ' ${PACKAGES:-dpkg} 2> /dev/null) "
for package in ${PACKAGES:-}; do
  case $found in
    *" $package:installed "*) ;;
    *) echo "missing $package" ;;
  esac
done
exit 0
