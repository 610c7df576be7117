#!/usr/bin/env bash
# The Dockerfile's image, built on this machine without a container registry, and a command with it.
#
#   tests/image/build.sh FOLDER COMMAND ...    # build it, run COMMAND, delete it
#
# COMMAND finds buildah set up for it (CONTAINERS_STORAGE_CONF) with the images stand-in and
# megatron-scmoe. Downloads stay in FOLDER for the next time. KEEP=1 keeps the images too.
#
# A stand-in takes the place of NVIDIA's image: this machine's Debian, this Python 3.12, PyTorch and
# Transformer Engine. Neither CUDA's compiler nor a driver is in it.
#
# It has to be run as root on Debian, with python3 (3.12) not of Debian's own, and with its packages
#
#   apt-get install --no-install-recommends buildah debootstrap
#
# transformer_engine_torch is compiled, unless a wheel of it lies in FOLDER/wheels.
set -euo pipefail

TORCH=2.11.0
TRANSFORMER_ENGINE=2.17.1  # for this PyTorch and its CUDA 13
NUMPY=1.26.4               # older than what pip would take: it has to stay
PACKAGES=ca-certificates,g++,git,make

fail() {
    echo "build.sh: error: $1" >&2
    exit 2
}

(($# >= 2)) || fail "$# words given; accepted: FOLDER COMMAND ..."
((EUID == 0)) || fail "not root; accepted: root, who may make a root file system"
for program in buildah debootstrap; do
    command -v "$program" >/dev/null || fail "no $program; accepted: apt-get install buildah debootstrap"
done
prefix=$(python3 -c 'import sys; print(sys.base_prefix if sys.version_info[:2] == (3, 12) else "")')
[[ -n $prefix && $prefix != /usr ]] ||
    fail "python3 is $(python3 --version) in $(command -v python3); accepted: a Python 3.12 in a folder of its own, as pyenv's"

mkdir -p "$1/debs" "$1/wheels"
folder=$(realpath "$1")
shift
cat >"$folder/storage.conf" <<CONF
[storage]
driver = "overlay"
graphroot = "$folder/store"
runroot = "$folder/run"
CONF
export CONTAINERS_STORAGE_CONF=$folder/storage.conf BUILDAH_ISOLATION=chroot

# shellcheck disable=SC2317  # the trap calls it
clean() {
    buildah rm --all >/dev/null
    [[ -z ${KEEP:-} ]] || return 0
    umount "$folder/store/overlay" || true  # buildah mounts it on itself
    rm -rf "$folder/store" "$folder/run"
}
trap clean EXIT

make_stand_in() {
    local codename mirror base root
    # shellcheck disable=SC1091  # Debian's
    codename=$(. /etc/os-release && echo "${VERSION_CODENAME:-}")
    mirror=$(apt-get indextargets --format "\$(REPO_URI)" "Codename: $codename" | head -n 1)
    [[ -n $mirror ]] || fail "apt has no mirror of '$codename'; accepted: Debian after apt-get update"
    base=$(buildah from scratch)
    root=$(buildah mount "$base")
    debootstrap --variant=minbase --cache-dir="$folder/debs" --include="$PACKAGES" \
        "$codename" "$root" "$mirror" >"$folder/debootstrap.log" ||
        fail "debootstrap; see $folder/debootstrap.log"

    # Python, with the libraries that it is linked to.
    mkdir -p "$root/usr/local/bin" "$root/usr/local/lib"
    cp -P "$prefix"/bin/python3* "$root/usr/local/bin"
    cp -P "$prefix"/lib/libpython3* "$root/usr/local/lib"
    cp -r "$prefix/include" "$root/usr/local"
    tar -C "$prefix/lib" --exclude site-packages --exclude test --exclude __pycache__ -c python3.12 |
        tar -C "$root/usr/local/lib" -x
    ldd "$prefix/bin/python3.12" "$prefix"/lib/python3.12/lib-dynload/*.so | grep -oP '=> \K/\S+' |
        sort -u | while read -r library; do
        [[ $library == "$prefix"/* || -e $root$library ]] || cp -L --parents "$library" "$root"
    done
    mkdir -p "$root/usr/local/lib/python3.12/site-packages"

    # This machine's way to PyPI.
    cp -L /etc/ssl/certs/ca-certificates.crt "$root/etc/ssl/certs"
    [[ ! -e /etc/pip.conf ]] || cp /etc/pip.conf "$root/etc"

    buildah config --env PATH=/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin "$base"
    buildah run --volume "$PWD/tests/image:/stand-in:ro" --volume "$folder/wheels:/wheels" "$base" -- \
        /stand-in/stand_in.sh "$TORCH" "$NUMPY" "$TRANSFORMER_ENGINE" >"$folder/pip.log" 2>&1 ||
        fail "PyTorch and Transformer Engine; see $folder/pip.log"
    buildah config --env PIP_CONSTRAINT=/etc/pip/constraint.txt "$base"
    buildah commit --quiet --rm "$base" stand-in >/dev/null
}

buildah inspect --type image stand-in >/dev/null 2>&1 || make_stand_in
buildah bud --format docker --quiet --layers --build-arg NGC_PYTORCH=localhost/stand-in --tag megatron-scmoe .
"$@"
