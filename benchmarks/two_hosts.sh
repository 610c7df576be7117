#!/usr/bin/env bash
# Two hosts on one machine: two network namespaces joined by a shaped link, one gloo rank in each.
#
#   benchmarks/two_hosts.sh --rate 400mbit -- benchmarks/step_time.py --shape cpu
#
# The rate (default 400mbit) is a number of kbit, mbit or gbit a second, each way. The command is a
# Python script with its arguments; it runs once in each namespace, as torchrun would start it (RANK,
# WORLD_SIZE, MASTER_ADDR, ...). Needs root, ip and tc (Debian: iproute2) and setpriv (util-linux).
# Communication then costs time but no core, so overlap can be seen with two cores and no GPU.
set -euo pipefail

usage() { sed -n '2,9s/^# \{0,1\}//p' "$0"; }
fail() { echo "two_hosts.sh: error: $*" >&2; exit 2; }

rate=400mbit
while [ $# -gt 0 ]; do
  case "$1" in
    --rate) [ $# -gt 1 ] || fail "--rate has no value; accepted: 400mbit, 1gbit, ..."; rate=$2; shift 2 ;;
    -h | --help) usage; exit 0 ;;
    --) shift; break ;;
    *) fail "$1: unknown; accepted: --rate RATE -- SCRIPT [ARGUMENTS]" ;;
  esac
done
[ $# -gt 0 ] || fail "no script is given; accepted: --rate RATE -- SCRIPT [ARGUMENTS]"
[[ $rate =~ ^[1-9][0-9]{0,5}(k|m|g)bit$ ]] || fail "--rate $rate: not a rate; accepted: 400mbit, 1gbit, ..."
for tool in ip:iproute2 tc:iproute2 setpriv:util-linux; do
  command -v "${tool%:*}" > /dev/null || fail "${tool%:*} is missing; install ${tool#*:}"
done
[ "$(id -u)" = 0 ] || fail "network namespaces need root; run it as root"

here=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-$here/.venv/bin/python}
[ -x "$python" ] || fail "$python is missing; run 'make test' once, or set PYTHON"

# Ends what runs in a namespace, politely first, and removes it.
remove() {
  for signal in TERM KILL; do
    running=$(ip netns pids "$1" 2> /dev/null) || true
    [ -n "$running" ] || break
    # shellcheck disable=SC2086
    kill -s "$signal" $running 2> /dev/null || true
    for _ in {1..20}; do
      [ -n "$(ip netns pids "$1" 2> /dev/null)" ] || break
      sleep 0.1
    done
  done
  ip netns delete "$1" 2> /dev/null || true
}
# A run that was killed could not clean up.
for name in $(ip netns list 2> /dev/null | grep -o '^scmoe[0-9]*-[01]' || true); do
  owner=${name#scmoe}
  [ -d "/proc/${owner%-*}" ] || remove "$name"
done

tag=scmoe$$
names=("$tag-0" "$tag-1")
pids=()
cleanup() {
  for name in "${names[@]}"; do remove "$name"; done
}
trap cleanup EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP

for name in "${names[@]}"; do
  ip netns add "$name" 2> /dev/null || fail "cannot make a network namespace here"
  ip -n "$name" link set lo up
done
ip link add "v$$a" netns "${names[0]}" type veth peer name "v$$b" netns "${names[1]}"
devices=("v$$a" "v$$b")
for rank in 0 1; do
  ip -n "${names[$rank]}" address add "10.77.0.$((rank + 1))/24" dev "${devices[$rank]}"
  ip -n "${names[$rank]}" link set "${devices[$rank]}" up
  # A bucket of a millisecond or so: the link is slow, not bursty.
  tc -n "${names[$rank]}" qdisc add dev "${devices[$rank]}" root tbf \
    rate "$rate" burst 128kb latency 400ms || fail "--rate $rate: tc cannot shape the link so"
done

for rank in 0 1; do
  ip netns exec "${names[$rank]}" setpriv --pdeathsig KILL env \
    RANK=$rank LOCAL_RANK=0 WORLD_SIZE=2 MASTER_ADDR=10.77.0.1 MASTER_PORT=29400 \
    GLOO_SOCKET_IFNAME="${devices[$rank]}" OMP_NUM_THREADS=1 \
    SCMOE_LINK="gloo, two hosts at $rate" PYTHONPATH="$here${PYTHONPATH:+:$PYTHONPATH}" \
    "$python" -W ignore "$@" &
  pids+=($!)
done
status=0
wait -n "${pids[@]}" || status=$?
[ "$status" = 0 ] || exit "$status"  # one rank failed; the trap ends the other
wait "${pids[1]}" && wait "${pids[0]}"
