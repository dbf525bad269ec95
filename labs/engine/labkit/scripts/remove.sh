#!/usr/bin/env bash
# On the host, after clear.sh: the lab's block of the policy and the student's part of the store go, too.
set -euo pipefail
: "${student:?}" "${lab:?}" "${part:?}" "${pristine:?}" "${state:?}" "${policy:?}"
mark="# lab: $student $lab"
if [ -f "$policy" ]; then
  exec 9>"$state/../policy.lock"
  flock 9
  if grep -q "^$mark begins\$" "$policy"; then
    sed "/^$mark begins\$/,/^$mark ends\$/d" "$policy" >"$policy.lab"
    cat "$policy.lab" >"$policy"
    rm -f "$policy.lab"
    systemctl reload xen9pd
  fi
  flock -u 9
fi
for tree in "$part" "$pristine"; do
  [ ! -d "$tree" ] || btrfs -q subvolume delete "$tree" >/dev/null
done
