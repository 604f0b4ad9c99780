#!/bin/bash
# Gets what vhostpy's build, demo and tests need, and nothing twice:
#
#   tests/peers/install.sh build   compiler, Python headers, .venv with the Python packages
#   tests/peers/install.sh demo    ... and QEMU 10 with a Linux kernel for guests
#   tests/peers/install.sh test    ... and Debian 12's own QEMU, to test against both; libnbd
#                                  and a server for it; fio and XFS, for guests; DPDK's testpmd;
#                                  User-mode Linux
#   tests/peers/install.sh long    ... and QEMU 11, OVMF, and what makes a disk for it
#   tests/peers/install.sh ceph    what demo needs, fio, librbd and a Ceph to test against
#
# System packages come by apt (with sudo where the caller is not root). The newer peers are
# unpacked below .cache/, without root and without touching the system: apt runs on a
# directory of its own, and programs start through the unpacked dynamic loader
# (tests/peers/peers.py knows how).
set -euo pipefail
cd "$(dirname "$0")/../.."

CACHE=$PWD/.cache
# busybox-static and e2fsprogs are for inside the guests, libblkio1 for qemu-io's virtio-blk driver.
PEERS="qemu-system-x86 qemu-utils qemu-block-extra libblkio1 seabios ipxe-qemu
       linux-image-cloud-amd64 busybox-static e2fsprogs"
# For the long tests, in a directory of their own with all that they load.
NEWER_PEERS="qemu-system-x86 seabios ipxe-qemu ovmf"
KEYRING=/usr/share/keyrings/debian-archive-keyring.gpg

say() { echo "install: $*" >&2; }
fail() { echo "install: $1" >&2; [ -z "${2:-}" ] || echo "  next: $2" >&2; exit 1; }

# --- system packages --------------------------------------------------------------------

python_has() { python3 -c "$1" >/dev/null 2>&1; }

missing_packages() {
    command -v gcc >/dev/null || echo gcc
    [ -e /usr/include/stdlib.h ] || echo libc6-dev
    [ -e /usr/include/liburing.h ] || echo liburing-dev
    command -v python3 >/dev/null || echo python3
    python_has 'import os, sysconfig; os.stat(sysconfig.get_path("include") + "/Python.h")' ||
        echo python3-dev
    [ -x .venv/bin/python ] || python_has 'import ensurepip, venv' || echo python3-venv
    case $1 in demo | test | long | ceph) [ -e $KEYRING ] || echo debian-archive-keyring ;; esac
    if [ "$1" = test ] || [ "$1" = long ]; then
        command -v qemu-system-x86_64 >/dev/null || echo qemu-system-x86 seabios ipxe-qemu
        command -v qemu-storage-daemon >/dev/null || echo qemu-system-common qemu-utils
        [ -e /usr/include/libnbd.h ] || echo libnbd-dev
        command -v nbdkit >/dev/null || echo nbdkit
        command -v dpdk-testpmd >/dev/null || echo dpdk-dev
        command -v linux.uml >/dev/null || echo user-mode-linux
        [ -e /usr/sbin/insmod ] || echo kmod
    fi
    if [ "$1" = long ]; then
        [ -e /usr/sbin/mkfs.vfat ] || echo dosfstools
        command -v mcopy >/dev/null || echo mtools
    fi
    case $1 in
        test | long | ceph)
            command -v fio >/dev/null || echo fio
            [ -e /usr/sbin/mkfs.xfs ] || echo xfsprogs ;;
    esac
    if [ "$1" = ceph ]; then
        [ -e /usr/include/rbd/librbd.h ] || echo librbd-dev
        command -v ceph-mon >/dev/null || echo ceph-mon
        command -v ceph-osd >/dev/null || echo ceph-osd
        command -v ceph >/dev/null || echo ceph-common
    fi
}

install_system_packages() {
    local missing sudo=""
    missing=$(missing_packages "$1" | xargs)
    [ -n "$missing" ] || return 0
    command -v apt-get >/dev/null || fail "this needs: $missing" "install them with your package manager"
    if [ "$(id -u)" != 0 ]; then
        command -v sudo >/dev/null || fail "missing packages: $missing" "as root: apt-get install $missing"
        sudo=sudo
    fi
    say "system packages, by ${sudo:+sudo }apt-get install: $missing"
    $sudo apt-get -qq update
    # shellcheck disable=SC2086
    $sudo env DEBIAN_FRONTEND=noninteractive apt-get -qq -y install --no-install-recommends \
        $missing >/dev/null
}

# --- Python ------------------------------------------------------------------------------

# The stamp holds what was installed from: nothing is asked of pip until that changes.
install_python_packages() {
    local stamp=.venv/.installed wanted
    python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
        fail "$(python3 --version) is too old" "put Python 3.11 or newer first in PATH as python3"
    wanted=$(sha256sum pyproject.toml)
    if [ -x .venv/bin/python ] && [ "$(cat $stamp 2>/dev/null)" = "$wanted" ]; then return 0; fi
    say "Python packages into .venv"
    [ -x .venv/bin/python ] || python3 -m venv .venv
    .venv/bin/python - >.venv/requirements.txt <<'PYTHON'
import tomllib
with open("pyproject.toml", "rb") as file:
    tables = tomllib.load(file)
project = tables["project"]
print(*tables["build-system"]["requires"], *project["dependencies"],
      *project["optional-dependencies"]["dev"], sep="\n")
PYTHON
    .venv/bin/pip --disable-pip-version-check -q install -r .venv/requirements.txt
    echo "$wanted" >$stamp
}

# --- newer peers, beside the system ------------------------------------------------------

# The machine's own Debian mirror, so that a local or caching one is used.
mirror() {
    local found
    found=$(grep -rhoE 'https?://[^ ]+/debian/?( |$)' /etc/apt/sources.list /etc/apt/sources.list.d \
        2>/dev/null | head -n1 | tr -d ' ') || true
    echo "${found:-http://deb.debian.org/debian}"
}

# unpack NAME WORDS PACKAGES SUITE...: packages of these suites, of the last one where it has
# them, with all that they need, into .cache/NAME.
unpack() {
    local root=$CACHE/$1 apt=$CACHE/$1.apt words=$2 wanted archives suite package
    wanted=$(echo $3 | xargs)
    shift 3
    [ "$(cat "$root/.complete" 2>/dev/null)" != "$wanted" ] || return 0
    [ "$(dpkg --print-architecture)" = amd64 ] ||
        fail "guests need an x86-64 Debian machine" "make build works here; make demo and the guest tests do not"
    say "$words into .cache/ (nothing outside it changes)"
    rm -rf "$root" "$apt"
    mkdir -p "$apt"/etc/apt/{preferences.d,apt.conf.d,trusted.gpg.d,sources.list.d} \
        "$apt"/var/{lib/apt/lists/partial,lib/dpkg,cache/apt/archives/partial}
    : >"$apt/var/lib/dpkg/status"
    for suite; do
        echo "deb [signed-by=$KEYRING] $(mirror) $suite main"
    done >"$apt/etc/apt/sources.list"
    {   # The machine's own way to the mirror (proxy, certificates), on directories of ours.
        apt-config dump --format '%F "%v";%n' Acquire
        cat <<CONF
Dir "$apt";
Dir::State::status "$apt/var/lib/dpkg/status";
Dir::Bin::Methods "/usr/lib/apt/methods";
Dir::Etc::netrcparts "/etc/apt/auth.conf.d";
APT::Sandbox::User "";
APT::Install-Recommends "false";
APT::Default-Release "$suite";
Acquire::Languages "none";
CONF
    } >"$apt/apt.conf"
    archives=$apt/var/cache/apt/archives
    (
        export APT_CONFIG=$apt/apt.conf
        apt-get -qq update
        # shellcheck disable=SC2086
        apt-get -qq -y --download-only install $wanted >/dev/null
    )
    mkdir -p "$root"/usr/{bin,sbin,lib,lib64}
    for name in bin sbin lib lib64; do ln -s usr/$name "$root/$name"; done
    for package in "$archives"/*.deb; do
        dpkg-deb --fsys-tarfile "$package" |
            tar -x --keep-directory-symlink --no-same-owner -C "$root" -f -
    done
    rm -rf "$apt"
    echo "$wanted" >"$root/.complete"
}

case ${1:-} in
    build | demo | test | long | ceph) ;;
    *) fail "usage: install.sh build|demo|test|long|ceph" ;;
esac
install_system_packages "$1"
install_python_packages
case $1 in
    demo | test | long | ceph)
        unpack trixie "QEMU 10 and a guest kernel from Debian 13 (110 MB)" "$PEERS" trixie ;;
esac
case $1 in
    long) unpack backports "QEMU 11 from Debian 13's backports, and OVMF (130 MB)" "$NEWER_PEERS" \
        trixie trixie-backports ;;
esac
