# SPDX-License-Identifier: Apache-2.0
#
# The life of the Debian package, in a clean tree, as root: /outside/older has packages of a lower version than
# /outside/packages. A line for each thing that holds; it ends at the first that does not.
set -eu

holds() { # what, command…
    local what=$1
    shift
    "$@" >/tmp/said 2>&1 || { echo "NOT: $what"; cat /tmp/said; exit 1; }
    echo "holds: $what"
}
says() { # text, command…: it is in the output, whatever the exit code
    local text=$1
    shift
    "$@" 2>&1 | grep -qF -- "$text"
}
apt() { apt-get -q -y --no-install-recommends "$@"; }
as_user() { runuser -u vhostsync -- env STATE_DIRECTORY=/var/lib/vhostsync VHOSTSYNC_CONTROL=/run/d/control "$@"; }
until_there() {
    local tries=300
    while [ ! -e "$1" ]; do
        tries=$((tries - 1))
        [ $tries -gt 0 ] && kill -0 "$2" || { cat /tmp/serve; return 1; }
        sleep 0.1
    done
}
serve() {
    rm -f /run/d/control
    as_user vhostsync serve --socket-path /run/d/vm.sock --control /run/d/control --blk-file "$1" >/tmp/serve 2>&1 &
    backend=$!
    until_there /run/d/control $backend
}
leave() { as_user vhostsync quit && wait $backend; }

apt update >/dev/null
older=$(dpkg-deb -f /outside/older/vhostsync_*.deb Version)
newer=$(dpkg-deb -f /outside/packages/vhostsync_*.deb Version)

holds "it installs" apt install /outside/older/vhostsync_*.deb
holds "it comes without a compiler and without pip" sh -c '! command -v cc && ! command -v pip3'
holds "the program runs" says "vhostsync $newer" vhostsync --version # the older package is this one, by another number
holds "its extension loads" says "/nowhere" vhostsync serve --socket-path /tmp/x --blk-file /nowhere
holds "there is the user, of the group kvm" sh -c 'id -nG vhostsync | grep -qw kvm'
holds "the state directory is the user's" sh -c '[ "$(stat -c %U:%G /var/lib/vhostsync)" = vhostsync:kvm ]'
holds "QEMU's descriptor names the program" \
    sh -c 'test -x "$(sed -n "s/.*\"binary\": \"\(.*\)\".*/\1/p" /usr/share/qemu/vhost-user/50-vhostsync.json)"'
holds "completions lie where the shells look" test -s /usr/share/bash-completion/completions/vhostsync \
    -a -s /usr/share/zsh/vendor-completions/_vhostsync -a -s /usr/share/fish/vendor_completions.d/vhostsync.fish
holds "each command has its page" \
    sh -c 'dpkg -L vhostsync | grep -c /man1/ && dpkg -L vhostsync | grep -q /man1/vhostsync-mirror-start.1.gz'
# Where the service manager is not installed the units cannot be asked about.
holds "the service manager takes the units" sh -c '! systemd-analyze verify --man=no /usr/lib/systemd/system/vhostsync*.service \
    /usr/lib/systemd/system/vhostsync@.socket 2>&1 | grep vhostsync'
holds "without its package a kind of disk says which" \
    says "vhostsync-nbd" vhostsync serve --socket-path /tmp/x --blk-file "nbd+unix:///?socket=/nowhere"
holds "and so does Ceph's" says "vhostsync-rbd" vhostsync serve --socket-path /tmp/x --blk-file rbd:pool/image

mkdir -p /disks /run/d
echo DISK=/disks/a.img >/etc/vhostsync/vm.conf
truncate -s 8M /disks/a.img
dd if=/dev/urandom of=/disks/a.img bs=64k count=16 conv=notrunc status=none
chown -R vhostsync:kvm /disks /run/d
serve /disks/a.img
holds "it serves as its user" sh -c "grep -q serving /tmp/serve"
holds "it mirrors" as_user vhostsync mirror start /disks/b.img --create --wait
holds "it switches" as_user vhostsync switch --keep-mirror
holds "an upgrade leaves the backend alone" apt install /outside/packages/*.deb
holds "it is the newer package" sh -c "dpkg-query -W vhostsync vhostsync-nbd vhostsync-rbd | grep -c '$newer' | grep -qx 3"
holds "the upgraded program finds the backend" says /disks/b.img as_user vhostsync status
holds "it ends in order" leave
holds "both disks hold the same" cmp /disks/a.img /disks/b.img
serve /disks/b.img
holds "the upgraded backend goes on with the mirror" sh -c '
    for _ in $(seq 300); do
        runuser -u vhostsync -- vhostsync --control /run/d/control status --json | grep -q "\"steady\"" && exit 0
        sleep 0.1
    done
    exit 1'
holds "it ends in order again" leave
holds "the NBD package brings its kind" \
    says "nowhere" vhostsync serve --socket-path /tmp/x --blk-file "nbd+unix:///?socket=/nowhere"
holds "the extension of Ceph loads" python3 -I -c 'import sys; sys.path.insert(0, "/usr/lib/vhostsync"); import vhostsync._rbd'

sum=$(sha256sum /disks/a.img /disks/b.img /var/lib/vhostsync/*.json /etc/vhostsync/vm.conf)
holds "it can be removed" apt remove vhostsync vhostsync-nbd vhostsync-rbd
holds "the program is gone" sh -c '! command -v vhostsync'
holds "a purge works" apt purge vhostsync vhostsync-nbd vhostsync-rbd
holds "nothing of its own is left" sh -c '! ls -d /usr/lib/vhostsync /etc/apparmor.d/*vhostsync* /etc/needrestart/conf.d/vhostsync.conf'
holds "disks, records and settings are as they were" sh -c "echo '$sum' | sha256sum --quiet -c"
rm -r /disks /var/lib/vhostsync/* /etc/vhostsync/*
holds "it installs again" apt install /outside/packages/vhostsync_*.deb
holds "and goes without a trace where nothing was kept" apt purge vhostsync
holds "its directories are gone" sh -c '! ls -d /var/lib/vhostsync /etc/vhostsync'
echo "the whole life of $older and $newer"
