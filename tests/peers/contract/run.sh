#!/usr/bin/env bash
# Hadoop's own FileSystem contract tests (3.4.1, from Maven), with its options for HDFS, on the server at a URI.
#   run.sh URI OUTFILE [REGEX]   REGEX must match the whole of Class.method, like 'Rename\..*'
# OUTFILE gets a line of each case: class, method, PASS|FAIL|SKIP, milliseconds, first line of the failure; tabs between.
# OUTFILE.traces gets the traces, OUTFILE.log what Hadoop logs (contract.log=WARN). Options go into CONTRACT_OPTS:
#   -Dcontract.timeout=120 (seconds a case), -Dcontract.blocksize=1024, -Dcontract.log=DEBUG
# On a real HDFS blocks of 1 KiB want dfs.namenode.fs-limits.min-block-size=0. Whatever is below / there is DELETED.
# hdfs-3.4.1.txt is what a real HDFS gives: hdfs.sh run dir=.. dfs.blocksize=1024 dfs.namenode.fs-limits.min-block-size=0
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
cache=${FOREBAY_CACHE:-$HOME/.cache/forebay}/peers/contract

# Prints the folder of this pom and these sources. Called in $(..): the lock must not be inherited by what runs later.
prepare() {
  local key home tmp
  key=$(cd "$here" && { cat pom.xml; find src -type f -print0 | LC_ALL=C sort -z | xargs -0 cat; } | sha256sum | cut -c1-12)
  home=$cache/$key
  if [ ! -d "$home" ]; then
    mkdir -p "$cache"
    exec 9>"$cache/lock"; flock 9
    if [ ! -d "$home" ]; then
      rm -rf "$cache"/build.*
      tmp=$(mktemp -d "$cache/build.XXXX")
      mvn -q -B -f "$here/pom.xml" dependency:copy-dependencies -DincludeScope=runtime -DoutputDirectory="$tmp/lib" >&2
      # The options are in no jar of classes, only in that of the test sources.
      mkdir "$tmp/classes"
      (cd "$tmp/classes" && jar xf "$tmp"/lib/hadoop-hdfs-*-test-sources.jar contract/hdfs.xml && test -s contract/hdfs.xml)
      rm "$tmp"/lib/hadoop-hdfs-*-test-sources.jar
      javac -nowarn -proc:none -cp "$tmp/lib/*" -d "$tmp/classes" "$here"/src/main/java/forebay/*.java >&2
      cp "$here"/src/main/resources/* "$tmp/classes"
      chmod 755 "$tmp"
      mv -T "$tmp" "$home"
    fi
  fi
  echo "$home"
}

home=$(prepare)
[ "${1:-}" = prepare ] && { echo "$home"; exit 0; }
uri=$1 out=$2 regex=${3:-}
work=$(mktemp -d "${TMPDIR:-/tmp}/contract.XXXX")
trap 'rm -rf "$work"' EXIT
options=(-Xmx1g -XX:+UseSerialGC -XX:TieredStopAtLevel=1 -XX:-UsePerfData -Djava.net.preferIPv4Stack=true)
for package in java.lang java.util java.nio sun.nio.ch; do options+=(--add-opens "java.base/$package=ALL-UNNAMED"); done
options+=(-Dcontract.log=WARN -Dcontract.uri="$uri" -Djava.io.tmpdir="$work" -Dtest.build.data="$work" -Dhadoop.tmp.dir="$work")
# shellcheck disable=SC2086
java "${options[@]}" ${CONTRACT_OPTS:-} -cp "$home/classes:$home/lib/*" forebay.RunContract "$out" "$out.traces" "$regex" >"$out.log" 2>&1
cut -f3 "$out" | sort | uniq -c
