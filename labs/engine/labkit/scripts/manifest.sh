#!/usr/bin/env bash
# Prints what there is of a lab, a line for each thing: what a reset has to bring back.
set -uo pipefail
: "${work:?}" "${part:=}" "${policy:=}" "${student:?}" "${lab:?}" "${guests:=}" "${mounts:=}" "${left:=}" "${devices:=}" "${control:=}"

list() {
  # Modes, owners, sizes and targets of everything, times of what is no directory, and what is in every file.
  (cd "$1" && find . -mindepth 1 \( -type d -printf "$2 %P d %m %U:%G\n" -o -printf "$2 %P %y %m %U:%G %s %T@ %l\n" \) | sort)
  (cd "$1" && find . -type f -print0 | sort -z | xargs -0 -r sha256sum | sed "s|^|$2 |")
}

if [ -n "$part" ]; then
  list "$part" store
  # By Python: a host has it, and not always getfattr.
  find "$part" -print0 | sort -z | python3 -I -S -c '
import os, sys
for path in sys.stdin.buffer.read().split(b"\0")[:-1]:
    for name in sorted(os.listxattr(path, follow_symlinks=False)):
        print("xattr", path, name, os.getxattr(path, name, follow_symlinks=False))'
fi
# The working folder's files are unpacked anew: their times do not count.
[ ! -d "$work" ] || (cd "$work" && find . -type f ! -name values -print0 | sort -z | xargs -0 -r sha256sum | sed 's|^|work |')
[ ! -d "$work" ] || (cd "$work" && find . -mindepth 1 -printf 'work %P %y %m\n' | sort)
if [ -n "$policy" ] && [ -f "$policy" ]; then
  sed -n "/^# lab: $student $lab begins\$/,/^# lab: $student $lab ends\$/s|^|policy |p" "$policy"
fi
if [ -n "$guests" ] && command -v xen9p >/dev/null; then
  read -ra names <<<"$guests"
  python3 -I -S -c "$(base64 -d <<<"$devices")" "$control" list "$part" "${names[@]}"
fi
for top in $mounts; do
  awk -v top="$top" '$2 == top || index($2, top "/") == 1 { print "mount", $1, $2, $3 }' /proc/mounts
  [ ! -e "$top" ] || echo "mountpoint $top"
done
[ -z "$left" ] || (eval "$left") 2>&1 | sed 's|^|left |'
