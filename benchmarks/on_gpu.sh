#!/bin/sh
# The first run on a GPU, in the order in which estimates are replaced by measurements. From the root of the checkout:
#
#     sh benchmarks/on_gpu.sh OUT
#
# Each step leaves its results in OUT, so that an interrupted run keeps what it has. About ten minutes in all on one H100 or
# H200 (estimated, not run). Then copy OUT/*/results.json to benchmarks/results/training_<name>.json and run
# `python benchmarks/training.py --table`.
set -eu
out=${1:?name a folder for the results}
mkdir -p "$out"

train() { # NAME WORKLOAD [options]
    name=$1
    shift
    if [ -e "$out/$name/results.json" ]; then return; fi
    python -m sparse_accel benchmark train "$@" --output_dir "$out/$name"
}

# 1 and 2. Matrix products, copies, launches, packed against padded attention; AdamW and compact weights.
python benchmarks/gpu_basics.py --results "$out/gpu_basics.json"

# 0. Every arm once, small: what fails, fails here.
train tiny tiny-ci --rounds 2 --precision bf16 --arms dense,dense_compiled,mask,mask_compiled,kd_live,kd_cached,qat_observing,qat_frozen,qat_fused,recipe,recipe_fused,b1,b2,b2_bf16

# 3. Hugging Face's training and ours, from launch-bound batches to full ones.
for size in 8 16 32 64; do
    train "squad_base_$size" squad-base --micro_batch_size "$size" --features 1024 \
        --arms dense,dense_again,dense_compiled,dense_padded,dense_grouped,b1
done

# 4 to 6. The headline: masks, teachers, quantization, the whole recipe, and what SparseML's way costs. Syncs by the profiler.
train squad_base squad-base
train squad_large squad-large --features 256
train mnli_base mnli-base --arms dense,dense_again,dense_compiled,mask,qat_observing,b1
train mlm_base mlm-base --arms dense,dense_again,mask,kd_live,b1

# The strongest simple baseline, compiled: last, since compiling takes minutes.
train squad_base_b3 squad-base --arms dense,dense_again,b1,b3 --rounds 5
