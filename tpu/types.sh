# shellcheck shell=bash disable=SC2034
# Owns what a TPU type is: chips, hosts, topology, VM image, GKE label. Sourced, not run.
#
# The names are Google's: v5p, v4 and tpu7x count TensorCores, two a chip (v5p-16 = 8 chips); v5e
# and v6e count chips. v5e-N is accepted for v5litepod-N.

# Sets, for the type $1:
#   tpu_generation  v4 | v5e | v5p | v6e | tpu7x
#   tpu_accelerator the name that gcloud takes
#   tpu_chips       in the slice
#   tpu_hosts       VMs of the slice, each runs one process
#   tpu_host_chips  chips of one VM
#   tpu_topology    as GKE and the compiler write it
#   tpu_runtime     image of a TPU VM; empty where there are none
#   tpu_gke_label   value of cloud.google.com/gke-tpu-accelerator
# or prints one line and returns 2.
tpu_type() {
  local type=$1 size=${1##*-}
  tpu_accelerator=$type
  case $type in
    v4-*) tpu_generation=v4 tpu_runtime=tpu-ubuntu2204-base tpu_gke_label=tpu-v4-podslice ;;
    v5litepod-* | v5e-*)
      tpu_generation=v5e tpu_runtime=v2-alpha-tpuv5-lite tpu_gke_label=tpu-v5-lite-podslice
      tpu_accelerator=v5litepod-$size
      ;;
    v5p-*) tpu_generation=v5p tpu_runtime=v2-alpha-tpuv5 tpu_gke_label=tpu-v5p-slice ;;
    v6e-*) tpu_generation=v6e tpu_runtime=v2-alpha-tpuv6e tpu_gke_label=tpu-v6e-slice ;;
    tpu7x-*) tpu_generation=tpu7x tpu_runtime='' tpu_gke_label=tpu7x ;;
    *)
      echo "error: --type=$type: expected v4-N, v5e-N, v5litepod-N, v5p-N, v6e-N or tpu7x-N" >&2
      return 2
      ;;
  esac
  case $tpu_generation-$size in
    v5e-1 | v6e-1) tpu_topology=1x1 ;;
    v5e-4 | v6e-4) tpu_topology=2x2 ;;
    v5e-8 | v6e-8) tpu_topology=2x4 ;;
    v5e-16 | v6e-16) tpu_topology=4x4 ;;
    v5e-32 | v6e-32) tpu_topology=4x8 ;;
    v5e-64 | v6e-64) tpu_topology=8x8 ;;
    v5e-128 | v6e-128) tpu_topology=8x16 ;;
    v5e-256 | v6e-256) tpu_topology=16x16 ;;
    v4-8 | v5p-8 | tpu7x-8) tpu_topology=2x2x1 ;;
    v4-16 | v5p-16 | tpu7x-16) tpu_topology=2x2x2 ;;
    v4-32 | v5p-32 | tpu7x-32) tpu_topology=2x2x4 ;;
    v4-64 | v5p-64 | tpu7x-64) tpu_topology=2x4x4 ;;
    v4-128 | v5p-128 | tpu7x-128) tpu_topology=4x4x4 ;;
    v4-256 | v5p-256 | tpu7x-256) tpu_topology=4x4x8 ;;
    v4-512 | v5p-512 | tpu7x-512) tpu_topology=4x8x8 ;;
    v4-1024 | v5p-1024 | tpu7x-1024) tpu_topology=8x8x8 ;;
    *)
      local sizes="8, 16, 32, 64, 128, 256, 512 or 1024 (TensorCores)"
      case $tpu_generation in v5e | v6e) sizes="1, 4, 8, 16, 32, 64, 128 or 256 (chips)" ;; esac
      echo "error: --type=$type: no such size; expected $sizes" >&2
      return 2
      ;;
  esac
  case $tpu_generation in
    v5e | v6e)
      tpu_chips=$size
      # Up to 8 chips lie in one VM; larger slices are built of VMs with 4.
      if ((size <= 8)); then tpu_host_chips=$size; else tpu_host_chips=4; fi
      ;;
    *) tpu_chips=$((size / 2)) tpu_host_chips=4 ;;
  esac
  tpu_hosts=$((tpu_chips / tpu_host_chips))
}
