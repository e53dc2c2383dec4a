#!/usr/bin/env bash
# One node of a Ray cluster inside a Slurm job: ray_node.sh IP PORT READY. campaign.sbatch starts it on every node; the
# first node is the head. It listens at IP and PORT, and creates the file READY once Ray has started; with a text in it
# if Ray does not start.
#
# The first line of the standard input is the token of the cluster. The end of the standard input ends Ray, so no node
# outlives the job's script. Ray makes its own folders writable by everybody. So its files and the token are in a new
# folder that only this user can enter, and that goes with the node.
set -euo pipefail
umask 077

attempts=3 # Ray gives up if it has not started after 30 s, as on a busy node or a slow file system
readonly ip=$1 port=$2 ready=$3
folder=$(mktemp -d "${RAY_TMPDIR:-/tmp}/ray-XXXXXXXX") # short: the path of a socket has at most 107 bytes
ray=""

# shellcheck disable=SC2317 # called by the trap
clean_up() {
  trap '' TERM
  if [[ $ray ]]; then
    kill "$ray"
    for _ in {1..50}; do kill -0 "$ray" && sleep 0.1; done
    kill -KILL "$ray" # its processes die with it; it may wait for a busy worker for half a minute
    wait "$ray"
  fi 2>/dev/null || true
  rm -rf "$folder"
}
trap clean_up EXIT
trap exit TERM

start_ray() {
  local options=(--head --port="$port" --node-ip-address="$ip")
  if [[ $SLURM_NODEID != 0 ]]; then options=(--address="$ip:$port"); fi
  # Other jobs may run Ray on this node, so each takes free ports. Trials need little of the object store.
  ray start "${options[@]}" --block --disable-usage-stats --temp-dir="$folder/r" --num-cpus="$SLURM_CPUS_ON_NODE" \
    --min-worker-port=0 --max-worker-port=0 --dashboard-agent-listen-port=0 --object-store-memory=$((256 << 20)) \
    >"$folder/start.log" 2>&1 </dev/null &
  ray=$!
}

read -r token
echo "$token" >"$folder/auth_token"
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$folder/auth_token
has_started=""
while true; do
  code=0
  read -r -t 1 || code=$?
  ((code > 128)) || exit 0 # not the end of a second, but of the input
  if [[ ! $ray ]]; then
    if [[ $SLURM_NODEID == 0 ]] || (: <"/dev/tcp/$ip/$port") 2>/dev/null; then start_ray; fi
  elif [[ ! $has_started ]] && grep -q "Ray runtime started" "$folder/start.log"; then
    has_started=yes
    if [[ $SLURM_NODEID == 0 ]]; then touch "$ready"; fi
  elif ! kill -0 "$ray" 2>/dev/null; then
    if [[ $has_started ]] || ((--attempts == 0)); then break; fi
    start_ray
  fi
done
echo "Ray has ended on $SLURMD_NODENAME:" >&2
tail -n 20 "$folder/start.log" >&2
if [[ $SLURM_NODEID == 0 ]]; then echo "failed" >"$ready"; fi
exit 1
