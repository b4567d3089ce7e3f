# What the guests' recipes share. Sourced, not run: set `guest` (the recipe's name) and `recipe` (its files) first.
#
# Every guest is Debian 12, whatever the host runs: mmdebstrap fetches the packages into a directory of its own, and
# nothing is installed on the host.
# shellcheck shell=bash

set -euo pipefail
export LC_ALL=C
# mke2fs and its like live there, and an ordinary user's PATH may leave it out.
PATH=$PATH:/usr/sbin:/sbin
umask 022

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
suite=bookworm
arch=amd64
out=${VMPOD_GUEST_DIR:-$root/target/guest}
vmpod=${VMPOD_BIN:-$root/target/debug/vmpod}
# Every file of a guest carries this time, so that the same packages give the same bytes.
export SOURCE_DATE_EPOCH=1700000000

say() { printf '%s: %s\n' "${guest:-guest}" "$*" >&2; }
die() { say "$*"; exit 1; }

need() {
    local tool
    for tool; do
        command -v "$tool" >/dev/null || die "$tool is missing; scripts/prerequisites guest installs it"
    done
}

# What a guest was made from: the same stamp means there is nothing to do.
stamp() { cat "$root/guests/lib.sh" "$@" | sha256sum | cut -d' ' -f1; }

fresh() { [ -e "$out/$guest.oci/index.json" ] && [ "$(cat "$out/$guest.stamp" 2>/dev/null)" = "$1" ]; }

# A scratch directory that is gone at the end, however that comes.
scratch() {
    mkdir -p "$out"
    work=$(mktemp -d "$out/.$guest.XXXXXX")
    # Files that mmdebstrap made as another user of its namespace can't remain: it only ever hands over a tar.
    trap 'rm -rf "$work"' EXIT
    trap 'exit 130' INT
    trap 'exit 143' TERM
}

# Debian's mirror is mmdebstrap's own default; VMPOD_DEBIAN_MIRROR names another.
bootstrap() {
    mmdebstrap --quiet --architectures="$arch" \
        --aptopt='Acquire::Languages "none"' --aptopt='Acquire::Retries "3"' \
        --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-include=/usr/share/doc/*/copyright' \
        --dpkgopt='path-exclude=/usr/share/man/*' --dpkgopt='path-exclude=/usr/share/info/*' \
        --dpkgopt='path-exclude=/usr/share/locale/*' --dpkgopt='path-exclude=/usr/share/lintian/*' \
        "$@"
}

# Kernel, modules, busybox and an SSH server, unpacked but not installed: the parts of the tiny guest and of initrds.
# They are fetched once, and again when the list changes.
parts() {
    local packages=linux-image-cloud-$arch,busybox-static,dropbear-bin,openssh-sftp-server,coreutils
    parts=$out/parts-$suite-$arch
    [ "$(cat "$parts/packages" 2>/dev/null)" = "$packages" ] && return
    say "fetching $packages from Debian $suite"
    rm -rf "$parts" "$parts.new"
    mkdir -p "$parts.new"
    # shellcheck disable=SC2086
    bootstrap --variant=extract --include="$packages" "$suite" "$work/parts.tar" ${VMPOD_DEBIAN_MIRROR:-}
    tar -x -C "$parts.new" --no-same-owner --exclude='./dev/*' -f "$work/parts.tar"
    rm "$work/parts.tar"
    printf '%s' "$packages" >"$parts.new/packages"
    mv "$parts.new" "$parts"
}

kernel_version() { basename "$(echo "$parts"/lib/modules/*-"$arch")"; }
kernel() { echo "$parts/boot/vmlinuz-$(kernel_version)"; }

# Prints the files of the named kernel modules and of all that they need, in the order in which they load.
modules() {
    declare -A seen=()
    local name
    for name; do module "$name"; done
}

module() {
    local name=${1//-/_} file dependency depends
    [ -n "${seen[$name]:-}" ] && return
    seen[$name]=1
    file=$(find "$parts/lib/modules" -name "$1.ko" -o -name "$name.ko" -o -name "${name//_/-}.ko" | head -n 1)
    [ -n "$file" ] || die "this kernel has no module $1"
    depends=$(tr '\0' '\n' <"$file" | sed -n 's/^depends=//p')
    for dependency in ${depends//,/ }; do module "$dependency"; done
    echo "$file"
}

# Copies programs of the parts into a tree, with the libraries that they load.
programs() {
    local tree=$1 program library libs=$parts/lib/x86_64-linux-gnu:$parts/usr/lib/x86_64-linux-gnu
    shift
    for program; do
        install -D -m 755 "$parts$program" "$tree$program"
        "$parts/lib64/ld-linux-x86-64.so.2" --library-path "$libs" --list "$parts$program" |
            sed -n 's/^.*=> \([^ ]*\) .*/\1/p' | while read -r library; do
                # Where it lay in the package says where the loader looks.
                install -D -m 755 "$library" "$tree${library#"$parts"}"
            done
    done
    install -D -m 755 "$parts/lib64/ld-linux-x86-64.so.2" "$tree/lib64/ld-linux-x86-64.so.2"
}

# Busybox with a link for each of its applets.
busybox() {
    local tree=$1 applet
    install -D -m 755 "$parts/bin/busybox" "$tree/bin/busybox"
    for applet in $("$parts/bin/busybox" --list); do
        [ "$applet" = busybox ] || ln -sf busybox "$tree/bin/$applet"
    done
}

# Compiles the program that sets a copied guest's clock and random numbers. Rust needs a C compiler as its linker, so there
# is one.
renewed() {
    mkdir -p "$(dirname "$1")"
    cc -Os -static -nostdlib -ffreestanding -fno-stack-protector -fno-asynchronous-unwind-tables -Wall -Wextra -Werror \
        -Wl,--build-id=none,-s -o "$1" "$root/guests/renewed.c"
}

# Packs a tree as an initrd: sorted, with fixed times and numeric owner root, so that it is the same each time. lz4 is
# what unpacks fastest in a guest.
initrd() {
    local tree=$1 file=$2
    find "$tree" -exec touch -h -d "@$SOURCE_DATE_EPOCH" {} +
    (cd "$tree" && find . -mindepth 1 -printf '%P\n' | sort | cpio --quiet -o -H newc -R 0:0 --reproducible) |
        lz4 -l -9 -q - "$file"
}

# Turns the finished guest NAME into target/guest/GUEST.oci by vmpod's own commands: imports it, with the arguments that
# follow, into a store of the build's own, and exports it from there.
publish() {
    local name=$1
    shift
    [ -x "$vmpod" ] || die "$vmpod isn't built; run \`make build\` first"
    local home=$work/home
    "$vmpod" --home "$home" image import "$@"
    "$vmpod" --home "$home" image export "$name" "$work/$guest.oci"
    rm -rf "$out/$guest.oci"
    mv "$work/$guest.oci" "$out/$guest.oci"
}
