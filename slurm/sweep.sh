#!/usr/bin/env bash
# A job a point of a grid: {"lr": [0.1, 0.01], "batch-size": [32, 64]}, or a list of points, which may have a "name".
#     slurm/sweep.sh [FLAGS] SCRIPT GRID.json [ARGUMENTS OF SCRIPT]
#     slurm/sweep.sh --max-running 4 train_student.py grid.json --output runs/sweep
#     slurm/sweep.sh --local --points 1,3 train_student.py grid.json --output runs/sweep --overwrite
#   --max-running N   so many points at a time
#   --points LIST     only these points, as 0,2-4
#   --local           run them here, one after another
#   --dry-run         only check the points and write their flags to OUTPUT/POINT.json, which --config takes
#   --x=y             any flag of sbatch, as --time=04:00:00
# shellcheck source=slurm/env.sh
. "$(dirname "${BASH_SOURCE[0]}")/env.sh"

usage() { sed -n '2,/^# shellcheck/{/^# shellcheck/!s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"; }

# One point after another; a failed one does not stop the others.
run_here() {
  local index name failed=()
  while IFS=$'\t' read -r index name _ <&3; do
    echo "--- point $index: $name"
    SLURM_ARRAY_TASK_ID=$index bash "$batch" --sweep "$grid" "$@" || failed+=("$index $name")
  done 3<<< "$points"
  [ "${#failed[@]}" -gt 0 ] || return 0
  [[ " $* " == *" --overwrite "* ]] || set -- "$@" --overwrite
  for name in "${failed[@]}"; do
    echo "failed: point $name; again, alone:"
    echo "  slurm/sweep.sh --local --points ${name%% *} $(quoted "$script" "$grid" "$@")"
  done >&2
  return 1
}

most='' only='' place=slurm options=()
while [ $# -gt 0 ]; do
  case $1 in
    --max-running | --points) [ $# -gt 1 ] || die "$1 needs a value"; [ "$1" = --points ] && only=$2 || most=$2; shift ;;
    --max-running=*) most=${1#*=} ;;
    --points=*) only=${1#*=} ;;
    --local | --dry-run) place=${1#--} ;;
    -h | --help) usage; exit 0 ;;
    --*=*) options+=("$1") ;;
    -*) die "unknown flag $1 before SCRIPT: sbatch's are written --x=y, the script's stand after GRID.json" ;;
    *) break ;;
  esac
  shift
done
[ $# -ge 2 ] || { usage >&2; exit 2; }
[[ "$most" =~ ^([1-9][0-9]*)?$ ]] || die "--max-running $most: write a number from 1"
script=$(basename "$1" .py) grid=$2
shift 2
batch=$HERE/$script.sbatch
[ -f "$batch" ] || die "no $batch"

load_site
[ "$place" != slurm ] || check_before_queue
choose_python
points=$("$PYTHON" "$HERE/resolve.py" --points --write ${only:+--only "$only"} "$script.py" "$grid" "$@") || exit 2
printf '%s\n' "$points"
case $place in
  dry-run) ;;
  local) run_here "$@" ;;
  *) exec sbatch --array="$(cut -f 1 <<< "$points" | paste -sd ,)${most:+%$most}" "${options[@]}" "$batch" --sweep "$grid" "$@" ;;
esac
