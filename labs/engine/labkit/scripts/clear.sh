#!/usr/bin/env bash
# On the host: what a student has made of a lab goes away; the part of the store is the start's again. The lab's block of
# the policy stays: prepare.sh writes it anew where it differs.
set -uo pipefail
: "${student:?}" "${lab:?}" "${part:?}" "${pristine:?}" "${work:?}" "${guests:=}" "${cleanup:=}" "${end:?}" "${devices:?}" "${control:?}"

fail() {
  echo "error: $1" >&2
  exit 3
}

[ -d "$pristine" ] || fail "$student has not started lab $lab here: lab start $lab"
base64 -d <<<"$end" | python3 -I -S - "$work"
[ -z "$cleanup" ] || eval "$cleanup"
rm -rf "$work"

if command -v xen9p >/dev/null && [ -n "$guests" ]; then
  # Every device that leads into the student's part, whoever made it.
  read -ra names <<<"$guests"
  python3 -I -S -c "$(base64 -d <<<"$devices")" "$control" detach "$part" "${names[@]}" || exit 3
fi
# What an earlier reset that was cut off has left.
for left in "$part.new" "$part.old"; do
  [ ! -d "$left" ] || btrfs -q subvolume delete "$left" >/dev/null || fail "$left cannot be deleted"
done
# In place at once: whoever looks sees the old or the new.
btrfs -q subvolume snapshot "$pristine" "$part.new" >/dev/null || fail "the start cannot be brought back: is the store full?"
if [ -d "$part" ]; then
  mv "$part" "$part.old" && mv "$part.new" "$part"
  btrfs -q subvolume delete "$part.old" >/dev/null || fail "$part.old cannot be deleted"
else
  mv "$part.new" "$part"
fi
