#!/bin/bash
# Gets the peers that vhostpy is measured beside: DPDK's testpmd, OVS-DPDK, QEMU's storage
# daemon, fio; and 2 MiB hugepages for them. By apt, on Debian 12, as root or with sudo.
set -euo pipefail

say() { echo "bench-peers: $*" >&2; }
fail() { echo "bench-peers: $1" >&2; [ -z "${2:-}" ] || echo "  next: $2" >&2; exit 1; }

HUGEPAGES=${HUGEPAGES:-1280}

missing=""
command -v dpdk-testpmd >/dev/null || missing+=" dpdk-dev"
[ -x /usr/lib/openvswitch-switch-dpdk/ovs-vswitchd-dpdk ] || missing+=" openvswitch-switch-dpdk"
command -v qemu-storage-daemon >/dev/null || missing+=" qemu-system-common qemu-utils"
command -v fio >/dev/null || missing+=" fio"
sudo=""
[ "$(id -u)" = 0 ] || sudo=sudo
if [ -n "$missing" ]; then
    command -v apt-get >/dev/null || fail "this needs:$missing" "install them with your package manager"
    say "system packages, by ${sudo:+sudo }apt-get install:$missing"
    $sudo apt-get -qq update
    # A daemon that the package would start has no place here: ours runs in a directory of its own.
    # shellcheck disable=SC2086
    $sudo env DEBIAN_FRONTEND=noninteractive RUNLEVEL=1 \
        apt-get -qq -y install --no-install-recommends $missing >/dev/null
fi
if [ "$(cat /proc/sys/vm/nr_hugepages)" -lt "$HUGEPAGES" ]; then
    echo "$HUGEPAGES" | $sudo tee /proc/sys/vm/nr_hugepages >/dev/null
fi
[ "$(cat /proc/sys/vm/nr_hugepages)" -ge 512 ] ||
    fail "only $(cat /proc/sys/vm/nr_hugepages) hugepages of 2 MiB are to be had" "free memory, or restart the machine"
if ! grep -q ' /dev/hugepages hugetlbfs ' /proc/mounts; then
    $sudo mkdir -p /dev/hugepages
    $sudo mount -t hugetlbfs none /dev/hugepages
fi
