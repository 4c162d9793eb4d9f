#!/usr/bin/env bash
# The six CIFAR-10 recipes of tests/benchmarks/README.md and their report, each after what it needs; finished ones are
# not run again.
#     slurm/lab.sh [--local] [--dry-run] [--runs DIR] [--x=y FOR SBATCH] [-- | FLAGS OF THE TRAINING SCRIPTS]
#     slurm/lab.sh --partition=gpu --seed 1
#     slurm/lab.sh --local --dataset imagefolder --data-root data/cifar10-part --resolution 16 --epochs 2
#   --local     run them here, one after another
#   --dry-run   only print the commands
#   --runs DIR  where the run folders and the report go (runs)
#   Flags after these go to all six and win over the recipes; without --dataset CIFAR-10 is fetched first.
# shellcheck source=slurm/env.sh
. "$(dirname "${BASH_SOURCE[0]}")/env.sh"

place=slurm runs=runs options=() extra=()
while [ $# -gt 0 ]; do
  case $1 in
    --local | --dry-run) [ "$place" = dry-run ] || place=${1#--} ;;
    --runs) [ $# -gt 1 ] || die "--runs needs a folder"; runs=${2%/}; shift ;;
    -h | --help) sed -n '2,/^# shellcheck/{/^# shellcheck/!s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"; exit 0 ;;
    --) shift; break ;;
    --*=*) options+=("$1") ;;
    *) break ;;
  esac
  shift
done
extra=("$@")
load_site
given() { [[ " ${extra[*]} " == *" $1"[=\ ]* ]]; }

sgd="--optimizer sgd --lr 0.1 --momentum 0.9 --weight-decay 5e-4 --schedule multistep --batch-size 128"
adamw="--optimizer adamw --lr 1e-3 --weight-decay 0.05 --schedule cosine --batch-size 128 --patch-size 4"
response="--method response --alpha 0.5 --temperature 4"
data=()
if ! given --dataset; then
  data=(--dataset cifar10)
  given --data-root || [ -n "$STAGE_DATA" ] || data+=(--data-root "$(absolute "${DATA_ROOT:-data}")")
fi

# NAME SCRIPT NEEDED RECIPE: names of the runs needed, separated by commas; "-" for none.
each_run() {
  "$1" cnn_teacher train_teacher - "--model resnet18 --epochs 300 --milestones 150 225 275 $sgd"
  "$1" vit_teacher train_teacher - "--model vit_tiny --epochs 100 $adamw"
  "$1" cnn_student train_student - "--model resnet8 --epochs 200 --milestones 100 150 180 $sgd"
  "$1" vit_student train_student - "--model vit_6_192 --epochs 150 $adamw"
  "$1" cnn_distill distill cnn_teacher "--model resnet8 --epochs 200 --milestones 100 150 180 $sgd $response"
  "$1" vit_distill distill vit_teacher "--model vit_6_192 --epochs 150 $adamw $response"
}

# Its results are there and --overwrite does not ask for others.
finished() { [ -e "$runs/$1/results.json" ] && ! given --overwrite; }

command_of() {  # NAME SCRIPT NEEDED RECIPE -> COMMAND: the script's arguments
  read -ra COMMAND <<< "$4"
  COMMAND+=("${data[@]}")
  [ "$3" = - ] || COMMAND+=(--teacher-checkpoint "$runs/$3/best.pth")
  COMMAND+=("${extra[@]}" --output "$runs/$1")
}

checks=()
check_run() {
  ! finished "$1" || return 0
  command_of "$@"
  checks+=(--next "$2.py" "${COMMAND[@]}")
}

declare -A id
failed=()
submit() {  # NAME SBATCH-FILE AFTER NEEDED ARGUMENTS...: AFTER is afterok or, where those that failed do not matter, afterany
  local name=$1 file=$HERE/$2.sbatch after=$3 run needed=() ids=()
  for run in ${4//[,-]/ }; do
    finished "$run" || needed+=("$run")
  done
  shift 4
  case $place in
    local)
      for run in "${needed[@]}"; do
        [[ $after != afterok || " ${failed[*]} " != *" $run "* ]] || { failed+=("$name"); return; }
      done
      echo "--- $name"
      bash "$file" "$@" || failed+=("$name")
      ;;
    slurm)
      for run in "${needed[@]}"; do ids+=("${id[$run]}"); done
      after=$(IFS=:; echo "$after:${ids[*]}")
      id[$name]=$(sbatch --parsable --job-name="$name" --kill-on-invalid-dep=yes ${ids[0]:+--dependency="$after"} \
        "${options[@]}" "$file" "$@") || die "sbatch refused $name; submitted so far: ${id[*]}"
      echo "$name: job ${id[$name]}${ids[0]:+, $after}"
      ;;
    *) echo "$(quoted sbatch "${options[@]}" "$file" "$@")${needed[0]:+   # after ${needed[*]}}" ;;
  esac
}

start_run() {
  ! finished "$1" || { echo "$1: finished, in $runs/$1"; return 0; }
  command_of "$@"
  submit "$1" "$2" afterok "$3" "${COMMAND[@]}"
}

[ "$place" != slurm ] || check_before_queue
choose_python
if [ "$place" != dry-run ]; then
  if [ "${data[2]}" = --data-root ]; then
    mkdir -p -- "${data[3]}"
    fetch='import sys; from common.data import load_splits; load_splits("cifar10", sys.argv[1], download=True)'
    PYTHONPATH=$ROOT "$PYTHON" -c "$fetch" "${data[3]}" || die "CIFAR-10 is not in ${data[3]} and cannot be fetched"
  fi
  each_run check_run  # a wrong flag or a run folder that is taken is found now, not by the fifth job
  [ "${#checks[@]}" -eq 0 ] || "$PYTHON" "$HERE/resolve.py" --check "${checks[@]:1}" || exit 2
fi
trap 'exit 130' INT  # not only the run that it stopped
each_run start_run
folders=("$runs"/{cnn,vit}_{teacher,student,distill})
submit report report afterany cnn_teacher,vit_teacher,cnn_student,vit_student,cnn_distill,vit_distill "${folders[@]}" --output "$runs/report"
[ "${#failed[@]}" -eq 0 ] || { echo "error: failed, or not started after one that did: ${failed[*]}" >&2; exit 1; }
