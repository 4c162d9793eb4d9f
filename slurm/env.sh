# shellcheck shell=bash
# Sourced by every batch file: a cluster's settings, the log's head and foot, signals and requeueing; staging is in
# stage.sh.  Nothing runs before a batch file calls
#     run_stage SCRIPT.py ARGUMENTS...
# Settings come from the environment, then from site.sh beside this file (site.sh.example lists them).  Bash 4.4 or newer.

HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
ROOT=$(dirname "$HERE")
# shellcheck source=slurm/stage.sh
. "$HERE/stage.sh"

die() { echo "error: $*" >&2; exit 2; }

# ------------------------------------------------------------------------------------------------------------ settings

load_site() {
  # shellcheck source=/dev/null
  [ ! -f "$HERE/site.sh" ] || . "$HERE/site.sh"
}

load_modules() {
  [ -n "$MODULES" ] && type module > /dev/null 2>&1 || return 0
  module purge
  # shellcheck disable=SC2086  # several names
  module load $MODULES || die "module load $MODULES failed: see 'module avail', and MODULES in slurm/site.sh"
}

absolute() { case $1 in /*) printf '%s' "$1" ;; *) printf '%s' "$PWD/$1" ;; esac; }

choose_python() {
  if [ -n "$PYTHON" ]; then
    command -v -- "$PYTHON" > /dev/null || die "PYTHON: $PYTHON is missing"
  elif [ -n "$VENV" ]; then
    PYTHON=$VENV/bin/python
    [ -x "$PYTHON" ] || die "VENV: $PYTHON is missing: make it with python3 -m venv $VENV and install requirements.txt"
  elif [ -x "$ROOT/.venv/bin/python" ]; then
    PYTHON=$ROOT/.venv/bin/python
  else
    PYTHON=python3
    command -v python3 > /dev/null || die "no python3 here: set PYTHON or VENV in slurm/site.sh"
  fi
  PYTHON=$(absolute "$(command -v -- "$PYTHON")")
  export PYTHON
}

choose_data() {
  [ -z "$STAGE_DATA" ] || [ -e "$STAGE_DATA" ] || die "STAGE_DATA: $STAGE_DATA is missing"
  [ -z "$DATA_ROOT" ] || [ -e "$DATA_ROOT" ] || die "DATA_ROOT: $DATA_ROOT is missing"
  [ -n "$STAGE_DATA$DATA_ROOT" ] || [ ! -d "$ROOT/data" ] || DATA_ROOT=$ROOT/data
  local name
  for name in STAGE_DATA DATA_ROOT HF_HOME TRANSFORMERS_CACHE; do  # the job works in another folder
    [ -z "${!name}" ] || export "$name=$(absolute "${!name}")"
  done
}

# What would fail only after hours in the queue; for the scripts that submit.
check_before_queue() {
  load_site
  (load_modules; choose_python; choose_data) || exit $?
  command -v sbatch > /dev/null || die "no sbatch on this machine: --local runs here, without Slurm"
}

# ----------------------------------------------------------------------------------------------------------------- log

quoted() { local words; printf -v words ' %q' "$@"; printf '%s' "${words# }"; }

head_lines() {
  local gpus
  printf 'job: %s%s%s\n' "${SLURM_JOB_ID:-none, process $$}" "${SLURM_ARRAY_TASK_ID:+, array index $SLURM_ARRAY_TASK_ID}" \
    "${SLURM_RESTART_COUNT:+, requeued $SLURM_RESTART_COUNT times}"
  echo "node: ${SLURM_JOB_NODELIST:-$(hostname)}"
  gpus=$(nvidia-smi -L 2> /dev/null | sed 's/ (UUID.*//' | paste -sd ';')
  echo "gpu: ${gpus:-none seen}, CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES-unset}"
  GIT_COMMIT=$(git -C "$ROOT" describe --always --dirty --abbrev=40 '--exclude=*' 2> /dev/null)
  export GIT_COMMIT  # the staged copy has no .git
  echo "commit: ${GIT_COMMIT:-unknown}"
  echo "command: $(quoted "$SCRIPT" "${GIVEN[@]}")"
  echo "date: $(date '+%F %T %z')"
}

foot_lines() {
  local code=$1 seconds=$((SECONDS - BEGAN)) again
  [ -z "$FOOT" ] || return 0
  FOOT=1
  if [ "$code" -ne 0 ] && [ "$code" -ne 75 ] && [ -n "$SLURM_ARRAY_JOB_ID" ]; then
    again=("${GIVEN[@]}")
    [[ " ${GIVEN[*]} " == *" --overwrite "* ]] || again+=(--overwrite)
    echo "failed: array index $SLURM_ARRAY_TASK_ID${OUT:+, $(basename "$OUT")}; again, alone:"
    echo "  sbatch --array=$SLURM_ARRAY_TASK_ID slurm/${SCRIPT%.py}.sbatch $(quoted "${again[@]}")"
  fi
  printf 'wall time: %d:%02d:%02d\nexit code: %d\n' $((seconds / 3600)) $((seconds / 60 % 60)) $((seconds % 60)) "$code"
}

at_exit() {
  local code=$?
  trap '' USR1 TERM INT
  stop_helpers
  drop_stages
  foot_lines "$code"
}

# ------------------------------------------------------------------------------------------------------------- signals

# USR1 (the time limit is near), TERM (scancel) and Ctrl-C go to whatever runs; a second INT would stop it unsaved.
note() {
  SIGNAL=$1
  [ -z "$CHILD" ] || kill -s "${1/INT/TERM}" "$CHILD" 2> /dev/null
}

# Run a command as a child and wait: bash runs its traps at once only while it waits.
attend() {
  local code
  "$@" 9>&- &
  CHILD=$!
  [ -z "$SIGNAL" ] || note "$SIGNAL"  # it came before there was a child
  wait "$CHILD"
  code=$?
  while kill -0 "$CHILD" 2> /dev/null; do  # the wait ended by a trap, not by the child
    wait "$CHILD"
    code=$?
  done
  CHILD=
  return "$code"
}

# End here where a signal came before the script ran.
stop_if_asked() {
  case $SIGNAL in
    USR1) requeue ;;
    TERM | INT) exit 143 ;;
  esac
}

# The run is saved but not finished: queue this job again, or fail, so that nothing that depends on it starts.
requeue() {
  local count=${SLURM_RESTART_COUNT:-0} most=${MAX_REQUEUES:-10} how
  how="--resume $(quoted "${OUT:-RUN}") continues"
  [ -n "$SLURM_JOB_ID" ] || { echo "not finished: $how" >&2; exit 75; }
  [ -n "$RESUMABLE" ] || { echo "error: the time limit came before $SCRIPT was done: give sbatch a longer --time" >&2; exit 75; }
  [ "$count" -lt "$most" ] || { echo "error: not finished after $count requeues (MAX_REQUEUES=$most): $how" >&2; exit 75; }
  stop_helpers
  drop_stages
  echo "requeueing job $SLURM_JOB_ID, $((count + 1)) of at most $most"
  foot_lines 75
  trap 'exit 75' TERM  # Slurm ends us
  scontrol requeue "$SLURM_JOB_ID" || { echo "error: Slurm did not requeue the job: $how" >&2; exit 75; }
  for _ in {1..300}; do sleep 1; done
  exit 75
}

# ----------------------------------------------------------------------------------------------------------------- run

# Settle what is run, written and staged before anything is copied: resolve.py's records.
resolve() {
  local records record
  mapfile -d '' -t records < <("$PYTHON" "$HERE/resolve.py" "$SCRIPT" "${GIVEN[@]}")
  wait $! || { stop_if_asked; exit 2; }  # resolve.py has said why
  RESUMABLE=
  for record in "${records[@]}"; do
    case $record in
      A:*) ARGV+=("${record#A:}") ;;
      O:*) OUT=${record#O:} ;;
      R:*) RESUMABLE=1 ;;
      W:*) REPLACED+=("${record#W:}") ;;
      S:* | L:*) PATHS+=("$record") ;;
    esac
  done
  [ -n "$OUT" ] || die "slurm/resolve.py named no output"
  [ -z "$RESUMABLE" ] || [ -z "$SLURM_JOB_ID" ] || MARK=.slurm_job
}

# In the stage of this node: become the script.
in_stage() {
  cd "$STAGE/work" || exit 2
  [ ! -s "$STAGE/data_root" ] || DATA_ROOT=$(cat "$STAGE/data_root")
  [ -z "$DATA_ROOT" ] || export DATA_ROOT
  export KD_STAGED=1  # the script saves no path of the stage
  echo "$BASHPID" >> "$STAGE/pids"
  exec "$PYTHON" "$STAGE/code/$SCRIPT" "$@"
}

# As a task of srun: an interrupted one does not count as failed there, or the others would be killed while they save.
in_stage_task() {
  local code
  trap : USR1 TERM  # the script gets them too
  (in_stage "$@")
  code=$?
  case $code in
    75 | 130 | 143) echo "$code" > "$STAGE/interrupted"; exit 0 ;;
  esac
  exit "$code"
}

run_script() {
  if [ "$TASKS" -eq 1 ]; then
    attend in_stage "${ARGV[@]}"
    return
  fi
  attend srun --kill-on-bad-exit=1 --ntasks="$TASKS" bash -c "$ON_NODE" "$HERE" in_stage_task "${ARGV[@]}" || return
  [ ! -e "$STAGE/interrupted" ] || return "$(cat "$STAGE/interrupted")"
}

run_stage() {
  local code
  SCRIPT=$1 BEGAN=$SECONDS WHERE=$PWD JOB=${SLURM_JOB_ID:-$$} RESUMABLE=1
  shift
  GIVEN=("$@") ARGV=() PATHS=() REPLACED=() HELPERS=() OUT='' SIGNAL='' CHILD='' FOOT='' STAGE='' MARK=''
  TASKS=${SLURM_NTASKS:-${SLURM_NNODES:-1}}
  export SCRIPT WHERE JOB
  [ -z "$SLURM_CPUS_PER_TASK" ] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK  # srun of 22.05 forgets it
  trap 'note USR1' USR1
  trap 'note TERM' TERM
  trap 'note INT' INT
  trap at_exit EXIT
  load_site
  load_modules
  choose_python
  [[ " $* " != *" --help "* ]] || exec "$PYTHON" "$ROOT/$SCRIPT" --help
  choose_data
  head_lines
  resolve
  stop_if_asked
  make_stages
  stop_if_asked
  start_helpers
  run_script
  code=$?
  stop_helpers
  case $SIGNAL:$code in
    USR1:138 | USR1:143) code=75 ;;  # it was still starting and had nothing to save
  esac
  if ! sync_back && ! sync_back; then  # twice: scancel's TERM hits cp too
    KEEP_STAGE=1
    echo "error: cannot copy the results to $WHERE/$OUT (disk full, quota?): they are in $STAGE/work/$OUT on $(hostname)" >&2
    exit 2
  fi
  [ "$code" -ne 75 ] || requeue
  exit "$code"
}
