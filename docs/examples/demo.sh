#!/bin/sh
# The main job on real input: a root file system goes in, and three containers run on copy-on-write layers of it.
#
#   ./dev demo               a Debian built from Debian's own packages (kept in .cache for the next time)
#   ./dev demo TARBALL       your own: .tar, .tar.gz, .tar.xz, .tar.zst
#
# Without root it does what works without: an image instead of a tarball, and no containers. All is gone at the end.
set -eu

work=$(mktemp -d "${TMPDIR:-/tmp}/thinpool-demo.XXXXXX")
export THINPOOL_POOL="$work/pool"
PATH="$PWD/.venv/bin:$PATH:/usr/sbin:/sbin"
cache=$PWD/.cache
step=0
: >"$work/running" # pids of what runs in the background

# Takes down what is still up, whatever ended the demo.
finish() {
    status=$?
    trap - EXIT INT TERM
    while read -r pid; do kill "$pid" 2>/dev/null || true; done <"$work/running"
    if [ -d "$work/look" ]; then umount "$work/look" 2>/dev/null || true; fi
    if [ "$(id -u)" = 0 ] && [ -d "$THINPOOL_POOL" ]; then
        for name in $(thinpool ps --json 2>/dev/null | sed -n 's/.*"layer": "\(.*\)".*/\1/p'); do
            thinpool umount "$name" >/dev/null 2>&1 || true
        done
        tries=0 # the pool's server stops by itself once nothing is attached
        while { [ -S "$THINPOOL_POOL/server.sock" ] || grep -q " $work/" /proc/mounts; } && [ $tries -lt 75 ]; do
            sleep 0.2
            tries=$((tries + 1))
        done
    fi
    rm -rf --one-file-system "$work"
    exit $status
}
trap finish EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

now() { date +%s%N; }
allocated() { thinpool df --json 2>/dev/null | sed -n 's/.*"allocated": \([0-9]*\).*/\1/p'; }

# do_step TITLE COMMAND...: runs it, and says what it took in time and in the pool's space.
do_step() {
    title=$1
    shift
    step=$((step + 1))
    printf '\n\033[1m%d. %s\033[0m\n' "$step" "$title"
    before=$(allocated) start=$(now)
    set +e # so that the status can be looked at; within, it holds
    (set -e; "$@") >"$work/output" 2>&1
    status=$?
    set -e
    sed 's/^/   /' "$work/output"
    [ $status -eq 0 ] || exit $status
    took=$((($(now) - start) / 1000000)) after=$(allocated)
    printf '   \033[2m%d.%03d s, %+d KiB in the pool\033[0m\n' $((took / 1000)) $((took % 1000)) $(((${after:-0} - ${before:-0}) / 1024))
}

# --- input ---

build_rootfs() {
    mkdir -p "$cache"
    mirror=$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' 'Suite: oldstable | stable' 2>/dev/null | head -n 1)
    debootstrap --variant=minbase bookworm "$work/debian" "${mirror:-http://deb.debian.org/debian}" >"$work/debootstrap.log" 2>&1 ||
        { tail -n 5 "$work/debootstrap.log"; return 1; }
    tar -C "$work/debian" --xattrs --one-file-system -czf "$cache/debian-12.tar.gz.new" .
    mv "$cache/debian-12.tar.gz.new" "$cache/debian-12.tar.gz"
    rm -rf --one-file-system "$work/debian"
    ls -lh "$cache/debian-12.tar.gz" | awk '{print $5, "of a minimal Debian 12, packed"}'
}

# --- with root ---

run_three() {
    for name in web db cache; do
        thinpool run debian:12 --name $name -- /bin/sh -c "
            echo 'this is $name' > /etc/motd
            rm -rf /usr/share/doc
            dd if=/dev/urandom of=/var/tmp/data bs=64k count=16 2>/dev/null
            hostname" &
        echo $! >>"$work/running"
    done
    for pid in $(cat "$work/running"); do wait "$pid"; done
    : >"$work/running"
}

each_sees_its_own() {
    for name in web db cache; do thinpool run $name --rm -- /bin/sh -c 'cat /etc/motd; ls /usr/share/doc 2>/dev/null | wc -l'; done | paste - - |
        awk '{print "\"" $1, $2, $3 "\", and", $4, "documents in /usr/share/doc"}'
}

break_and_reset() {
    mkdir -p "$work/look"
    thinpool mount web "$work/look"
    rm -rf "$work/look/etc" "$work/look/usr"
    echo "after rm -rf /etc /usr, web has: $(ls "$work/look" | tr '\n' ' ')"
    thinpool umount web
    thinpool reset web --to web@good
    thinpool run web --rm -- cat /etc/motd
}

delete_the_base() {
    thinpool run web --name still-running -- /bin/sh -c 'sleep 1; cat /etc/motd; echo "and the base is gone"' &
    echo $! >>"$work/running"
    while ! thinpool ps | grep -q still-running; do sleep 0.05; done
    thinpool rm debian:12
    thinpool ls
    wait "$(cat "$work/running")"
    : >"$work/running"
}

export_one() {
    thinpool export db "$work/db.img"
    ls -lhs "$work/db.img" | awk '{print $1, "on disk of", $6}'
    e2fsck -fn "$work/db.img" >"$work/e2fsck.log" 2>&1
    tail -n 1 "$work/e2fsck.log"
}

with_root() {
    tarball=${1:-$cache/debian-12.tar.gz}
    if [ $# -eq 0 ] && [ ! -e "$tarball" ]; then do_step "Build a root file system from Debian's own packages" build_rootfs; fi
    do_step "Import it: one base layer" thinpool import "$tarball" --name debian:12
    do_step "Start three containers at once; each writes 1 MiB and deletes files" run_three
    do_step "Each sees its own changes only" each_sees_its_own
    do_step "One base, three small layers" sh -c 'thinpool ls; thinpool df'
    do_step "Snapshot one" thinpool snapshot web web@good
    do_step "Break it, and reset it" break_and_reset
    do_step "Delete the base's name while a container goes on" delete_the_base
    do_step "Export one as a raw image, and check it" export_one
}

# --- without ---

make_image() {
    mkdir -p "$work/tree/etc"
    cp -rL /usr/share/common-licenses "$work/tree/" 2>/dev/null || true
    echo "a small tree" >"$work/tree/etc/motd"
    mke2fs -q -t ext4 -d "$work/tree" "$work/base.img" 256M
}

change_clones() {
    for name in web db cache; do
        thinpool clone base $name
        thinpool export $name "$work/$name.img"
        e2fsck -fn "$work/$name.img" >"$work/e2fsck.log" 2>&1
        tail -n 1 "$work/e2fsck.log"
    done
}

without_root() {
    do_step "Make an ext4 image" make_image
    do_step "Import it, and seal it" sh -c 'thinpool import --raw "$0" --name base && thinpool seal base' "$work/base.img"
    do_step "Three clones; export and check each" change_clones
    do_step "One base, three empty layers" sh -c 'thinpool ls; thinpool df'
    do_step "Snapshot one, and reset it" sh -c 'thinpool snapshot web web@good && thinpool reset web --to web@good'
    do_step "Delete the base; its clones stay whole" sh -c 'thinpool rm base && thinpool ls'
    printf '\nLeft out, for the kernel asks for root there: unpacking a tarball, mounts, block devices, containers.\n'
}

thinpool init --capacity 50G
if [ "$(id -u)" = 0 ]; then with_root "$@"; else without_root; fi
