# shellcheck shell=bash
# Part of env.sh: to $TMPDIR and back.  A stage is $TMPDIR/kd-UID-JOB with code/ (the scripts), work/ (where they run:
# the user's relative paths, and the run folder) and data/ (STAGE_DATA).

# ------------------------------------------------------------------------------------------------------------- there

# The same on every node, each with its own TMPDIR.
stage_path() {
  local folder=${TMPDIR:-/tmp}
  [ -d "$folder" ] && [ -w "$folder" ] || folder=/tmp
  printf '%s' "$folder/kd-$UID-$JOB"
}

free_kb() { df -Pk "$(dirname "$STAGE")" | awk 'NR == 2 {print $4}'; }

stage_full() {
  local folder name
  folder=$(dirname "$STAGE")
  name=$folder
  [ "$folder" != "$TMPDIR" ] || name="\$TMPDIR ($folder)"
  die "$name is full: $((NEEDED / 1024 + 1)) MB needed, $(($1 / 1024)) MB free"
}

# Kilobytes of all that is staged; of a packed tar less than it will need.
needed() {
  local record sum
  sum=$({
    du -scLk --exclude=__pycache__ "$ROOT"/*.py "$ROOT/common" | tail -n 1
    for record in "$@"; do
      case $record in
        L:*) du -sLk --exclude='*.pth' -- "$WHERE/${record#L:}" ;;
        *) du -sLk -- "$WHERE/${record#S:}" ;;
      esac
    done
    [ -z "$STAGE_DATA" ] || du -sLk -- "$STAGE_DATA"
  } 2> /dev/null | awk '{sum += $1} END {print sum + 1024}')  # and a little to run in
  printf '%s' "$sum"
}

copy() {  # WHAT COMMAND...: a copy that can be interrupted; the first of its complaints are shown
  local what=$1 left
  shift
  attend "$@" 2> >(awk 'NR < 3' >&2) && return
  stop_if_asked
  left=$(free_kb)
  [ "$left" -gt 1024 ] || stage_full "$left"
  die "cannot copy $what to $STAGE"
}

# Copy code, paths and data to this node's stage.  Arguments: S:PATH, or L:PATH without its checkpoints.
make_stage() {
  local record path left
  STAGE=$(stage_path)
  [ ! -O "$STAGE" ] || rm -rf -- "$STAGE"  # left by this job before it was requeued
  NEEDED=$(needed "$@")
  left=$(free_kb)
  [ "$NEEDED" -lt "$left" ] || stage_full "$left"
  if ! mkdir -m 700 -- "$STAGE" || ! mkdir -- "$STAGE/code" "$STAGE/work"; then
    die "cannot write $STAGE"
  fi
  copy "the scripts" cp -pLr -- "$ROOT"/*.py "$ROOT/common" "$STAGE/code/"
  rm -rf -- "$STAGE/code/common/__pycache__"
  cd "$WHERE" || die "$WHERE is gone"
  for record in "$@"; do
    path=${record#?:}
    case $record in
      L:*) copy "$path" find -L "$path" -type f ! -name '*.pth' -exec cp -pL --parents -t "$STAGE/work" -- {} + ;;
      *) copy "$path" cp -pLr --parents -t "$STAGE/work" -- "$path" ;;
    esac
  done
  [ -z "$STAGE_DATA" ] || stage_data
}

stage_data() {
  local target=$STAGE/data inside
  mkdir -- "$target"
  case $STAGE_DATA in
    *.tar | *.tar.* | *.tgz | *.tbz2 | *.txz)
      copy "$STAGE_DATA" tar -xf "$STAGE_DATA" -C "$target"
      inside=("$target"/*)
      [ "${#inside[@]}" -ne 1 ] || [ ! -d "${inside[0]}" ] || target=${inside[0]}
      ;;
    *)
      copy "$STAGE_DATA" cp -pLr -t "$target" -- "$STAGE_DATA"
      target=$target/$(basename "$STAGE_DATA")
      ;;
  esac
  printf '%s' "$target" > "$STAGE/data_root"
}

# What a task of srun does: a function of these files, with its own node's stage.
# shellcheck disable=SC2016  # expanded there
ON_NODE='. "$0/env.sh"; STAGE=$(stage_path); "$@"'

on_each_node() {  # FUNCTION ARGUMENTS...
  srun --nodes="$SLURM_NNODES" --ntasks="$SLURM_NNODES" --ntasks-per-node=1 bash -c "$ON_NODE" "$HERE" "$@"
}

make_stages() {
  if [[ " ${ARGV[*]} " == *" --data-root"[=\ ]* ]] && [ -n "$STAGE_DATA" ]; then
    echo "STAGE_DATA is not staged: --data-root is given"
    STAGE_DATA=
  fi
  STAGE=$(stage_path)
  if [ "${SLURM_NNODES:-1}" -gt 1 ]; then
    attend on_each_node make_stage "${PATHS[@]}" || { stop_if_asked; exit 2; }
  else
    make_stage "${PATHS[@]}"
  fi
  stop_if_asked
  touch "$STAGE/began"
  echo "staged to $STAGE in $((SECONDS - BEGAN)) s"
}

remove_stage() { [ ! -O "$STAGE" ] || rm -rf -- "$STAGE"; }

drop_stages() {
  [ -n "$STAGE" ] && [ -z "$KEEP_STAGE" ] || return 0
  [ "${SLURM_NNODES:-1}" -eq 1 ] || on_each_node remove_stage 2> /dev/null
  cd / && remove_stage
}

# ----------------------------------------------------------------------------------------------------------- and back

# Files under a folder, NUL-terminated, in an order that keeps a copy of a running script consistent: a checkpoint is
# never newer than the metrics beside it, and latest.pth never newer than best.pth, which a resume relies on.
files_in_order() {
  cd "$1" || return
  find . -name '.?*' -prune -o -type f -name latest.pth -print0
  find . -name '.?*' -prune -o -type f -name '*.pth' ! -name latest.pth -print0
  find . -name '.?*' -prune -o -type f ! -name '*.pth' -print0
}

same_file() { [ "$(stat -c '%s %.Y' -- "$1" 2> /dev/null)" = "$(stat -c '%s %.Y' -- "$2" 2> /dev/null)" ]; }

# Copy what has changed in the run folder to the user's.  First all of it to a folder beside, then by renaming in the
# opposite order, so that a copy is complete or absent and an interrupted one leaves what was there.
sync_back() {
  local from=$STAGE/work/$OUT to beside file changed=() i
  case $OUT in /*) mark_own; return 0 ;; esac  # the script wrote it there itself
  [ -d "$from" ] || return 0
  to=$(realpath -m -- "$WHERE/$OUT")
  beside=$(dirname "$to")/.$(basename "$to").sync
  rm -rf -- "$beside".*
  beside=$beside.$JOB
  mkdir -p -- "$beside" || return
  while IFS= read -r -d '' file; do
    file=${file#./}
    ! same_file "$from/$file" "$to/$file" || continue
    mkdir -p -- "$(dirname "$beside/$file")" || return
    cp -p -- "$from/$file" "$beside/$file" || { [ ! -e "$from/$file" ] && continue; rm -rf -- "$beside"; return 1; }
    changed+=("$file")
  done < <(files_in_order "$from")
  [ -z "$MARK" ] || printf '%s\n' "$JOB" > "$beside/$MARK" || return
  if [ ! -e "$to" ]; then
    mv -T -- "$beside" "$to"
    return
  fi
  remove_replaced "$from" "$to"
  [ -z "$MARK" ] || mv -f -- "$beside/$MARK" "$to/" || return
  for ((i = ${#changed[@]} - 1; i >= 0; i--)); do
    file=${changed[i]}
    mkdir -p -- "$(dirname "$to/$file")" && mv -fT -- "$beside/$file" "$to/$file" || return
  done
  rm -rf -- "$beside"
}

# --overwrite: what the old run had and the new one has not goes when the new one has begun.
remove_replaced() {
  local pattern file
  [ -e "$1/config.json" ] || return 0
  for pattern in "${REPLACED[@]}"; do
    for file in "$2"/$pattern; do
      [ -e "$1/$(basename "$file")" ] || rm -f -- "$file"
    done
  done
}

# A requeued job continues only a run that it began itself: the job id stands in the run folder.
mark_own() {
  [ -z "$MARK" ] || [ ! "$OUT/config.json" -nt "$STAGE/began" ] || printf '%s\n' "$JOB" > "$OUT/$MARK"
}

# Copy back every SECONDS until the pipe says that all is done; never cut in the middle.
sync_loop() {
  local code
  while true; do
    read -rt "$1"
    code=$?
    [ "$code" -ne 0 ] || return 0
    [ "$code" -gt 128 ] || break
    sync_back || echo "warning: could not copy the results back; it is tried again" >&2
  done
  end_script
}

# The pipe was closed without a word: this shell was killed.  Its script must not go on alone; what it saves comes back.
end_script() {
  local pids states
  mapfile -t pids < "$STAGE/pids"
  states=("${pids[@]/#//proc/}")
  kill "${pids[@]}" 2> /dev/null
  for _ in {1..600}; do
    grep -qs '^State:[[:space:]]*[^ZX]' "${states[@]/%//status}" || break  # a zombie has ended too
    sleep 0.1
  done
  kill -s KILL "${pids[@]}" 2> /dev/null
  sync_back && remove_stage
}

start_helpers() {
  local seconds folder=$STAGE/work/$OUT
  seconds=$(awk -v minutes="${SYNC_MINUTES:-10}" 'BEGIN {print minutes * 60}')
  mkfifo "$STAGE/pipe" || die "cannot write $STAGE"
  sync_loop "$seconds" < "$STAGE/pipe" &
  HELPERS=($!)
  exec 9> "$STAGE/pipe"
  [ "$LOG_GPU" = 1 ] || return 0
  command -v nvidia-smi > /dev/null || { echo "LOG_GPU: no nvidia-smi here"; return 0; }
  case $OUT in /*) folder=$OUT ;; esac
  mkdir -p -- "$folder"
  nvidia-smi --query-gpu=timestamp,index,utilization.gpu,utilization.memory,memory.used --format=csv -l 10 >> "$folder/gpu.csv" 9>&- &
  GPU_LOGGER=$!
  echo "$GPU_LOGGER" >> "$STAGE/pids"
}

stop_helpers() {
  [ -z "$GPU_LOGGER" ] || kill "$GPU_LOGGER" 2> /dev/null
  GPU_LOGGER=
  [ "${#HELPERS[@]}" -eq 0 ] || { (echo >&9) 2> /dev/null; exec 9>&-; wait "${HELPERS[@]}" 2> /dev/null; }
  HELPERS=()
}
