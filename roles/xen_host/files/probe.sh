#!/bin/sh
# Says what the host is, one word or pair a line: dom0, grub, missing PACKAGE.
# Environment: PACKAGES, the wanted packages.
set -u
grep -qs control_d /proc/xen/capabilities && echo dom0
[ "$(cat /sys/hypervisor/type 2> /dev/null)" = xen ] && [ -e /dev/xen/xenbus_backend ] && echo dom0
[ -x /usr/sbin/update-grub ] && echo grub
# shellcheck disable=SC2086 # a list of names
found=" $(dpkg-query -W -f '${Package}:${db:Status-Status} ' ${PACKAGES:-dpkg} 2> /dev/null) "
for package in ${PACKAGES:-}; do
  case $found in
    *" $package:installed "*) ;;
    *) echo "missing $package" ;;
  esac
done
exit 0
