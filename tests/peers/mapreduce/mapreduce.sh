#!/usr/bin/env bash
# Hadoop's own MapReduce jobs, each in one process (the local runner), on the file system at a URI.
#   mapreduce.sh terasort URI FOLDER ROWS   generates ROWS rows of 100 bytes below FOLDER, sorts them, validates them; prints what the validation says
#   mapreduce.sh distcp FROM TO [OPTION ..] copies between clusters, comparing checksums
set -euo pipefail
shopt -s inherit_errexit
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
. "$here/../maven.sh"
home=$(maven_home mapreduce "$here")
java_options=(-Xmx1g -XX:-UsePerfData -Djava.net.preferIPv4Stack=true)
for package in java.lang java.util java.nio sun.nio.ch; do java_options+=(--add-opens "java.base/$package=ALL-UNNAMED"); done
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
job() {
  local class=$1; shift
  (cd "$work" && java "${java_options[@]}" -cp "$home/lib/*" "$class" -Dmapreduce.framework.name=local -Ddfs.replication=1 -Dhadoop.tmp.dir="$work/tmp" "$@")
}
command=$1; shift
case $command in
  terasort)
    uri=$1 folder=$2 rows=$3
    examples=org.apache.hadoop.examples.terasort
    job $examples.TeraGen -Dfs.defaultFS="$uri" -Dmapreduce.job.maps=2 "$rows" "$folder/in" >"$work/log" 2>&1 || { cat "$work/log" >&2; exit 1; }
    job $examples.TeraSort -Dfs.defaultFS="$uri" -Dmapreduce.job.reduces=2 "$folder/in" "$folder/out" >"$work/log" 2>&1 || { cat "$work/log" >&2; exit 1; }
    job $examples.TeraValidate -Dfs.defaultFS="$uri" "$folder/out" "$folder/report" >"$work/log" 2>&1 || { cat "$work/log" >&2; exit 1; }
    bash "$here/../hdfs/hdfs.sh" shell -Dfs.defaultFS="$uri" -cat "$folder/report/part-r-00000" ;;
  distcp)
    from=$1 to=$2; shift 2
    job org.apache.hadoop.tools.DistCp "$@" "$from" "$to" >"$work/log" 2>&1 || { cat "$work/log" >&2; exit 1; }
    grep -E 'Bytes Copied|BYTESCOPIED|Files Copied|COPY=' "$work/log" || true ;;
  *)
    sed -n '2,4p' "${BASH_SOURCE[0]}"; exit 1 ;;
esac
