#!/usr/bin/env bash
# Submits FILE with the best GPU type that is free now:  slurm/submit_best_gpu.sh [FLAGS] FILE.sbatch ARGS...
#
#   --dry-run        print the sbatch command, submit nothing
#   --gpus N         GPUs on one node, a process each (default: what FILE asks for, else 1)
#   --partition P    default: SBATCH_PARTITION, else FILE's own, else the cluster's default partition
#   --account A      default: SBATCH_ACCOUNT
#   --NAME=VALUE     any other flag goes to sbatch, in this form: --time=2:00:00 --array=0-3 --dependency=... --parsable
#   ARGS             all after FILE goes to the script as it is
#
# The type is the first of GPU_PREFERENCE (default "h200 h100 a100 l40s a40 v100 rtx t4", then any other) of which one node
# has N free and which Slurm would start now; where there is none, the type that Slurm would start first (sbatch --test-only).
# Nodes that name no type in their Gres (gpu:4) are told by their features.  GPU_CONSTRAINT is a further --constraint.
# slurm/site.sh, where it exists, sets these variables and VENV, PYTHON, DATA_ROOT, STAGE_DATA, which are checked here.

set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

fail() { echo "error: $*" >&2; exit 2; }
say() { echo "${0##*/}: $*" >&2; }    # not on stdout: that is sbatch's, where --parsable is read by others

dry_run='' gpus='' partition='' account='' file=''
pass=()
while [ $# -gt 0 ]; do
  case $1 in
    -h | --help) sed -n '2,/^$/s/^# \{0,1\}//p' "$0"; exit ;;
    --dry-run) dry_run=1 ;;
    --gpus | --partition | --account)
      [ $# -ge 2 ] || fail "$1 has no value: $1 VALUE before FILE"
      printf -v "${1#--}" %s "$2"; shift ;;
    --gpus=* | --partition=* | --account=*) flag=${1%%=*}; printf -v "${flag#--}" %s "${1#*=}" ;;
    --constraint=*) GPU_CONSTRAINT=${1#*=} ;;
    --gres=* | --gpus-per-*) fail "$1 names the GPU that this script chooses: give --gpus N, or use sbatch itself" ;;
    -*) pass+=("$1") ;;
    *) file=$1; shift; break ;;
  esac
  shift
done
[ -n "$file" ] || fail "no FILE given: ${0##*/} [FLAGS] FILE.sbatch ARGS... (--help)"
[ -f "$file" ] || fail "$file is not a file: give FILE.sbatch after the flags; flags of sbatch are written --name=value"
[[ -z $gpus || $gpus =~ ^[1-9][0-9]*$ ]] || fail "--gpus $gpus is no number of GPUs: give 1 or more"
command -v sbatch > /dev/null || fail "sbatch is not here: 'bash $file ARGS' runs the stage on this machine"

# Values that the environment already has win over those of the file: site.sh sets what is unset.
if [ -f "$here/site.sh" ]; then
  set +eu    # as in a job: it may ask for variables that are not set
  # shellcheck source=/dev/null
  . "$here/site.sh"
  set -eu
fi

check_settings() {    # what would otherwise be missed only after hours in the queue
  local arg previous=''
  [ -z "${VENV:-}" ] || [ -x "$VENV/bin/python" ] || fail "VENV $VENV has no bin/python: make it with python3 -m venv $VENV, or unset it"
  # a bare name may come from a module that is loaded only in the job
  [ -z "${PYTHON:-}" ] || command -v "$PYTHON" > /dev/null || [[ -n ${MODULES:-} && $PYTHON != */* ]] ||
    fail "PYTHON $PYTHON cannot be run: give the path of a Python, or unset it"
  [ -z "${STAGE_DATA:-}" ] || [ -e "$STAGE_DATA" ] || fail "STAGE_DATA $STAGE_DATA is missing: give a folder or a tar, or unset it"
  [ -z "${DATA_ROOT:-}" ] || [ -e "$DATA_ROOT" ] || fail "DATA_ROOT $DATA_ROOT is missing: give the folder of the data, or unset it"
  [[ " $* " != *" --download "* ]] || return 0
  for arg in "$@"; do
    [ "$previous" = --data-root ] && arg=--data-root=$arg
    [[ $arg != --data-root=* || -e ${arg#*=} ]] || fail "--data-root ${arg#*=} is missing: give the folder of the data"
    previous=$arg
  done
}

in_file() {    # in_file partition p: the value that FILE's #SBATCH lines give to a long flag or its short form, if it has one
  sed -nE "s/^#SBATCH[[:space:]]+(.*[[:space:]])?(--$1[=[:space:]]+|-${2:-$1}[[:space:]]*)([^[:space:]]+).*/\3/p" "$file" | tail -n 1 | tr -d \"\'
}
wants_gpu() { [ -n "$gpus" ] || grep -qE '^#SBATCH[[:space:]](.*[[:space:]])?(--gres[=[:space:]][^[:space:]]*gpu|--gpus|-G)' "$file"; }
gpus_in_file() {    # of --gpus=2, --gpus=a100:2, --gres=gpu:2, --gres=tmp:9,gpu:a100:2
  { in_file gpus G; in_file gres; } | sed -nE 's/^(.*gpu:)?([^:,]+:)?([0-9]+)(,.*)?$/\3/p' | head -n 1
}

# Without --partition: the environment's, FILE's, the default one.  Each must exist.
choose_partition() {
  local known name
  known=$(sinfo -a -h -o %P | sort -u) || fail "sinfo does not answer: is Slurm's controller up?"
  : "${partition:=${SBATCH_PARTITION:-$(in_file partition p)}}"
  : "${partition:=$(sed -n 's/\*$//p' <<< "$known")}"
  known=${known//\*/}
  [ -n "$partition" ] || fail "no partition given and the cluster has no default: --partition with one of: ${known//$'\n'/ }"
  for name in ${partition//,/ }; do
    grep -qxF -- "$name" <<< "$known" || fail "unknown partition $name: choose one of: ${known//$'\n'/ }"
  done
}

# One line a type, best first: rank, "type NAME", "feature NAME" or "any gpu", whether a node has enough free, the most on a node.
gpu_types() {
  sinfo -h -N -p "$partition" -O NodeList:64,Gres:256,GresUsed:256,StateLong:32,Features:256 | awk -v need="$1" -v words="$preference" '
    function rank(name,   i, at, next_is) {
      for (i = 1; i <= n; i++) {
        at = index(tolower(name), word[i])
        next_is = substr(name, at + length(word[i]), 1)
        # a40 is not in a4000, and a slice of a card (a100_1g.5gb) is no a100
        if (at && !(word[i] ~ /[0-9]$/ && next_is ~ /[0-9]/) && (word[i] ~ /g\./ || name !~ /[0-9]g\.[0-9]/)) return i
      }
      return n + 1
    }
    function count(gres, into,   parts, p, i, k) {    # gpu:a100:2(S:0-1,3),gpu:4,shard:8(...): GPUs by type, "" for no type
      gsub(/\([^)]*\)/, "", gres)
      for (i = split(gres, parts, ","); i; i--) {
        k = split(parts[i], p, ":")
        if (p[1] != "gpu") continue
        if (k == 1) into[""] += 1
        else if (k == 2 && p[2] ~ /^[0-9]+$/) into[""] += p[2]
        else into[p[2]] += (k == 2 ? 1 : p[3])
      }
    }
    BEGIN { n = split(tolower(words), word, " ") }
    {    # a node; it comes once for each of its partitions
      split("", total); split("", used); all_used = 0
      count($2, total); count($3, used)
      for (type in used) all_used += used[type]
      for (type in total) {
        if (type != "") { key = "type " type; taken = used[type] }
        else {
          key = "any gpu"; best = n; taken = all_used
          for (i = split($5, features, ","); i; i--)
            if (rank(features[i]) <= best) { best = rank(features[i]); key = "feature " features[i] }
        }
        if (total[type] > most[key]) most[key] = total[type]
        # drained, draining, down, planned, reserved, powered-off (idle~) and full (allocated) nodes take no job now
        if ($4 ~ /^(idle|mixed|completing)$/ && total[type] - taken >= need) free[key] = 1
      }
    }
    END {
      for (key in most) {
        name = key; sub(/^[a-z]* /, "", name)
        print rank(name) + (key ~ /^any/), key, free[key] + 0, most[key]
      }
    }' | sort -k1,1n -k3,3
}

# Sets `request` for one type.  A process drives one GPU, so that N need as many tasks, where neither flags nor FILE name them.
set_request() {
  local constraint=${GPU_CONSTRAINT:-${SBATCH_CONSTRAINT:-$(in_file constraint C)}}
  request=("--gres=gpu:$gpus")
  [ "$1" = type ] && request=("--gres=gpu:$2:$gpus")
  [[ $constraint != *'|'* || $constraint == [\(\[]* ]] || constraint="($constraint)"
  [ "$1" = feature ] && constraint=$2${constraint:+&$constraint}
  [ -z "$constraint" ] || request+=("--constraint=$constraint")
  [ "$gpus" -eq 1 ] || [[ " ${pass[*]-}" =~ \ (--ntasks|-n) ]] || [ -n "$(in_file ntasks n; in_file ntasks-per-node)" ] ||
    request+=("--ntasks-per-node=$gpus")
}

# "TIME on NODES" at which Slurm would start it with the current `request`; nothing where it names no time.
test_start() {
  local options=("--partition=$partition" ${account:+"--account=$account"} "${request[@]}" ${pass[@]+"${pass[@]}"})
  SLURM_TIME_FORMAT=standard sbatch --test-only "${options[@]}" "$file" 2>&1 < /dev/null |
    sed -nE 's/.* to start at ([0-9T:-]+) .* on nodes ([^ ]+) in .*/\1 on \2/p' || true
}

choose_gpu() {    # sets `request`, `chosen` and `why`
  local types most soon kind name free largest start pass_over better best=() first=''
  types=$(gpu_types "$gpus")
  [ -n "$types" ] || fail "partition $partition has no GPU of any kind: --partition with one of" \
    "$(sinfo -a -h -o '%R %G' | awk '$2 ~ /gpu/ && !seen[$1]++ { print $1 }' | paste -sd ' ')"
  most=$(awk '$5 > most { most = $5 } END { print most }' <<< "$types")
  [ "$gpus" -le "$most" ] || fail "$gpus GPUs are more than any node of partition $partition has: at most --gpus $most"
  soon=$(date -d '+60 seconds' +%FT%T)
  for pass_over in 1 0; do    # the types with a free node, then the others
    while read -r _ kind name free largest; do
      if [ "$free" != "$pass_over" ] || [ "$largest" -lt "$gpus" ]; then continue; fi
      set_request "$kind" "$name"
      start=$(test_start)
      if [ "$free" = 1 ] && [[ -n $start && ${start%% *} < $soon ]]; then
        better=$(awk -v name="$name" '$3 == name { exit } { print $3 }' <<< "$types" | paste -sd ' ')
        chosen=$name why="$gpus free now on ${start#* on }${better:+, of $better not}; preference: $preference"
        return
      fi
      # a type without a time sorts behind all years
      if [ -z "$first" ] || [[ ${start:-none} < $first ]]; then first=${start:-none} chosen=$name best=("${request[@]}"); fi
    done <<< "$types"
  done
  request=("${best[@]}") why="nothing is free now; it starts first, at $first"
  [ "$first" != none ] || why="Slurm names no time for any type: nodes are down or drained, or it refuses the job's other flags"
}

check_settings "$@"
: "${account:=${SBATCH_ACCOUNT:-}}"
preference=${GPU_PREFERENCE:-h200 h100 a100 l40s a40 v100 rtx t4}
choose_partition
request=()
if wants_gpu; then
  : "${gpus:=$(gpus_in_file)}"
  : "${gpus:=1}"
  choose_gpu
  say "$chosen in partition $partition: $why"
else
  say "$file asks for no GPU: it goes to partition $partition without one"
fi
command=(sbatch "--partition=$partition" ${account:+"--account=$account"} ${request[@]+"${request[@]}"} ${pass[@]+"${pass[@]}"})
command+=("$file" "$@")
[ -n "$dry_run" ] || exec "${command[@]}"
printf -v line ' %q' "${command[@]}"
echo "${line# }"
