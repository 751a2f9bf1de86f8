#!/bin/bash
# Trains the demo model on NVIDIA GPUs: its long run, its draft head, and the ablation.
#   bench/train_demo.sh setup PARTS   install MLX's CUDA build and this package from carried files
#   bench/train_demo.sh update        take this tree's code, while nothing runs
#   bench/train_demo.sh main GPU      the demo model, then its draft head
#   bench/train_demo.sh ablation GPU  four short runs: both objectives, none, AL, CS
#   bench/train_demo.sh baseline GPU  the long run without AL and CS
#   bench/train_demo.sh stop NAME     end main, ablation or baseline
#   bench/train_demo.sh wait SECONDS  until the runs end or the time is over; prints their last lines
#   bench/train_demo.sh collect OUT   weights in parts of 15 MiB, logs
# Extra arguments of main, ablation and baseline go to blockffn-train. Runs outlive this script and
# go on from their last checkpoint when started again.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
work=${DEMO_WORK:-$HOME/demo}
data=$work/data runs=$work/runs
short=(--set stage.0.steps=350 --set stage.0.warmup=100 --set stage.1.steps=150
  --set stage.1.decay=150 --set stage.2.steps=0 --set sparsity.hold=100 --set sparsity.interval=20
  --set eval_interval=500)

environment() {
  cd "$work" # else python -c would find the tree in the way of the package
  export PYTHONPATH=$work/package:$work/site PYTHONUNBUFFERED=1 COLUMNS=120
  local libraries
  libraries=$(python3 -c "import glob, nvidia
print(':'.join(glob.glob(list(nvidia.__path__)[0] + '/*/lib')))")
  export LD_LIBRARY_PATH=$libraries:${LD_LIBRARY_PATH:-}
}

package() { # the tree under its installed names
  rm -rf "$work/package" && mkdir -p "$work/package"
  cp -r "$root/blockffn_mlx" "$work/package/"
  cp -r "$root/cli" "$work/package/blockffn_mlx/cli"
  cp -r "$root/metal" "$work/package/blockffn_mlx/metal"
}

run_command() { # run_command NAME ARGUMENTS...: a blockffn command without its installed script
  python3 -c "import sys; from blockffn_mlx.cli.$1 import main; sys.exit(main())" "${@:2}"
}

train() { # train NAME ARGUMENTS...: one run under its name, its output in NAME.txt
  mkdir -p "$runs"
  run_command train "$root/examples/demo.toml" --set data.path="$data" --set data.tokenizer="$data" \
    --set output="$runs/$1" "${@:2}" >>"$runs/$1.txt" 2>&1
}

train_main() {
  train demo "$@"
  run_command train_draft "$runs/demo/model" "$root/examples/demo_draft.toml" \
    --set data.path="$data" --set output="$runs/demo-draft" >>"$runs/demo-draft.txt" 2>&1
}

train_ablation() {
  train both "${short[@]}" "$@"
  train none "${short[@]}" --set sparsity.al=0 --set sparsity.cs=0 "$@"
  train al "${short[@]}" --set sparsity.cs=0 "$@"
  train cs "${short[@]}" --set sparsity.al=0 "$@"
}

train_baseline() { train baseline --set sparsity.al=0 --set sparsity.cs=0 "$@"; }

case ${1:?see the head of this script} in
setup)
  parts=${2:?the folder of the carried files}
  mkdir -p "$data" "$work/wheels" "$work/site"
  mv "$parts"/*.json "$parts"/tokens_*.xz "$data"/
  cat $(ls "$parts"/part* | sort -V) | tar -C "$work/wheels" -xf -
  mv "$parts"/*.whl "$work/wheels"/
  python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade \
    --target "$work/site" "$work"/wheels/*.whl
  package && environment
  python3 -c "import mlx.core as mx, blockffn_mlx; print('mlx', mx.__version__, mx.default_device())"
  nvidia-smi --query-gpu=name,memory.total --format=csv
  ;;
update)
  package
  ;;
main | ablation | baseline)
  mkdir -p "$runs"
  CUDA_VISIBLE_DEVICES=${2:?the GPU} setsid "$root/bench/train_demo.sh" "in-session-$1" "${@:3}" >"$runs/$1.out" 2>&1 </dev/null &
  echo $! >"$runs/$1.pid"
  ;;
in-session-*)
  environment
  "train_${1#in-session-}" "${@:2}"
  ;;
stop)
  kill -- "-$(cat "$runs/${2:?main, ablation or baseline}.pid")"
  ;;
wait)
  for ((i = 0; i < ${2:?seconds}; i += 5)); do
    alive=no
    for pid in "$runs"/*.pid; do if kill -0 "$(cat "$pid")" 2>/dev/null; then alive=yes; fi; done
    if [ $alive = no ]; then break; fi
    sleep 5
  done
  for text in "$runs"/*.txt "$runs"/*.out; do echo "== $text" && tail -n "${LINES_EACH:-4}" "$text"; done
  nvidia-smi --query-gpu=memory.used,utilization.gpu --format=csv,noheader
  echo "still running: $alive"
  ;;
collect)
  out=${2:?the folder to write to}
  mkdir -p "$out"
  tar -C "$runs" -czf "$out/logs.tar.gz" --exclude '*.safetensors' $(cd "$runs" && ls -d ./*/log.jsonl ./*.txt)
  if [ -d "$runs/demo/model" ]; then
    split -b 15M -d -a 1 "$runs/demo/model/model.safetensors" "$out/model.part"
    cp "$runs/demo/model/config.json" "$out/config.json"
  fi
  if [ -d "$runs/demo-draft/draft" ]; then tar -C "$runs/demo-draft" -cf "$out/draft.tar" draft; fi
  ls -la "$out"
  ;;
*) echo "train_demo.sh: no such step $1" >&2 && exit 1 ;;
esac
