#!/bin/sh
# Makes the live system what the files of roles/xen_host say; prints a line for each thing that it changed.
# Environment: BRIDGE, NAT (empty: none), MODULES, CHANGED (paths that were just written).
set -eu

changed() {
  case " ${CHANGED:-} " in *"$1"*) return 0 ;; *) return 1 ;; esac
}

if changed /etc/systemd/system/; then
  systemctl daemon-reload
fi

for module in $MODULES; do
  name=$(echo "$module" | tr - _)
  [ -d "/sys/module/$name" ] && continue
  modprobe "$module"
  echo "module $module"
done

if ! systemctl -q is-enabled systemd-networkd.service; then
  # Enabling it brings a service along that delays the boot of a machine whose network others manage.
  online=$(systemctl is-enabled systemd-networkd-wait-online.service || true)
  systemctl -q enable systemd-networkd.service
  [ "$online" = enabled ] || systemctl -q disable systemd-networkd-wait-online.service
  echo "systemd-networkd enabled"
fi
if ! systemctl -q is-active systemd-networkd.service; then
  systemctl start systemd-networkd.service
  echo "systemd-networkd started"
elif changed /etc/systemd/network/; then
  networkctl reload
  echo "systemd-networkd reloaded"
fi
tries=0
until ip -4 address show dev "$BRIDGE" 2> /dev/null | grep -q inet; do
  tries=$((tries + 1))
  if [ "$tries" -gt 60 ]; then
    echo "bridge $BRIDGE did not get its address in 30 s; look with: networkctl status $BRIDGE" >&2
    exit 1
  fi
  sleep 0.5
done

if changed /etc/sysctl.d/60-xen_host.conf; then
  sysctl -q -p /etc/sysctl.d/60-xen_host.conf
fi

if [ -n "$NAT" ]; then
  if ! systemctl -q is-enabled xen-guest-nat.service; then
    systemctl -q enable xen-guest-nat.service
    echo "NAT enabled"
  fi
  if changed /etc/nftables.d/xen_host.nft || changed xen-guest-nat.service ||
    ! systemctl -q is-active xen-guest-nat.service; then
    systemctl restart xen-guest-nat.service
    echo "NAT started"
  fi
elif systemctl -q is-enabled xen-guest-nat.service 2> /dev/null; then
  systemctl -q disable --now xen-guest-nat.service
  echo "NAT stopped"
fi

if ! ls /etc/rc2.d/S*xendomains > /dev/null 2>&1; then
  systemctl -q enable xendomains.service 2> /dev/null
  echo "xendomains enabled"
fi
# Started once (it starts what is in /etc/xen/auto), so that the shutdown of the host also stops it.
if ! systemctl -q is-active xendomains.service; then
  systemctl start xendomains.service
  echo "xendomains started"
fi
