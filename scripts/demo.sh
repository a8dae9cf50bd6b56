#!/bin/sh
# The demonstration: an image out of Debian's packages, a machine of it, a command over ssh.
set -eu
cd "$(dirname "$0")/.."
export LODGE_HOME="${LODGE_HOME:-$HOME/.local/share/lodge-demo}"
lodge="$PWD/target/release/lodge"
key="$LODGE_HOME/demo-key"
port="${LODGE_DEMO_PORT:-2222}"
say() { printf '\n\033[1m%s\033[0m\n' "$*"; }

mkdir -p "$LODGE_HOME"
[ -f "$key" ] || ssh-keygen -q -t ed25519 -N '' -C lodge-demo -f "$key"

if ! "$lodge" image inspect debian-12 >/dev/null 2>&1; then
    say "Building the image debian-12 out of Debian's packages"
    "$lodge" image build debian-12
fi

say "Starting a machine: lodge run debian-12 --name demo --ssh-key $key.pub --port $port:22 --wait ready"
"$lodge" rm --force demo >/dev/null 2>&1 || true
"$lodge" run debian-12 --name demo --ssh-key "$key.pub" --port "$port:22" --wait ready --timeout 180

say "How it came up: lodge timeline demo"
"$lodge" timeline demo

say "What there is: lodge ls"
"$lodge" ls

say "A command in the guest, over ssh"
ssh -i "$key" -p "$port" -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null \
    -o LogLevel=ERROR root@127.0.0.1 'uname -sr; cat /etc/os-release | head -1; ip -br -4 address'

say "It goes on running. To look in, and to end it:"
cat <<TEXT
  export LODGE_HOME=$LODGE_HOME
  $lodge console demo        # ~. leaves
  $lodge inspect demo
  ssh -i $key -p $port root@127.0.0.1
  $lodge rm --force demo
TEXT
