#!/usr/bin/env bash
# On the host: what a student has made of a lab goes away; the part of the store is the start's again.
set -uo pipefail
: "${student:?}" "${lab:?}" "${part:?}" "${pristine:?}" "${work:?}" "${state:?}" "${policy:?}" "${guests:=}" "${cleanup:=}" "${end:?}"

fail() {
  echo "error: $1" >&2
  exit 3
}

[ -d "$pristine" ] || fail "$student has not started lab $lab here: lab start $lab"
base64 -d <<<"$end" | python3 - "$work"
[ -z "$cleanup" ] || eval "$cleanup"
rm -rf "$work"

if [ -f "$policy" ]; then
  exec 9>"$state/../policy.lock"
  flock 9
  mark="# lab: $student $lab"
  if grep -q "^$mark begins\$" "$policy"; then
    sed "/^$mark begins\$/,/^$mark ends\$/d" "$policy" >"$policy.lab"
    xen9p policy check "$policy.lab" >&2 || fail "the policy is not usable: correct $policy"
    cat "$policy.lab" >"$policy"
    rm -f "$policy.lab"
    systemctl reload xen9pd
  fi
  flock -u 9
fi
if command -v xen9p >/dev/null && [ -n "$guests" ]; then
  # Every device that leads into the student's part, whoever made it.
  xen9p status --json | PART=$part GUESTS=$guests python3 -c '
import json, os, sys
part, guests = os.environ["PART"], os.environ["GUESTS"].split()
for d in json.load(sys.stdin)["devices"]:
    if d["guest"] in guests and (d["path"] + "/").startswith(part + "/"):
        print(d["guest"], d["tag"])' | while read -r guest tag; do
    xen9p detach "$guest" "$tag" </dev/null >&2 || fail "$guest does not let go of $tag: unmount it there"
  done
fi
# In place at once: whoever looks sees the old or the new.
btrfs -q subvolume snapshot "$pristine" "$part.new" >/dev/null || fail "the start cannot be brought back: is the store full?"
if [ -d "$part" ]; then
  mv "$part" "$part.old" && mv "$part.new" "$part"
  btrfs -q subvolume delete "$part.old" >/dev/null || fail "$part.old cannot be deleted"
else
  mv "$part.new" "$part"
fi
