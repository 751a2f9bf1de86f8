#!/bin/bash
# Trains the demo model on two NVIDIA GPUs: its long run and the same without AL and CS, an
# ablation of short runs, the last steps, and the draft head. warm, ablation, long, tune and draft
# run in the background: they outlive this script, and a long run goes on from its last checkpoint
# when started again.
# DEMO_GPUS=2,3 takes two other GPUs: on four of them the long runs go side by side.
#   bench/train_demo.sh install PARTS   MLX's CUDA build and this package, from carried files
#   bench/train_demo.sh warm MANIFEST   compile the kernels on made-up text
#   bench/train_demo.sh share GPU OTHER give one GPU's compiled kernels to another of its kind
#   bench/train_demo.sh data FOLDER     unpack the tokens
#   bench/train_demo.sh ablation        short runs, two at a time
#   bench/train_demo.sh long NAME FLAGS one long run on both GPUs
#   bench/train_demo.sh tune NAME       the last steps of the long run NAME: the run NAME-tuned
#   bench/train_demo.sh draft NAME      the draft head of the run NAME
#   bench/train_demo.sh stop STEP       end a step
#   bench/train_demo.sh wait SECONDS [STEP ...]  until they end (all by default); prints last lines
#   bench/train_demo.sh package NAME    8-bit weights of NAME and its head, evaluated
#   bench/train_demo.sh collect OUT NAME  weights and logs, in parts of 15 MiB
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
work=${DEMO_WORK:-$HOME/demo}
data=$work/data runs=$work/runs
both_gpus=${DEMO_GPUS:-0,1}
short=(--set stage.0.steps=350 --set stage.0.warmup=100 --set stage.1.steps=150
  --set stage.1.decay=150 --set stage.2.steps=0 --set sparsity.hold=100 --set sparsity.interval=20
  --set eval_interval=500 --set sparsity.al=3e-3 --set sparsity.cs=6e-2)
warm=(--set stage.0.steps=2 --set stage.0.warmup=1 --set stage.1.steps=2 --set stage.1.decay=2
  --set stage.2.steps=2 --set stage.2.decay=2 --set stage.0.batch_size=16
  --set stage.1.batch_size=16 --set stage.2.batch_size=16 --set checkpoint_interval=100)

environment() {
  cd "$work" # else python -c would find the tree in the way of the package
  export PYTHONPATH=$work/package:$work/site PYTHONUNBUFFERED=1 COLUMNS=120
  local libraries
  libraries=$(python3 -c "import glob, nvidia
print(':'.join(glob.glob(list(nvidia.__path__)[0] + '/*/lib')))")
  export LD_LIBRARY_PATH=$libraries:${LD_LIBRARY_PATH:-}
}

run_command() { # run_command NAME ARGUMENTS...: a blockffn command without its installed script
  exec python3 -c "import sys; from blockffn_mlx.cli.$1 import main; sys.exit(main())" "${@:2}"
}

launch() { # launch GPUS NAME ARGUMENTS...: a command on one GPU, or data-parallel on several
  local gpus=(${1//,/ }) rank port=$((20000 + RANDOM % 10000))
  for rank in "${!gpus[@]}"; do
    (
      export CUDA_VISIBLE_DEVICES=${gpus[rank]}
      # Compiled kernels are kept; ranks that compile in step must not read each other's half files.
      export MLX_PTX_CACHE_DIR=$work/${cache:-kernels}-${gpus[rank]}
      if [ ${#gpus[@]} -gt 1 ]; then
        export MLX_RANK=$rank MLX_WORLD_SIZE=${#gpus[@]} NCCL_HOST_IP=127.0.0.1 NCCL_PORT=$port
      fi
      run_command "${@:2}"
    ) &
  done
  for rank in "${!gpus[@]}"; do
    # Without one rank the other would wait for ever.
    wait -n || { kill $(jobs -p) 2>/dev/null; return 1; }
  done
}

train() { # train GPUS NAME ARGUMENTS...: one run under its name, its output in NAME.txt
  launch "$1" train "$root/examples/demo.toml" --set data.path="${text:-$data}" \
    --set data.tokenizer="$work/package/blockffn_mlx/demo" --set output="$runs/$2" "${@:3}" \
    >>"$runs/$2.txt" 2>&1
}

draft() { # draft GPUS NAME ARGUMENTS...: the draft head of run NAME
  launch "$1" train_draft "$runs/$2/model" "$root/examples/demo_draft.toml" \
    --set data.path="${text:-$data}" --set output="$runs/$2-draft" "${@:3}" \
    >>"$runs/$2-draft.txt" 2>&1
}

step_warm() {
  export text=$work/warm
  python3 "$root/bench/demo_warm.py" "$1" "$text"
  train "$both_gpus" warm "${warm[@]}"
  cache=kernels-draft draft "$both_gpus" warm --set stage.0.steps=2 --set stage.0.batch_size=16
}

step_ablation() {
  local first=${both_gpus%,*} second=${both_gpus#*,}
  {
    train "$first" both "${short[@]}" || true
    train "$first" al "${short[@]}" --set sparsity.cs=0 || true
    train "$first" al-doubled "${short[@]}" --set sparsity.al=6e-3
  } &
  {
    train "$second" none "${short[@]}" --set sparsity.al=0 --set sparsity.cs=0 || true
    train "$second" cs "${short[@]}" --set sparsity.al=0 || true
    train "$second" cs-doubled "${short[@]}" --set sparsity.cs=0.12
  } &
  wait
}

step_long() { train "$both_gpus" "$@"; }
step_tune() {
  launch "$both_gpus" train "$root/examples/demo_tune.toml" --finetune "$runs/$1/model" \
    --set data.path="${text:-$data}" --set output="$runs/$1-tuned" "${@:2}" \
    >>"$runs/$1-tuned.txt" 2>&1
}
step_draft() { cache=kernels-draft draft "$both_gpus" "$@"; }

case ${1:?see the head of this script} in
install)
  mkdir -p "$work/wheels" "$work/site" "$work/package" "$runs"
  cat $(ls "${2:?the folder of the carried files}"/part* | sort -V) | tar -C "$work/wheels" -xf -
  python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade \
    --target "$work/site" "$work"/wheels/*.whl
  cp -r "$root/blockffn_mlx" "$work/package/" # the tree under its installed names
  cp -r "$root/cli" "$work/package/blockffn_mlx/cli"
  cp -r "$root/metal" "$work/package/blockffn_mlx/metal"
  # What runs in the background must not change under it.
  mkdir -p "$work/tree" && cp -r "$root"/{bench,examples,tests} "$work/tree/"
  environment
  python3 -c "import mlx.core as mx, blockffn_mlx; print('mlx', mx.__version__, mx.default_device())"
  nvidia-smi --query-gpu=name,memory.total --format=csv
  ;;
data)
  mkdir -p "$data" && cp "${2:?the folder of the carried files}"/* "$data/"
  xz --decompress --force --threads=0 "$data"/tokens_*.xz || python3 - "$data" <<'PYTHON'
import lzma, pathlib, sys
for path in pathlib.Path(sys.argv[1]).glob("tokens_*.xz"):
    path.with_suffix("").write_bytes(lzma.decompress(path.read_bytes()))
PYTHON
  sed -i 's/\.u16\.xz"/.u16"/' "$data/manifest.json"
  ;;
warm | ablation | long | tune | draft)
  name=$1 && if [[ $1 = long || $1 = tune || $1 = draft ]]; then name=$1-$2; fi
  setsid "$work/tree/bench/train_demo.sh" "in-session-$1" "${@:2}" >"$runs/$name.out" 2>&1 </dev/null &
  echo $! >"$runs/$name.pid"
  ;;
in-session-*)
  environment
  "step_${1#in-session-}" "${@:2}"
  ;;
share)
  for cache in kernels kernels-draft; do
    mkdir -p "$work/$cache-${3:?another GPU}"
    cp -r "$work/$cache-${2:?a GPU}/." "$work/$cache-$3" # again after more was compiled, too
  done
  ;;
stop)
  kill -- "-$(cat "$runs/${2:?the step}.pid")"
  ;;
wait)
  for ((i = 0; i < ${2:?seconds}; i += 2)); do
    alive=
    for step in ${@:3} $([ $# -gt 2 ] || (cd "$runs" && ls -- *.pid | sed 's/\.pid//')); do
      if kill -0 "$(cat "$runs/$step.pid")" 2>/dev/null; then alive+=" $step"; fi
    done
    if [ -z "$alive" ]; then break; fi
    sleep 2
  done
  for output in "$runs"/*.txt "$runs"/*.out; do
    if [ -s "$output" ]; then echo "== ${output#"$runs/"}" && tail -n "${LINES_EACH:-3}" "$output"; fi
  done
  echo "still running:$alive"
  ;;
package)
  environment
  export CUDA_VISIBLE_DEVICES=${both_gpus%,*}
  python3 "$root/bench/demo_package.py" "$runs/$2/model" "$runs/$2-draft/draft" \
    "$work/package/blockffn_mlx/demo" "$data/SOURCES.md" --config "$root/examples/demo.toml" --target "$work/packed"
  python3 "$root/bench/demo_evaluate.py" "$work/packed" "$data" "$runs/evaluation.json" --config "$root/examples/demo.toml"
  python3 "$root/bench/demo_backends.py" "$work/packed" "$data" "$runs/backends.json" --config "$root/examples/demo.toml"
  ;;
collect)
  out=${2:?the folder to write to} name=${3:?the long run}
  mkdir -p "$out"
  tar -C "$runs" -czf "$out/logs.tar.gz" --exclude '*.safetensors' $(cd "$runs" && ls -d ./*/log.jsonl ./*.txt ./*.json 2>/dev/null)
  tar -C "$runs" -cf - "$name/model" $(cd "$runs" && ls -d "$name-draft/draft" 2>/dev/null) | split -b 15M -d -a 1 - "$out/trained.part"
  if [ -d "$work/packed" ]; then tar -C "$work" -cf - packed | split -b 15M -d -a 1 - "$out/packed.part"; fi
  ls -la "$out"
  ;;
*) echo "train_demo.sh: no such step $1" >&2 && exit 1 ;;
esac
