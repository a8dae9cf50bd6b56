#!/bin/sh
# Installs what is missing from Debian's packages; says exactly what. Arguments: package names.
set -eu
missing=""
for package in "$@"; do
    # A program that came another way serves as well as the package of its name.
    if ! command -v "$package" >/dev/null 2>&1 &&
        ! dpkg-query -W -f='${Status}' "$package" 2>/dev/null | grep -q 'ok installed'; then
        missing="$missing $package"
    fi
done
if ! command -v cargo >/dev/null 2>&1; then
    echo "Rust is missing: install rustc and cargo 1.89 or newer (https://rustup.rs), then run this again." >&2
    exit 1
fi
[ -z "$missing" ] && exit 0
echo "Installing from Debian's packages:$missing" >&2
sudo=""
if [ "$(id -u)" != 0 ]; then
    sudo=sudo
fi
# shellcheck disable=SC2086
{
    $sudo apt-get update -qq
    # The programs are wanted, not the services that some of them come with.
    $sudo env DEBIAN_FRONTEND=noninteractive SYSTEMD_OFFLINE=1 apt-get install -y -qq --no-install-recommends $missing >/dev/null
}
