#!/usr/bin/env bash
# The committed measurements of one H100, each a file in OUT; copy them into benchmarks/results and `make render`.
#
#   benchmarks/h100.sh OUT BASE PART ...
#
# BASE: a checkpoint folder of the published size (`cogtune bench make-checkpoint BASE`); the parts speed, breakdown,
# grow and fill make their weights themselves; pairs wants two cards. Every file is whole after every row, and a part
# that fails does not stop the next.
set -u
out=$1 base=$2
shift 2
cd "$(dirname "$0")/.." || exit 1
export PYTHONPATH=src${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
mkdir -p "$out"

bench() { # FILE COMMAND ...
    local file=$out/$1.json log=$out/$1.log began=$SECONDS
    shift
    echo "== cogtune bench $*"
    python -m cogtune bench "$@" --json "$file" 2>"$log" | grep -v '^{"kind"' || echo "FAILED: see $log"
    echo "== $((SECONDS - began)) s"
}

speed() { # variants beside the stand-in of the published computation; nothing else should run on the machine
    local fp8="quant.experts=fp8 quant.fp8_layouts=two"
    bench speed-h100 train --steps 10 --warmup 3 \
        --variant baseline \
        --variant "cached features=cached" --variant "rank16 features=cached lora.targets=experts lora.rank=16" \
        --variant "fp8-cached features=cached $fp8" --variant live --variant "fp8-live $fp8 quant.tower=fp8" \
        --variant "cached-4 features=cached train.batch_size=4" \
        --variant "caption features=cached preset=caption" --variant "text-only features=cached preset=text-only" \
        --variant "multi features=cached preset=sft311k-multi" \
        --variant "vqa1 features=cached preset=vqa1" --variant "vqa10 features=cached preset=vqa10"
}

breakdown() { # where a step's time goes; a profiler slows the host
    bench breakdown-h100 train --breakdown --steps 6 --warmup 3 --variant live --variant "cached features=cached"
}

fit() { bench fit-h100 fit --model "$base"; }

plan() { # the planner's word; eager, so that no compilation is waited for
    bench sweep-memory-bf16-h100 sweep memory --model "$base" --train.compile false
    bench sweep-memory-nf4-h100 sweep memory --model "$base" --quant.experts nf4 --train.compile false
}

grow() {
    bench sweep-text-h100 sweep text --train.gradient_checkpointing all
    bench sweep-batch-h100 sweep batch --train.gradient_checkpointing all
    bench sweep-questions-h100 sweep questions
    bench sweep-rank-h100 sweep rank --train.compile false
}

fill() {
    bench fill-h100 fill --pictures 160
    bench fill-fp8-h100 fill --pictures 160 --quant.tower fp8
}

decode() {
    bench decode-bf16-h100 decode --model "$base"
    bench decode-nf4-h100 decode --model "$base" --quant.experts nf4 --quant.tower nf4
}

loader() { bench loader loader --rate 20; }

pairs() { # two cards: what compiling gains under engines that `auto` leaves uncompiled
    local each=(--steps 6 --warmup 3 --variant "s400 features=cached" --train.gradient_checkpointing none)
    for engine in ddp zero2 fsdp2; do
        for compiled in false true; do
            echo "== $engine, compiled: $compiled"
            torchrun --standalone --nproc-per-node 2 -m cogtune bench train --model "$base" --parallel.engine "$engine" \
                --train.compile "$compiled" "${each[@]}" --json "$out/pair-$engine-$compiled.json" 2>"$out/pairs.log" |
                grep -v '^{"kind"' || echo "FAILED: see $out/pairs.log"
        done
    done
}

for part in "$@"; do
    case $part in
    speed | breakdown | fit | plan | grow | fill | decode | loader | pairs) "$part" ;;
    *) echo "no part $part" ;;
    esac
done
