#!/bin/sh
# Runs as mmdebstrap's last customize hook: $1 is the new root file system.
# WRENN_OUT receives what does not belong into it: the kernel image, the boot
# modules' tree and the list of packages. WRENN_KERNEL is the kernel's
# metapackage. Everything here runs as root, outside the new root.
set -eu
root=$1
out=$WRENN_OUT

in_root() { chroot "$root" /usr/bin/env PATH=/usr/sbin:/usr/bin:/sbin:/bin "$@"; }

# --- kernel: image and modules without its maintainer scripts, which would
# build an initramfs and want a boot loader.
export APT_CONFIG="$MMDEBSTRAP_APT_CONFIG"
kernel=$(apt-cache depends --important "$WRENN_KERNEL" |
	sed -n 's/^ *Depends: *\(linux-image-[0-9][^ ]*\)$/\1/p' | head -n 1)
[ -n "$kernel" ] || { echo "no kernel package behind $WRENN_KERNEL" >&2; exit 1; }
mkdir -p "$out/deb" "$out/kernel"
(cd "$out/deb" && apt-get -q -o APT::Sandbox::User=root download "$kernel")
unset APT_CONFIG
dpkg-deb --extract "$out"/deb/*.deb "$out/kernel"
version=$(ls "$out/kernel/lib/modules")
echo "$version" >"$out/version"
{
	in_root dpkg-query -W -f '${Package} ${Version} ${Architecture}\n'
	dpkg-deb -W --showformat='${Package} ${Version} ${Architecture}\n' "$out"/deb/*.deb
} | LC_ALL=C sort >"$out/packages"
cp "$out/kernel/boot/vmlinuz-$version" "$out/vmlinuz"

# Modules for programs in the sandbox (file systems, netfilter, tunnels), not
# for hardware that it cannot have.
modules=$root/lib/modules/$version
mkdir -p "$modules/kernel/drivers"
cp "$out/kernel/lib/modules/$version"/modules.* "$modules/"
for part in arch block crypto fs lib mm net virt; do
	[ ! -d "$out/kernel/lib/modules/$version/kernel/$part" ] ||
		cp -r "$out/kernel/lib/modules/$version/kernel/$part" "$modules/kernel/"
done
for part in block char md net vhost virtio; do
	[ ! -d "$out/kernel/lib/modules/$version/kernel/drivers/$part" ] ||
		cp -r "$out/kernel/lib/modules/$version/kernel/drivers/$part" "$modules/kernel/drivers/"
done
rm -rf "$modules/kernel/drivers/net/ethernet" "$modules/kernel/drivers/net/hyperv" \
	"$modules/kernel/drivers/net/xen-netback" "$modules/kernel/fs/ocfs2" "$modules/kernel/fs/gfs2"
in_root depmod "$version"
cp "$modules/modules.dep" "$modules/modules.builtin" "$out/"

# --- user, sudo, defaults
in_root groupadd --gid 1000 user
in_root useradd --uid 1000 --gid user --groups sudo --create-home --shell /bin/bash user
printf 'user ALL=(ALL:ALL) NOPASSWD:ALL\n' >"$root/etc/sudoers.d/user"
chmod 0440 "$root/etc/sudoers.d/user"
printf 'LANG=C.UTF-8\n' >"$root/etc/default/locale"
# Commands run in login shells, each of which would start `id` to ask who it is:
# most of what such a shell costs where the guest is emulated. Bash knows.
sed -i 's/"$(id -u)"/"${EUID:-$(id -u)}"/' "$root/etc/profile"
# The sandbox is the isolation: pip may install into it.
printf '[global]\nbreak-system-packages = true\ndisable-pip-version-check = true\n' >"$root/etc/pip.conf"

# --- PID 1 is envd; these are the commands that talk to it by signal.
for verb in poweroff:USR2 halt:USR1 reboot:TERM; do
	name=${verb%%:*}
	printf '#!/bin/sh\nexec kill -s %s 1\n' "${verb##*:}" >"$root/usr/sbin/$name"
	chmod 0755 "$root/usr/sbin/$name"
done

# --- the guest's own sources: the build host's mirror may be out of its reach
rm -f "$root"/etc/apt/sources.list "$root"/etc/apt/sources.list.d/* "$root"/etc/apt/apt.conf.d/99mmdebstrap
cat >"$root/etc/apt/sources.list.d/debian.sources" <<SOURCES
Types: deb
URIs: http://deb.debian.org/debian
Suites: $WRENN_SUITE $WRENN_SUITE-updates
Components: main
Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg

Types: deb
URIs: http://deb.debian.org/debian-security
Suites: $WRENN_SUITE-security
Components: main
Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg
SOURCES

# --- identity, which each sandbox gets for itself
: >"$root/etc/machine-id"
chmod 0444 "$root/etc/machine-id"
rm -f "$root/etc/hostname" "$root/etc/resolv.conf" "$root"/etc/ssh/ssh_host_* "$root/var/lib/dbus/machine-id"
printf 'nameserver 1.1.1.1\n' >"$root/etc/resolv.conf"
rm -f "$root/etc/hosts"

# --- what differs from build to build, or is of no use in a sandbox
find "$root/var/log" -type f -delete
rm -rf "$root"/var/cache/ldconfig/* "$root"/var/cache/debconf/*-old "$root"/var/lib/dpkg/*-old \
	"$root"/etc/*- "$root"/tmp/* "$root"/var/tmp/* "$root"/boot/* "$root/root/.bash_history"
