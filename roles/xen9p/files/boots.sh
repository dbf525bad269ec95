#!/bin/bash
# Times a guest's boots in turns: nothing known of its image, then read ahead of, each with the host's page cache
# empty, then with everything in memory. A line of JSON for each: from xl create until its ssh answers.
#   boots.sh GUEST ADDRESS ROUNDS [DEVICE IOPS]   the workers may read so many times a second from that device
set -euo pipefail

guest=$1 address=$2 rounds=$3 device=${4:-} iops=${5:-}

stop() {
  xl shutdown -w "$guest" >/dev/null
  while xen9p status --json | grep -q "\"guest\": \"$guest\""; do sleep 1; done
}

# boot KIND: the guest is down.
boot() {
  local began ended
  began=$(date +%s.%N)
  xl create "/etc/xen/$guest.cfg" >/dev/null
  until timeout 2 bash -c "exec 3<>/dev/tcp/$address/22 && read -r -t 2 -u 3" 2>/dev/null; do sleep 0.2; done
  ended=$(date +%s.%N)
  printf '{"kind": "%s", "seconds": %.2f, "device": %s}\n' "$1" "$(python3 -c "print($ended - $began)")" \
    "$(xen9p cache show --quick --json 2>/dev/null | python3 -c "
import json, sys
print(json.dumps(next(d for d in json.load(sys.stdin)['devices'] if (d['guest'], d['tag']) == ('$guest', 'root'))))")"
}

# How many images' profiles there are.
profiles() { { compgen -G '/var/lib/xen9p/cache/*.json' || true; } | wc -l; }

cold() {
  sync
  echo 3 >/proc/sys/vm/drop_caches
}

if [[ -n $device ]]; then
  systemctl set-property --runtime xen9pd.service "IOReadIOPSMax=$device $iops"
  trap 'systemctl set-property --runtime xen9pd.service IOReadIOPSMax=' EXIT
fi
for ((round = 0; round < rounds; round++)); do
  stop
  xen9p cache forget "$guest-root" >/dev/null
  before=$(profiles)
  cold
  boot first
  # Until its boot is learned.
  for ((n = 0; n < 200; n++)); do
    (($(profiles) > before)) && break
    sleep 1
  done
  stop
  cold
  boot second
  stop
  boot warm
done
