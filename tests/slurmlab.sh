#!/usr/bin/env bash
# A real Slurm on one machine, for the tests: munge, slurmctld and a few virtual nodes on loopback.
#
#   SLURMLAB_DIR=/tmp/lab tests/slurmlab.sh start | stop | status
#   export SLURM_CONF=/tmp/lab/etc/slurm.conf      then sinfo, sbatch, srun, squeue, scontrol are the real thing
#
# partition gpu (default): a1, a2 with two pretend A100 each, v1 with four pretend V100
# partition untyped:       u1 (an L40S node), u2 (an RTX node), two GPUs each, whose Gres names no type, only the features do
# partition cpu:           c1 without a GPU
#
# Needs slurm-wlm and munge; no root, no systemd, no cgroups, no database.  Each job has a TMPDIR of its own, removed with it.
# SLURMLAB_DIR is wiped at every start.  SLURMLAB_PORT is slurmctld's, the k-th node listens on the k-th port after it.
# SLURMLAB_NODES gives other names to the six nodes above, in that order; jobs of several nodes need names that resolve.
# SLURMLAB_OWNER is a process id: when that process ends, the lab stops by itself.
set -uo pipefail
lab=${SLURMLAB_DIR:-${TMPDIR:-/tmp}/slurmlab}
port=${SLURMLAB_PORT:-26900}
read -ra nodes <<< "${SLURMLAB_NODES:-a1 a2 v1 u1 u2 c1}"
for variable in "${!SLURM_@}" "${!SBATCH_@}"; do unset "$variable"; done    # of a job that we may run in
export SLURM_CONF=$lab/etc/slurm.conf PATH=$PATH:/usr/sbin:/sbin

write_configuration() {
  local me k
  me=$(id -un)
  rm -rf "${lab:?}"/{etc,log,state,spool,tmp,dev,munge}
  mkdir -p "$lab"/{etc,log,state,tmp,dev,munge}
  head -c 128 /dev/urandom > "$lab/munge/key"
  chmod 600 "$lab/munge/key"
  for k in 0 1 2 3; do ln -s /dev/null "$lab/dev/gpu$k"; done    # a GPU must be a character device with a number
  for k in "${nodes[@]}"; do mkdir -p "$lab/spool/$k"; done

  cat > "$lab/etc/slurm.conf" << CONF
ClusterName=lab
SlurmctldHost=$(hostname -s)(127.0.0.1)
SlurmctldPort=$port
SlurmUser=$me
SlurmdUser=$me
AuthType=auth/munge
# cred_expire: a requeued job waits that long (120 s otherwise)
AuthInfo=socket=$lab/munge/socket,cred_expire=10
StateSaveLocation=$lab/state
SlurmctldPidFile=$lab/state/slurmctld.pid
SlurmctldLogFile=$lab/log/slurmctld.log
SlurmdSpoolDir=$lab/spool/%n
SlurmdPidFile=$lab/spool/%n/slurmd.pid
SlurmdLogFile=$lab/log/slurmd.%n.log
TaskProlog=$lab/etc/task_prolog
Epilog=$lab/etc/epilog
# nothing of the machine's own: no cgroups, no MPI, no database
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
# cores and GPUs are what is scheduled; slurmd believes the hardware declared here
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
SlurmdParameters=config_overrides
SlurmdTimeout=300
ReturnToService=2
# quick, and finished jobs stay visible to scontrol
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
# time to save what a cancelled job has, on a loaded machine too
KillWait=30
MinJobAge=3600
NodeName=DEFAULT CPUs=64 Boards=1 SocketsPerBoard=1 CoresPerSocket=64 ThreadsPerCore=1 RealMemory=1000000 TmpDisk=1000000
NodeName=${nodes[0]} NodeAddr=127.0.0.1 Port=$((port + 1)) Gres=gpu:a100:2 Feature=a100,gpu80g
NodeName=${nodes[1]} NodeAddr=127.0.0.1 Port=$((port + 2)) Gres=gpu:a100:2 Feature=a100,gpu40g
NodeName=${nodes[2]} NodeAddr=127.0.0.1 Port=$((port + 3)) Gres=gpu:v100:4 Feature=v100,gpu32g
NodeName=${nodes[3]} NodeAddr=127.0.0.1 Port=$((port + 4)) Gres=gpu:2 Feature=avx512,l40s
NodeName=${nodes[4]} NodeAddr=127.0.0.1 Port=$((port + 5)) Gres=gpu:2 Feature=avx512,rtx6000
NodeName=${nodes[5]} NodeAddr=127.0.0.1 Port=$((port + 6)) Feature=avx512
PartitionName=DEFAULT MaxTime=INFINITE DefaultTime=10
PartitionName=gpu Nodes=${nodes[0]},${nodes[1]},${nodes[2]} Default=YES
PartitionName=untyped Nodes=${nodes[3]},${nodes[4]}
PartitionName=cpu Nodes=${nodes[5]}
CONF
  cat > "$lab/etc/gres.conf" << CONF
NodeName=${nodes[0]},${nodes[1]} Name=gpu Type=a100 Flags=nvidia_gpu_env File=$lab/dev/gpu[0-1]
NodeName=${nodes[2]} Name=gpu Type=v100 Flags=nvidia_gpu_env File=$lab/dev/gpu[0-3]
NodeName=${nodes[3]},${nodes[4]} Name=gpu Flags=nvidia_gpu_env File=$lab/dev/gpu[0-1]
CONF
  echo "CgroupPlugin=cgroup/v1" > "$lab/etc/cgroup.conf"    # unused, but looking for one fails on some machines

  cat > "$lab/etc/task_prolog" << SCRIPT
#!/bin/sh
folder=$lab/tmp/\$SLURMD_NODENAME.\$SLURM_JOB_ID
mkdir -p -m 700 "\$folder" && echo "export TMPDIR=\$folder"
SCRIPT
  cat > "$lab/etc/epilog" << SCRIPT
#!/bin/sh
rm -rf "$lab/tmp/\${SLURMD_NODENAME:?}.\${SLURM_JOB_ID:?}"
SCRIPT
  chmod 755 "$lab/etc/task_prolog" "$lab/etc/epilog"
}

runs() { grep -qs '^State:[[:space:]]*[^ZX]' "/proc/$1/status"; }    # not a zombie that nobody has waited for
is_daemon() { runs "$1" && grep -qsE '^(munged|slurmctld|slurmd)$' "/proc/$1/comm"; }    # not a number used again

launch() {    # launch NAME COMMAND...: in the background, its process id kept
  local name=$1
  shift
  setsid "$@" < /dev/null > "$lab/log/$name.out" 2>&1 &
  echo $! >> "$lab/pids"
}

wait_for() {    # poll for 20 s, or until one of the daemons has died
  local limit=$((SECONDS + 20)) pid
  while [ "$SECONDS" -lt "$limit" ]; do
    "$@" > /dev/null 2>&1 && return
    while read -r pid; do runs "$pid" || break 2; done < "$lab/pids"
    sleep 0.05
  done
  echo "slurmlab: $* failed" >&2
  tail -n 5 "$lab"/log/*.out "$lab/log/slurmctld.log" >&2
  stop
  exit 1
}

controller_up() { timeout 2 scontrol ping | grep -q UP; }
nodes_idle() { [ "$(timeout 2 sinfo -h -N -t idle -o %N | sort -u | wc -l)" -eq "${#nodes[@]}" ]; }
queue_empty() { [ -z "$(timeout 2 squeue -h)" ]; }

start() {
  stop
  write_configuration
  launch munged munged -F --force --socket="$lab/munge/socket" --key-file="$lab/munge/key" \
    --seed-file="$lab/munge/seed" --pid-file="$lab/munge/pid" --log-file="$lab/log/munged.log"
  wait_for munge -n -S "$lab/munge/socket"
  launch slurmctld slurmctld -D
  wait_for controller_up
  local node
  for node in "${nodes[@]}"; do launch "slurmd.$node" slurmd -D -N "$node"; done
  wait_for nodes_idle
  if [ -n "${SLURMLAB_OWNER:-}" ]; then
    setsid bash "$0" watch < /dev/null > /dev/null 2>&1 &
  fi
}

stop() {
  [ -s "$lab/pids" ] || return 0
  local pid pids
  mapfile -t pids < <(tac "$lab/pids")
  if controller_up; then    # jobs outlive their slurmd: end them first
    squeue -h -o %A | sort -u | xargs -r scancel 2> /dev/null
    for _ in {1..100}; do queue_empty && break; sleep 0.1; done
  fi
  for pid in "${pids[@]}"; do is_daemon "$pid" && kill "$pid"; done
  for pid in "${pids[@]}"; do
    for _ in {1..60}; do is_daemon "$pid" || continue 2; sleep 0.05; done
    kill -9 "$pid"
  done
  rm -f "$lab/pids"
}

status() { timeout 5 sinfo -N -o "%N %P %G %f %t" && timeout 5 squeue; }

watch() {    # ends with its owner or with the lab
  while [ -s "$lab/pids" ]; do
    runs "$SLURMLAB_OWNER" || stop
    sleep 1
  done
}

case ${1:-} in
  start | stop | status | watch) "$1" ;;
  *) echo "usage: $0 start | stop | status" >&2; exit 2 ;;
esac
