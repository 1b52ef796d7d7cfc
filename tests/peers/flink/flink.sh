#!/usr/bin/env bash
# An unmodified Flink 1.20 from Maven, in one process.
#   flink.sh URI FOLDER   counts the words of FOLDER/words into FOLDER/counts, and copies its lines into FOLDER/lines as a stream with checkpoints
set -euo pipefail
shopt -s inherit_errexit
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
cache=${FOREBAY_CACHE:-$HOME/.cache/forebay}/peers/flink
# Installs Java and Maven where they are missing.
bash "$here/../hdfs/hdfs.sh" prepare >/dev/null
home=$cache/$(cd "$here" && { cat pom.xml; find src -type f -print0 | LC_ALL=C sort -z | xargs -0 cat; } | sha256sum | cut -c1-12)
if [ ! -d "$home" ]; then
  mkdir -p "$cache"
  exec 9>"$cache/lock"; flock 9
  if [ ! -d "$home" ]; then
    rm -rf "$cache"/build.*
    tmp=$(mktemp -d "$cache/build.XXXX")
    mvn -q -B -f "$here/pom.xml" dependency:copy-dependencies -DincludeScope=runtime -DoutputDirectory="$tmp/lib" >&2
    javac -nowarn -cp "$tmp/lib/*" -d "$tmp/classes" "$here"/src/main/java/forebay/*.java >&2
    mv -T "$tmp" "$home"
  fi
  exec 9>&-
fi
java_options=(-Xmx1g -XX:-UsePerfData -Djava.net.preferIPv4Stack=true)
for package in java.lang java.util java.nio sun.nio.ch java.time java.net; do java_options+=(--add-opens "java.base/$package=ALL-UNNAMED"); done
uri=$1 folder=$2
exec java "${java_options[@]}" -cp "$home/classes:$home/lib/*" forebay.WordCount "$uri$folder/words" "$uri$folder/counts" "$uri$folder/lines" "$uri$folder/checkpoints"
