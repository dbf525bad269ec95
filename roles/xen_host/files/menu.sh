#!/bin/sh
# Writes the menu of GRUB, and makes sure that its default is Xen: else a reboot would be for nothing.
# Environment: MENU, the file of the menu (unset but in tests).
set -eu
menu=${MENU:-/boot/grub/grub.cfg}
update-grub
if ! grep -q '^ *set default=".*Xen' "$menu"; then
  echo "the default of $menu is not Xen; look for what sets GRUB_DEFAULT: grep -r GRUB_DEFAULT /etc/default" >&2
  exit 1
fi
