#!/bin/sh
# Hook of mmdebstrap: turns the fresh tree into the golden one and writes the guest's kernel and
# initramfs beside it. Usage: customize.sh TREE; environment: GOLDEN_FILES (this folder),
# GOLDEN_OUT (where vmlinuz, initrd.img and kernel-version go), GOLDEN_MODULES (modules for TREE).
set -eu
tree=$1
# Inside the tree, so that its own kmod and busybox work on it: the controller needs neither.
work=$(mktemp -d -p "$tree/tmp")
inside=${work#"$tree"}
trap 'rm -rf "$work"' EXIT

fetch_kernel() {
  # The package is taken apart, not installed: its 400 MB of modules would be read by nobody.
  package=$(APT_CONFIG=$MMDEBSTRAP_APT_CONFIG apt-cache depends linux-image-amd64 |
    sed -n 's/.*Depends: \(linux-image-[0-9][^ ]*\).*/\1/p' | head -n 1)
  (cd "$work" && APT_CONFIG=$MMDEBSTRAP_APT_CONFIG apt-get download -q "$package")
  dpkg-deb -x "$work"/linux-image-*.deb "$work/kernel"
  version=$(ls "$work/kernel/lib/modules")
  cp "$work/kernel/boot/vmlinuz-$version" "$GOLDEN_OUT/vmlinuz"
  echo "$version" > "$GOLDEN_OUT/kernel-version"
  modules=lib/modules/$version
  chroot "$tree" depmod -b "$inside/kernel" "$version"
}

# with_dependencies MODULE...: paths below lib/modules/VERSION, in the order of loading. A module
# that is built into the kernel gives no line.
with_dependencies() {
  for name in "$@"; do
    chroot "$tree" modprobe -d "$inside/kernel" -S "$version" --show-depends "$name"
  done | sed -n "s|^insmod .*/$modules/\([^ ]*\).*|\1|p" | awk '!seen[$0]++'
}

install_modules() {
  # shellcheck disable=SC2086 # a list of names
  with_dependencies $GOLDEN_MODULES | while read -r path; do
    install -D -m 0644 "$work/kernel/$modules/$path" "$tree/usr/$modules/$path"
  done
  cp "$work/kernel/$modules"/modules.order "$work/kernel/$modules"/modules.builtin* "$tree/usr/$modules/"
  chroot "$tree" depmod "$version"
}

# initramfs_list NAME MODULE...: NAME.list, and the modules that it names.
initramfs_list() {
  list=$1
  shift
  with_dependencies "$@" | while read -r path; do
    install -D -m 0644 "$work/kernel/$modules/$path" "$ramfs/modules/${path##*/}"
    echo "/modules/${path##*/}"
  done > "$ramfs/modules/$list.list"
}

build_initramfs() {
  ramfs=$work/initramfs
  mkdir -p "$ramfs/bin" "$ramfs/dev" "$ramfs/proc" "$ramfs/sys" "$ramfs/root" "$ramfs/modules"
  cp "$tree/bin/busybox" "$ramfs/bin/busybox"
  install -m 0755 "$GOLDEN_FILES/initramfs-init" "$ramfs/init"
  initramfs_list net xen-netfront
  initramfs_list 9p 9pnet_xen 9p
  initramfs_list ext4 xen-blkfront crc32c_generic ext4
  initramfs_list systemd autofs4 ip_tables
  mknod -m 0600 "$ramfs/dev/console" c 5 1
  find "$ramfs" -exec touch -h -d "@${SOURCE_DATE_EPOCH:-0}" {} +
  (cd "$ramfs" && find . | LC_ALL=C sort | "$tree/bin/busybox" cpio -o -H newc 2> "$work/cpio.log") |
    zstd -q -19 -T1 > "$GOLDEN_OUT/initrd.img"
}

# exclude: leaves out what exclude.list names, now and when packages are upgraded.
exclude() {
  config=$tree/etc/dpkg/dpkg.cfg.d/guest
  echo "# Written by customize.sh from exclude.list." > "$config"
  grep -v -e '^#' -e '^$' "$GOLDEN_FILES/exclude.list" | while read -r pattern; do
    case $pattern in
      /*) set -- "$pattern" ;;
      *) set -- "/lib/systemd/system/$pattern" "/lib/systemd/system/*.wants/$pattern" ;;
    esac
    for path in "$@"; do
      printf 'path-exclude=%s\npath-exclude=/usr%s\n' "$path" "$path" >> "$config"
      # shellcheck disable=SC2086 # a pattern
      rm -rf "${tree:?}"/usr$path
    done
  done
  # What the packages enabled when they were installed, and is gone.
  find "$tree/etc/systemd/system" -type l | while read -r link; do
    chroot "$tree" test -e "${link#"$tree"}" || rm "$link"
  done
  find "$tree/etc/systemd/system" "$tree/usr/lib/systemd/system" -type d -name '*.wants' -empty -delete
}

trim() {
  exclude
  # The identity of a guest is written from dom0, never inherited from here.
  rm -f "$tree"/etc/ssh/ssh_host_* "$tree/etc/hostname" "$tree/etc/resolv.conf" "$tree/var/lib/systemd/random-seed"
  : > "$tree/etc/machine-id"
  rm -rf "$tree"/etc/update-motd.d "$tree/etc/motd" "$tree"/usr/share/doc/* "$tree"/var/log/*.log "$tree"/var/log/apt
  # ssh.service is no longer Debian's: enable ours, and only what is listed here.
  rm -f "$tree"/etc/systemd/system/sshd.service "$tree"/etc/systemd/system/multi-user.target.wants/*
  ln -sf /usr/lib/systemd/system/multi-user.target "$tree/etc/systemd/system/default.target"
  chroot "$tree" systemctl -q enable ssh.service guest-coldplug.service systemd-networkd.service console-getty.service
}

cp -a --no-preserve=ownership "$GOLDEN_FILES/rootfs/." "$tree/"
mkdir -p "$tree/home" "$tree/course" "$tree/root/.ssh"
# systemd looks here for every unit, and a 9P client remembers what is there, not what is missing.
mkdir -p "$tree/usr/local/lib/systemd/system" "$tree/etc/systemd/system.attached"
chmod 0700 "$tree/root/.ssh"
chroot "$tree" ldconfig
fetch_kernel
install_modules
build_initramfs
trim
