# shellcheck shell=bash
# Owns the environment of a run on TPUs: each variable and XLA flag with its reason. Sourced.
#
#   SARO_TPU_TYPE     v5p-16, v6e-16, ...: whose flags; null = what the machine says
#   SARO_TPU_SLICES   number of slices (1)
#   SARO_XLA_FLAGS    more libtpu flags, for trying one: last, so they win
#
# To see what they do to memory before paying for a chip, source it before the compile check:
#   SARO_TPU_TYPE=v6e-16 . tpu/env.sh; JAX_PLATFORMS=cpu python -m saro_jax.compile_check ...
# libtpu refuses a flag it does not know and ends the process, so every flag here is one that the
# compiler of jax 0.10.2 (libtpu 0.0.42.1) took. None has been timed on a TPU.

if [[ -z ${SARO_TPU_TYPE:-} ]]; then
  # GKE sets the variable; a TPU VM answers by its metadata server.
  SARO_TPU_TYPE=${TPU_ACCELERATOR_TYPE:-$(curl -s --max-time 2 -H 'Metadata-Flavor: Google' \
    http://metadata.google.internal/computeMetadata/v1/instance/attributes/accelerator-type || true)}
fi

# Without it a process that finds no TPU trains on the CPU, without an error, at the full price.
export JAX_PLATFORMS=${JAX_PLATFORMS:-tpu,cpu}

# Log lines appear when they are printed, also in a file.
export PYTHONUNBUFFERED=1

# A restart after a preemption finds its compiled programs: on the bucket where there is one, since
# the disk of a Spot VM goes with it.
if [[ -z ${JAX_COMPILATION_CACHE_DIR:-} ]]; then
  if [[ -d /mnt/saro/runs ]]; then
    export JAX_COMPILATION_CACHE_DIR=/mnt/saro/jax_cache
  else
    export JAX_COMPILATION_CACHE_DIR=$HOME/.cache/jax
  fi
fi

# Reads from the bucket that stall are given up and tried again instead of hanging (TensorStore,
# which reads and writes checkpoints): fewer than 256 bytes a second over 60 seconds.
export TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS=60
export TENSORSTORE_CURL_LOW_SPEED_LIMIT_BYTES=256

# The workers' tokenizers are used before the data processes fork; silences a warning per process.
export TOKENIZERS_PARALLELISM=false

flags=()
case ${SARO_TPU_TYPE:-} in
  v6e-*)
    # 96 of the 128 MiB of vector memory for one fusion (the default is 16): larger tiles, fewer
    # passes over HBM.
    flags+=(--xla_tpu_scoped_vmem_limit_kib=98304)
    ;;
esac
if ((${SARO_TPU_SLICES:-1} > 1)); then
  # Between slices gradients are summed over the data-centre network, the slowest link there is:
  # sum them while the backward pass still runs, several sizes in one go.
  flags+=(--xla_tpu_enable_data_parallel_all_reduce_opt=true)
  flags+=(--xla_tpu_data_parallel_opt_different_sized_ops=true)
fi
# Left out on purpose:
#   --xla_tpu_enable_async_collective_fusion*        libtpu 0.0.52 refuses the all-gather fusion on
#       all but v5e ("incorrect results, hang"), though older ones take it on v5p and v6e in silence
#   --xla_jf_spmd_threshold_for_windowed_einsum_mib  by default XLA turns the all-gathers of FSDP
#       into rings that overlap with the products; off, all of them are synchronous
#   ALLOW_MULTIPLE_LIBTPU_LOAD                       for compiling without a TPU; with one, two
#       processes on the same chips crash
export LIBTPU_INIT_ARGS="${flags[*]+"${flags[*]}"}${SARO_XLA_FLAGS:+ $SARO_XLA_FLAGS}"
export SARO_TPU_TYPE
unset flags
