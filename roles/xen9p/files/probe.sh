#!/bin/sh
# Says what the host has of xen9p, one pair a line: stamp DIGEST, missing PACKAGE.
# Environment: PACKAGES, the wanted packages; STAMP, the file with the digest of the installed source.
set -u
[ -r "$STAMP" ] && echo "stamp $(cat "$STAMP")"
# shellcheck disable=SC2086 # a list of names
found=" $(dpkg-query -W -f '${Package}:${db:Status-Status} ' $PACKAGES 2> /dev/null) "
for package in $PACKAGES; do
  case $found in
    *" $package:installed "*) ;;
    *) echo "missing $package" ;;
  esac
done
exit 0
