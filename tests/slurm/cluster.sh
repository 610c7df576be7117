#!/usr/bin/env bash
# A real Slurm on this machine: munged, slurmctld and three slurmd, without systemd, in one folder.
#
#   tests/slurm/cluster.sh FOLDER COMMAND ...    # start it, run COMMAND against it, stop it
#
# COMMAND finds sbatch, squeue and scontrol set up for it (SLURM_CONF). FOLDER is made, and keeps the
# daemons' logs. It has to be run as root, with Debian's packages (or others of the same commands):
#
#   apt-get install --no-install-recommends slurmctld slurmd slurm-client munge
#
# Nothing outside FOLDER is written.
set -euo pipefail

NODES=3
PORT=${SLURM_TEST_PORT:-16817}  # of the controller; the nodes have the next ones

fail() {
    echo "cluster.sh: error: $1" >&2
    exit 2
}

(($# >= 2)) || fail "$# words given; accepted: FOLDER COMMAND ..."
((EUID == 0)) || fail "not root; accepted: root, whom the daemons of Slurm ask for"
for program in munged mungekey slurmctld slurmd sbatch; do
    command -v "$program" >/dev/null || fail "no $program; accepted: apt-get install slurmctld slurmd slurm-client munge"
done

mkdir -p "$1/state" "$1/log" "$1/spool"
folder=$(realpath "$1")
shift
chmod 755 "$folder"
host=$(hostname)

cat >"$folder/slurm.conf" <<CONF
ClusterName=test
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$PORT
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$folder/munge.socket,cred_expire=5  # a requeued job waits as long as this
CredType=cred/munge
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool/%n
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd-%n.pid
SlurmctldLogFile=$folder/log/slurmctld.log
SlurmdLogFile=$folder/log/slurmd-%n.log
MpiDefault=none
SwitchType=switch/none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=1,batch_sched_delay=0
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
ReturnToService=0
SlurmctldTimeout=60
SlurmdTimeout=60
KillWait=30
InactiveLimit=0
MinJobAge=3600
CONF
for ((node = 1; node <= NODES; node++)); do
    echo "NodeName=node$node NodeHostname=$host NodeAddr=127.0.0.1 Port=$((PORT + node)) CPUs=1 RealMemory=1000"
done >>"$folder/slurm.conf"
echo "PartitionName=test Nodes=ALL Default=YES MaxTime=INFINITE State=UP" >>"$folder/slurm.conf"
export SLURM_CONF=$folder/slurm.conf

daemons=()
# shellcheck disable=SC2317  # the trap calls it
stop() {
    scancel --user root --quiet 2>/dev/null || true
    ((${#daemons[@]})) && kill "${daemons[@]}" 2>/dev/null || true
    wait
}
trap stop EXIT

mungekey --create --force --keyfile "$folder/munge.key"
munged --foreground --force --key-file="$folder/munge.key" --socket="$folder/munge.socket" \
    --pid-file="$folder/munged.pid" --seed-file="$folder/munged.seed" \
    --log-file="$folder/log/munged.log" 2>"$folder/log/munged.err" &
daemons+=($!)
slurmctld -D -c >/dev/null 2>&1 &
daemons+=($!)
for ((node = 1; node <= NODES; node++)); do
    slurmd -D -N "node$node" >/dev/null 2>&1 &
    daemons+=($!)
done

for _ in {1..60}; do
    idle=$(sinfo --noheader --Node --states=idle 2>/dev/null | wc -l) || idle=0
    ((idle == NODES)) && break
    sleep 0.5
done
((idle == NODES)) || fail "$idle of $NODES nodes are up after 30 s; see $folder/log"

"$@"
