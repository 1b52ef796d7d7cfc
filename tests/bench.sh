#!/usr/bin/env bash
# The bench on a cluster of its own: forebay local over a real S3 server, both in a folder that is removed afterwards.
# usage: bench.sh FOREBAY S3SERVER [--json]
set -euo pipefail
bin=$1 s3=$2; shift 2
work=$(mktemp -d /tmp/forebay-bench.XXXXXX)
export S3_ACCESS_KEY=bench S3_SECRET_KEY=benchsecret
pids=() throttle=/sys/fs/cgroup/blkio/forebay-bench-$$
cleanup() {
  for p in "${pids[@]}"; do kill "$p" 2>/dev/null || true; wait "$p" 2>/dev/null || true; done
  umount "$work/data/worker/mem.ro" "$work/data/worker/mem" 2>/dev/null || true
  for disk in ssd hdd; do
    umount "$work/$disk" 2>/dev/null || true
    [ ! -e "$work/$disk.loop" ] || losetup -d "$(cat "$work/$disk.loop")" || true
  done
  [ ! -d "$throttle" ] || rmdir "$throttle" || true
  rm -rf "$work"
}
trap cleanup EXIT
wait_for() { for _ in $(seq 300); do grep -q "$2" "$1" 2>/dev/null && return 0; sleep 0.1; done; cat "$1" >&2; return 1; }
mkdir -p "$work/s3/bucket"
"$s3" "$work/s3" 0 >"$work/s3.log" 2>&1 & pids+=($!)
wait_for "$work/s3.log" READY
endpoint=$(sed -n 's/^READY //p' "$work/s3.log")
"$bin" local --data-dir "$work/data" --mem 2GiB --any-port \
  --mount "/s3=s3://bucket,endpoint=$endpoint,region=us-east-1,access_key_id=$S3_ACCESS_KEY,secret_access_key=$S3_SECRET_KEY" >"$work/local.log" 2>&1 & pids+=($!)
wait_for "$work/local.log" 'Stop with'
export FOREBAY_MASTER; FOREBAY_MASTER=$(sed -n 's/.*master \([0-9.:]*\),.*/\1/p' "$work/local.log" | head -1)
head -1 "$work/local.log" >&2
head -c $((256 * 1024 * 1024)) /dev/urandom >"$work/cold"
"$bin" fs put --write-type ufs_only "$work/cold" /s3/cold >/dev/null
"$bin" fs put --write-type ufs_only "$work/cold" /cold >/dev/null
uf=(--ufs-option endpoint="$endpoint" --ufs-option region=us-east-1 --ufs-option access_key_id=$S3_ACCESS_KEY --ufs-option secret_access_key=$S3_SECRET_KEY)
"$bin" bench read "$@"
echo "-- cold, S3 --" >&2
"$bin" bench read --size 64MiB --passes 3 --operations 500 --cold /s3/cold "${uf[@]}" "$@" | grep -E 'cold|FIGURE'
echo "-- cold, file system --" >&2
"$bin" bench read --size 64MiB --passes 3 --operations 500 --cold /cold "$@" | grep -E 'cold|FIGURE'
"$bin" bench metadata "$@"

# A loop device whose reads are throttled stands for a disk; blocks are larger than what passes unthrottled in a burst. usage: disk NAME BYTES_PER_SECOND
disk() {
  truncate -s 2G "$work/$1.img"
  losetup -f --show "$work/$1.img" >"$work/$1.loop"
  mkfs.ext4 -q -F "$(cat "$work/$1.loop")"
  mkdir "$work/$1"
  mount "$(cat "$work/$1.loop")" "$work/$1"
  echo "$(lsblk -ndo MAJ:MIN "$(cat "$work/$1.loop")" | tr -d ' ') $2" >"$throttle/blkio.throttle.read_bps_device"
}
if [ "$(id -u)" = 0 ] && command -v mkfs.ext4 >/dev/null && mkdir "$throttle" 2>/dev/null; then
  echo "-- tiers; SSD and HDD are loop devices throttled to 400 and 100 MiB/s --" >&2
  disk ssd $((400 << 20))
  disk hdd $((100 << 20))
  (echo "$BASHPID" >"$throttle/cgroup.procs" && exec "$bin" bench tiers --mem 512MiB --disk 768MiB --block 64MiB --blocks 3 --ssd-dir "$work/ssd" --hdd-dir "$work/hdd" "$@")
else
  echo "-- tiers, on what is there (no blkio cgroup to throttle a disk with) --" >&2
  "$bin" bench tiers "$@"
fi
echo "-- eviction policies --" >&2
"$bin" bench trace "$@"
