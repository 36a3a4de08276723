#!/bin/sh
# The measurements of one part, each in a process of its own with its own time; under ten minutes together.
#
#     sh benchmarks/gpu/run.sh PART FOLDER
#
# 1: is it right, and the bars of speed, with transformers beside them
# 2: experts from the host, memory, parity, and plain torch
# 3: tilings, attention, training, the other ways of transformers
#
# FOLDER gets results.jsonl, a line for each result, and log.txt. report.py makes a table of both.
set -u
part=$1
mkdir -p "$2"
folder=$(cd "$2" && pwd)
cd "$(dirname "$0")/../.."
results=$folder/results.jsonl
log=$folder/log.txt
python=${PYTHON:-python3}
export PYTHONPATH=build/gpu PYTHONUNBUFFERED=1
started=$(date +%s)
END=${END:-570}  # seconds from the start, behind which nothing more is begun

# step SECONDS SCRIPT [OPTIONS...]
step() {
  limit=$1
  shift
  left=$((END - ($(date +%s) - started)))
  if [ "$left" -lt 15 ]; then
    echo "no time left for: $*" | tee -a "$log"
    return
  fi
  [ "$left" -lt "$limit" ] && limit=$left
  echo "== $*" >>"$log"
  begun=$(date +%s)
  script=$1
  shift
  # GPU_OPTIONS is several words: not quoted.
  timeout -k 5 "$limit" "$python" "benchmarks/gpu/$script" ${GPU_OPTIONS:-} --out "$results" "$@" >>"$log" 2>&1
  echo "$? after $(($(date +%s) - begun)) s: $script $*" | tee -a "$log"
}

sh benchmarks/gpu/setup.sh 2>&1 | tee -a "$log"
command -v nvidia-smi >/dev/null && nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader |
  tee -a "$log"
case $part in
  1)
    for bits in 16 8 4; do  # side by side: nothing is timed, and most of it is compiling
      step 150 check.py --parts kernels bits graphs --tokens 1 8 64 --bits $bits &
    done
    wait
    step 110 model.py --bits 16 --runs planned prefill batch-64
    step 100 transformers_peer.py --ways grouped_mm batched_mm
    step 60 model.py --bits 4 --runs planned
    step 60 model.py --bits 8 --runs planned
    ;;
  2)
    step 30 memory.py
    step 240 offload.py
    step 90 check.py --parts parity
    step 120 check.py --parts cached --layers 8
    step 90 plain_torch.py
    ;;
  3)
    for i in 0 1 2 3 4 5 6 7; do
      step 120 tilings.py --tokens 1 --compile $i/8 &
    done
    wait
    step 100 tilings.py --tokens 1
    step 100 train.py
    step 80 attention.py
    step 150 transformers_peer.py --ways grouped_mm batched_mm eager --compile
    step 120 check.py --parts kernels bits --bits 4 8
    ;;
  *)
    echo "run.sh: part is $part; expected 1, 2 or 3" >&2
    exit 1
    ;;
esac
"$python" benchmarks/gpu/report.py "$results" | tee -a "$log"
