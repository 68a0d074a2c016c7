#!/usr/bin/env bash
# Start a private SLURM cluster on this machine, with simulated nodes and one controller. It needs no root rights and no accounting.
#   slurm/local-cluster/start.sh DIR [NODES=2] [CPUS_PER_NODE=4]
# The script needs Debian's slurm-wlm and munge. When it has ended, run: source DIR/env.sh
# The port SLURM_BASE_PORT (17000) and the ports after it must be free.
set -euo pipefail

mkdir -p "$1"
dir=$(cd "$1" && pwd -P)
nodes=${2:-2}
cpus=${3:-4}
port=${SLURM_BASE_PORT:-17000}
prefix=0x7f00000 # the name 0x7f000001 is also a loopback address, so no line in /etc/hosts is needed
user=$(id -un)
export PATH=/usr/sbin:/sbin:$PATH SLURM_CONF=$dir/slurm.conf

for program in munged slurmctld slurmd sinfo; do
  command -v "$program" >/dev/null || { echo "error: no $program here; Debian: apt-get install slurm-wlm munge" >&2; exit 2; }
done
[ "$nodes" -le 9 ] || { echo "error: at most 9 nodes" >&2; exit 2; }
if (: <"/dev/tcp/127.0.0.1/$port") 2>/dev/null; then
  echo "error: port $port is in use, perhaps by an earlier cluster; stop that, or set SLURM_BASE_PORT" >&2
  exit 2
fi

rm -rf "${dir:?}"/{munge,socket,state,spool,log,pids}
mkdir -p "$dir"/{munge,socket,state,spool,log,pids}
chmod 755 "$dir" "$dir/socket"
chmod 700 "$dir/munge" "$dir/state"
(umask 077 && head -c 128 /dev/urandom >"$dir/munge/key")
: >"$dir/plugstack.conf"

# The controller notices a lost node after 10 s. A requeued job starts again once its credential has expired, 10 s later.
cat >"$dir/slurm.conf" <<CONF
ClusterName=local
FirstJobId=$((1000 + $(date +%s) % 60000000))
SlurmctldHost=$(hostname)(127.0.0.1)
SlurmctldPort=$port
SlurmUser=$user
SlurmdUser=$user
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket=$dir/socket/munge,cred_expire=10
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool/%n
SlurmctldPidFile=$dir/pids/slurmctld.pid
SlurmdPidFile=$dir/pids/slurmd.%n.pid
SlurmctldLogFile=$dir/log/slurmctld.log
SlurmdLogFile=$dir/log/slurmd.%n.log
PlugStackConfig=$dir/plugstack.conf
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SchedulerParameters=bf_interval=1,sched_interval=1,sched_min_interval=100000
ReturnToService=2
JobRequeue=1
KillWait=2
SlurmdTimeout=10
SlurmctldTimeout=10
MessageTimeout=10
MaxArraySize=${SLURM_MAX_ARRAY_SIZE:-1001}
NodeName=$prefix[1-$nodes] NodeHostname=$(hostname) NodeAddr=127.0.0.1 Port=[$((port + 1))-$((port + nodes))] CPUs=$cpus RealMemory=8000 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
CONF
cat >"$dir/env.sh" <<ENV
export SLURM_CONF=$dir/slurm.conf
ENV

munged --key-file="$dir/munge/key" --socket="$dir/socket/munge" --pid-file="$dir/pids/munged.pid" \
  --log-file="$dir/log/munged.log" --seed-file="$dir/munge/seed" --num-threads=2
slurmctld -c -f "$SLURM_CONF"
for ((node = 1; node <= nodes; node++)); do
  mkdir -p "$dir/spool/$prefix$node"
  slurmd -c -N "$prefix$node" -f "$SLURM_CONF"
done

for ((try = 0; try < 100; try++)); do
  if [ "$(sinfo --noheader --Node --format=%t 2>/dev/null | grep -cx idle)" = "$nodes" ]; then
    echo "$nodes nodes are up; now: source $dir/env.sh"
    exit 0
  fi
  sleep 0.1
done
echo "error: the nodes did not come up; the logs are in $dir/log" >&2
sinfo --Node --long >&2
exit 1
