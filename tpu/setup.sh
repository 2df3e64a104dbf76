#!/usr/bin/env bash
# Owns the set-up of one TPU VM: Python, packages, the bucket. Run it again as often as you like.
#
#   setup.sh [--bucket=gs://NAME] [--python=3.11]
#
# It lies in the checkout, installs into CHECKOUT/.venv, mounts the bucket at /mnt/saro and makes
# data/, runs/ and models/ of the checkout folders of the bucket, so that a command reads the same
# as on your own machine. Python 3.11 takes the jax and libtpu of the compile check's figures.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
mount_point=${SARO_MOUNT:-/mnt/saro}
bucket='' python=3.11
for option in "$@"; do
  case $option in
    --bucket=*) bucket=${option#--bucket=} bucket=${bucket#gs://} bucket=${bucket%/} ;;
    --python=*) python=${option#--python=} ;;
    *)
      echo "error: setup.sh: unknown option $option; allowed: --bucket=gs://NAME, --python=3.11" >&2
      exit 2
      ;;
  esac
done

# A new Ubuntu VM updates itself and holds apt's locks for minutes.
apt_get() {
  local waited=0
  while sudo fuser /var/lib/dpkg/lock-frontend /var/lib/apt/lists/lock >/dev/null 2>&1; do
    if ((waited == 0)); then echo "waiting for the lock of apt"; fi
    if ((waited >= 600)); then
      echo "error: $(hostname): apt's lock was held for 10 minutes" >&2
      return 1
    fi
    sleep 5
    waited=$((waited + 5))
  done
  sudo DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=600 -qq "$@"
}

install_packages() {
  # uv brings a Python of its own: the images have 3.10, and the packages need 3.11.
  export PATH=$HOME/.local/bin:$PATH
  if ! command -v uv >/dev/null; then curl -LsSf https://astral.sh/uv/install.sh | sh; fi
  cd "$root"
  if [[ ! -x .venv/bin/python ]]; then uv venv --quiet --seed --python "$python" .venv; fi
  # The stamp is written after success only, and compared, not dated: a new checkout with the same
  # pyproject.toml installs nothing.
  local stamp=.venv/.saro_tpu wanted
  wanted="$(cksum <pyproject.toml) $root"
  if [[ $(cat "$stamp" 2>/dev/null || true) != "$wanted" ]]; then
    uv pip install --quiet --python .venv/bin/python -e '.[tpu]'
    echo "$wanted" >"$stamp"
  fi
}

mount_bucket() {
  if ! command -v gcsfuse >/dev/null; then
    local release key=/usr/share/keyrings/cloud.google.asc
    release=gcsfuse-$(. /etc/os-release && echo "$VERSION_CODENAME")
    curl -fsSL https://packages.cloud.google.com/apt/doc/apt-key.gpg | sudo tee "$key" >/dev/null
    echo "deb [signed-by=$key] https://packages.cloud.google.com/apt $release main" |
      sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null
    apt_get update
    apt_get install -y gcsfuse fuse
  fi
  if ! mountpoint -q "$mount_point"; then
    sudo mkdir -p "$mount_point"
    sudo chown "$(id -u):$(id -g)" "$mount_point"
    # Checkpoints become valid by renaming a folder, which a bucket does file by file (atomic only
    # in one with a hierarchical namespace); what one host writes the others have to see at once.
    gcsfuse --implicit-dirs --rename-dir-limit=1000000 --metadata-cache-ttl-secs=0 \
      --metadata-cache-negative-ttl-secs=0 \
      "$bucket" "$mount_point"
  fi
  local folder
  for folder in data runs models; do
    mkdir -p "$mount_point/$folder"
    if [[ -L $root/$folder || ! -e $root/$folder ]]; then
      ln -sfn "$mount_point/$folder" "$root/$folder"
    else
      echo "note: $root/$folder is a folder of this VM; it is not on the bucket"
    fi
  done
}

# JAX says so itself: without huge pages the runtime of v5e and newer starts and ends slowly.
huge_pages() {
  local file=/sys/kernel/mm/transparent_hugepage/enabled
  if [[ -e $file ]] && ! grep -q '\[always\]' "$file"; then
    echo always | sudo tee "$file" >/dev/null || true
  fi
}

huge_pages
install_packages
if [[ -n $bucket ]]; then mount_bucket; fi
echo "$(hostname): ready: $("$root/.venv/bin/python" --version)${bucket:+, gs://$bucket at $mount_point}"
