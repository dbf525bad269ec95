#!/usr/bin/env bash
# On the host: a student's part of the store, the lab's block of the policy, the working folder, the devices.
# Whatever is there already stays as it is. The caller sets the variables that are named first.
set -euo pipefail
: "${student:?}" "${lab:?}" "${part:?}" "${pristine:?}" "${store:?}" "${mib:?}" "${work:?}" "${state:?}" "${policy:?}" "${bin:?}"
: "${tree:=}" "${block:=}" "${attach:=}" "${kit:?}" "${values:?}" "${devices:?}" "${control:?}"

fail() {
  echo "error: $1" >&2
  exit 3
}

[ "$(stat -f -c %T "$store" 2>/dev/null)" = btrfs ] || fail "$store is no btrfs: run site.yml on this host"
free=$(($(df --output=avail -k "$store" | tail -n 1) / 1024))
[ "$free" -ge "$mib" ] || fail "$store has $free MiB free, this lab needs $mib: delete files or snapshots there"

install -d -m 0700 "$state"
install -d "$bin" "$(dirname "$work")" "$(dirname "$part")" "$(dirname "$pristine")"
if [ ! -d "$pristine" ]; then
  # What an earlier start that was cut off has left.
  for left in "$part" "$pristine.part"; do
    [ ! -d "$left" ] || btrfs -q subvolume delete "$left" >/dev/null
  done
  btrfs -q subvolume create "$part" >/dev/null
  (cd "$part" && eval "$tree")
  # The snapshot comes last and takes its name at once: where it is, all of the start is in it.
  btrfs -q subvolume snapshot -r "$part" "$pristine.part" >/dev/null
  mv "$pristine.part" "$pristine"
elif [ ! -d "$part" ]; then
  btrfs -q subvolume snapshot "$pristine" "$part" >/dev/null
fi

install -d "$work"
if [ ! -e "$work/values" ]; then
  base64 -d <<<"$kit" | tar -xz --no-same-owner -C "$work"
fi
base64 -d <<<"$values" >"$work/values.new" && mv "$work/values.new" "$work/values"

[ -n "$block" ] || exit 0
[ -f "$policy" ] || fail "there is no $policy: run site.yml on this host"
# Students who share a host change one file.
exec 9>"$state/../policy.lock"
flock 9
mark="# lab: $student $lab"
sed "/^$mark begins\$/,/^$mark ends\$/d" "$policy" >"$policy.lab"
{
  echo "$mark begins"
  base64 -d <<<"$block"
  echo "$mark ends"
} >>"$policy.lab"
if ! cmp -s "$policy" "$policy.lab"; then
  xen9p policy check "$policy.lab" >&2 || fail "the policy with this lab's rules is not usable"
  # In place, so that owner and mode stay.
  cat "$policy.lab" >"$policy"
  systemctl reload xen9pd || fail "xen9pd does not take the policy: see journalctl -u xen9pd"
fi
rm -f "$policy.lab"
flock -u 9

[ -n "$attach" ] || exit 0
python3 -I -S -c "$(base64 -d <<<"$devices")" "$control" attach <<<"$attach" || exit 3
