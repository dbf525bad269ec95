#!/bin/sh
# Says what the host has of xen9p, a line each: stamp DIGEST, missing PACKAGE, stale (the
# service that runs is older than its package: an earlier run was cut off between the two).
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
began=$(systemctl show -P ExecMainStartTimestamp xen9pd.service 2> /dev/null)
if [ -r "$STAMP" ] && [ -n "$began" ] && systemctl -q is-active xen9pd.service; then
  [ "$(stat -c %Y "$STAMP")" -gt "$(date -d "$began" +%s)" ] && echo stale
fi
exit 0
